"""What the device's allocator holds beside what kvfold's books say, under each recipe.

    python -m benchmarks.gpu.memory --json benchmarks/results/gpu-memory.json

An engine reads prompts and answers them in a budget that just holds them. ``arena`` is that budget, ``books`` the most
that blocks and tables took of it, by kvfold's own count, ``held`` what the allocator held for the idle engine beside the weights,
and ``peak`` the most it ever held beside the weights: arena, activations, logits, and what is unpacked at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import torch

from kvfold import Engine, SamplingParams
from kvfold.bench.shapes import random_model
from kvfold.engine.loading import parse_recipes
from kvfold.geometry import Geometry

ANSWER = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--recipes", default="raw;int8;int4;int2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = random_model(args.shape, dtype=torch.bfloat16, max_positions=args.context + ANSWER + 1)
    geometry = Geometry.from_config(model.config)
    weights = torch.cuda.memory_allocated()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, geometry.vocab - 3, (args.batch, args.context), generator=generator).tolist()
    rows = []
    for text, recipe in parse_recipes(args.recipes.split(";"), model).items():
        lengths = [args.context + ANSWER] * args.batch
        budget = int(geometry.cache_bytes(recipe, 2, lengths) * 1.05) + (64 << 20)
        torch.cuda.reset_peak_memory_stats()
        with Engine(model, recipe=recipe, kv_memory=budget, max_sequences=args.batch, prefix_caching=False) as engine:
            held = torch.cuda.memory_allocated() - weights
            engine.generate(prompts, SamplingParams(max_tokens=ANSWER, ignore_eos=True), progress=False)
            stats = engine.stats()
            peak = torch.cuda.max_memory_allocated() - weights
        found = {"arena": budget, "books": int(stats["kv_peak_bytes"]), "held": held, "peak": peak}
        rows.append({"recipe": text, **found, "prefill_and_decode_seconds": stats["seconds"]})
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{text:<6}", *(f"{name} {size / 2**20:.0f} MiB " for name, size in found.items()))
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
