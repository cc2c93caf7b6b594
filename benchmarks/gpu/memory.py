"""What the device's allocator holds beside what kvfold's books say, under each recipe.

    python -m benchmarks.gpu.memory --json benchmarks/results/gpu-memory.json

Sequences are read in chunks and decoded together for some steps, in a budget that just holds them. ``arena`` is that
budget and ``books`` what blocks and tables take of it at the end, by kvfold's own count. ``held``: what the allocator
holds then beside the weights. ``prefill_peak`` and ``decode_peak``: the most it ever held beside the weights: arena,
activations, logits, and what is unpacked or coded at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from kvfold.bench.shapes import random_model
from kvfold.engine.loading import parse_recipes
from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.geometry import Geometry

STEPS, CHUNK = 16, 1024


def work(seq: int, tokens: list[int], start: int, *, sample: bool) -> SeqWork:
    return SeqWork(seq=seq, tokens=tokens, start=start, salt=b"", sample=sample)


def measure(runner: ModelRunner, prompts: list[list[int]], weights: int) -> dict[str, int]:
    torch.cuda.reset_peak_memory_stats()
    sequences = [runner.create() for _ in prompts]
    for seq, prompt in zip(sequences, prompts, strict=True):
        for start in range(0, len(prompt), CHUNK):
            runner.execute([work(seq, prompt[start : start + CHUNK], start, sample=True)])
    prefill_peak = torch.cuda.max_memory_allocated() - weights
    torch.cuda.reset_peak_memory_stats()
    for i in range(STEPS):
        at = len(prompts[0]) + i
        runner.execute(
            [work(seq, prompt[i : i + 1], at, sample=True) for seq, prompt in zip(sequences, prompts, strict=True)]
        )
    return {
        "arena": runner.cache.bytes_allocated(),
        "books": runner.cache.bytes_in_use(),
        "held": torch.cuda.memory_allocated() - weights,
        "prefill_peak": prefill_peak,
        "decode_peak": torch.cuda.max_memory_allocated() - weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--recipes", default="raw;int8;int4;int2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = random_model(args.shape, dtype=torch.bfloat16, max_positions=args.context + STEPS + 1)
    geometry = Geometry.from_config(model.config)
    weights = torch.cuda.memory_allocated()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, geometry.vocab - 3, (args.batch, args.context), generator=generator).tolist()
    rows = []
    for text, recipe in parse_recipes(args.recipes.split(";"), model).items():
        needed = geometry.cache_bytes(recipe, 2, [args.context + STEPS] * args.batch)
        raw_chunk = sum(group.raw_block_bytes for group in geometry.groups(recipe, 2)) * (
            CHUNK // recipe.block_size + 1
        )
        runner = ModelRunner(model, recipe=recipe, kv_memory=needed + 2 * raw_chunk, check=False)
        found = measure(runner, prompts, weights)
        runner.release()
        del runner
        torch.cuda.empty_cache()
        rows.append({"recipe": text, **found})
        print(f"{text:<6}", *(f"{name} {size / 2**20:.0f} MiB " for name, size in found.items()), flush=True)
    if args.json:
        about = {
            "command": " ".join(["python -m benchmarks.gpu.memory", *sys.argv[1:]]),
            "gpu": torch.cuda.get_device_name(),
            "batch": args.batch,
            "context": args.context,
            "weights": weights,
        }
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
