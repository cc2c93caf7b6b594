"""Decode through the engine against ``generate()`` of transformers with its dynamic cache, on the same batch.

    python benchmarks/engine_vs_generate.py --batch 16 --prompt 512 --new 64 --json benchmarks/results/engine_vs_generate.json

Both produce ``--new`` greedy tokens for ``--batch`` prompts of equal length. The time of decoding is the time of the whole call less
that of a call for one token (the prefill), the median of ``--repeats`` interleaved runs. Before anything is timed, the engine's
``raw`` tokens must equal those of ``generate()`` in all but a few places (rounding in bfloat16 may turn a near tie).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from kvfold import Engine, SamplingParams, load

AGREE_AT_LEAST = 0.8


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    model, tokenizer = load("bundled")
    generator = torch.Generator().manual_seed(0)
    text = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    starts = torch.randint(0, len(ids) - options.prompt, (options.batch,), generator=generator).tolist()
    prompts = [ids[start : start + options.prompt] for start in starts]

    def stock(new: int) -> list[list[int]]:
        batch = torch.tensor(prompts)
        out = model.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return out[:, options.prompt :].tolist()

    def engine(recipe: str, new: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        with Engine(model, tokenizer=tokenizer, recipe=recipe, kv_memory="512MiB", prefix_caching=False) as runtime:
            return [output.token_ids for output in runtime.generate(prompts, params, progress=False)]

    contestants = {"transformers": stock, "raw": lambda new: engine("raw", new), "int4": lambda new: engine("int4", new)}
    wanted, found = stock(options.new), engine("raw", options.new)
    same = statistics.mean(a == b for x, y in zip(wanted, found, strict=True) for a, b in zip(x, y, strict=True))
    if same < AGREE_AT_LEAST:
        sys.exit(f"correctness gate: only {same:.1%} of the engine's tokens equal those of generate()")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repeats):
        for name, run in contestants.items():
            times[name].append(timed(run, options.new) - timed(run, 1))
    rows = [
        {
            "contestant": name,
            "batch": options.batch,
            "prompt": options.prompt,
            "new": options.new,
            "decode_s": statistics.median(spent),
            "decode_tok_s": options.batch * (options.new - 1) / statistics.median(spent),
            "vs_transformers": statistics.median(times["transformers"]) / statistics.median(spent),
        }
        for name, spent in times.items()
    ]
    for row in rows:
        print(f"{row['contestant']:>14}  {row['decode_tok_s']:8.0f} tok/s  {row['vs_transformers']:.2f}x")
    if options.json:
        result = {"command": " ".join(sys.argv), "threads": options.threads, "tokens_equal_raw": same, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def timed(run, new: int) -> float:
    begin = time.perf_counter()
    run(new)
    return time.perf_counter() - begin


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
