"""Turn a checkpoint into the folder that transformers loads (bfloat16 weights), one file at a time and whole."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from model import Shape, to_llama

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def export(checkpoint: Path, tokenizer: Path, out: Path) -> int:
    """Write the model folder; returns the number of parameters."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    shape = Shape(**state["shape"])
    weights = to_llama(load_file(checkpoint / "model.safetensors"), shape)
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    pad, bos, end = loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id
    config = LlamaConfig(**shape.llama_config(pad, bos, end)).to_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config.pop("_name_or_path", None)
    generation = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": pad, "do_sample": False}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # A name of its own first: a reader never meets half a file.
    half = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(half, out / "model.tmp", metadata={"format": "pt"})
    (out / "model.tmp").chmod(0o644)
    os.replace(out / "model.tmp", out / "model.safetensors")
    return sum(tensor.numel() for tensor in half.values())


def main() -> None:
    """Export the checkpoint in ``--run`` to ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("build/training"))
    parser.add_argument("--out", type=Path, default=Path("src/kvfold/bundled"))
    arguments = parser.parse_args()
    parameters = export(arguments.run / "checkpoint", arguments.run / "tokenizer", arguments.out)
    print(f"wrote {parameters:,} parameters to {arguments.out}")


if __name__ == "__main__":
    main()
