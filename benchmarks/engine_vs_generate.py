"""Decode through the engine against ``generate()`` of transformers with its dynamic cache, on the same batch.

    python benchmarks/engine_vs_generate.py --batch 16 --prompt 512 --json benchmarks/results/engine_vs_generate.json

Both decode ``--new`` greedy tokens for ``--batch`` prompts of equal length. What counts is the median time of a decode
step while all sequences are decoding, scheduling, sampling and bookkeeping included, over ``--repeats`` interleaved
runs. Before anything is timed, the engine's ``raw`` tokens must equal those of ``generate()`` in float32, where
rounding hardly ever turns a near tie.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from kvfold import Engine, SamplingParams, load

AGREE_AT_LEAST = 0.98


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    model, tokenizer = load("bundled")
    exact, _ = load("bundled", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    text = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    starts = torch.randint(0, len(ids) - options.prompt, (options.batch,), generator=generator).tolist()
    prompts = [ids[start : start + options.prompt] for start in starts]

    def stock(model: PreTrainedModel = model) -> tuple[list[list[int]], list[float]]:
        batch, clock = torch.tensor(prompts), StepClock()
        out = model.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=options.new, min_new_tokens=options.new,
            do_sample=False, stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return out[:, options.prompt :].tolist(), clock.steps()

    def engine(recipe: str, model: PreTrainedModel = model) -> tuple[list[list[int]], list[float]]:
        params = SamplingParams(max_tokens=options.new, ignore_eos=True)
        with Engine(model, tokenizer=tokenizer, recipe=recipe, kv_memory="512MiB", prefix_caching=False) as runtime:
            order = [runtime.add_request(prompt, params) for prompt in prompts]
            outputs, steps = {}, []
            while runtime.has_unfinished():
                before = runtime.stats()["decode_tokens"]
                begin = time.perf_counter()
                outputs |= {output.request_id: output.token_ids for output in runtime.step()}
                if runtime.stats()["decode_tokens"] - before == options.batch:
                    steps.append(time.perf_counter() - begin)
        return [outputs[request_id] for request_id in order], steps

    contestants = {"transformers": stock, "raw": lambda: engine("raw"), "int4": lambda: engine("int4")}
    wanted, found = stock(exact)[0], engine("raw", exact)[0]
    same = statistics.mean(a == b for x, y in zip(wanted, found, strict=True) for a, b in zip(x, y, strict=True))
    if same < AGREE_AT_LEAST:
        sys.exit(f"correctness gate: only {same:.1%} of the engine's tokens equal those of generate()")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repeats):
        for name, run in contestants.items():
            times[name] += run()[1]
    if not all(times.values()):
        sys.exit("no step had all sequences decoding: the first end before the last are read; raise --new")
    rows = [
        {
            "contestant": name,
            "batch": options.batch,
            "prompt": options.prompt,
            "new": options.new,
            "step_s": statistics.median(spent),
            "steps": len(spent),
            "decode_tok_s": options.batch / statistics.median(spent),
            "vs_transformers": statistics.median(times["transformers"]) / statistics.median(spent),
        }
        for name, spent in times.items()
    ]
    for row in rows:
        print(f"{row['contestant']:>14}  {row['decode_tok_s']:8.0f} tok/s  {row['vs_transformers']:.2f}x")
    if options.json:
        result = {
            "command": " ".join(sys.argv),
            "threads": options.threads,
            "tokens_equal_in_float32": same,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class StepClock(StoppingCriteria):
    """Never stops anything; notes when each step of ``generate()`` is done."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.at, self.at[1:], strict=False)]


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
