"""Memory while decoding under a budget: bytes of the cache after every step, for several methods and for the full
cache.

``python -m benchmarks.flat_memory`` writes ``benchmarks/results/flat-memory.json`` and ``docs/retention-memory.png``.
The bundled model generates, from a short prompt and past its end tokens, more positions than it was trained for: its
text is of no account here, its bytes are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kvfold import Engine, SamplingParams
from kvfold.engine.loading import load
from kvfold.quality.environment import hardware, versions
from kvfold.quality.tasks import heldout_text

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "flat-memory.json"
PICTURE = ROOT / "docs" / "retention-memory.png"
RECIPES = (
    "raw",
    "raw+h2o(budget=512)",
    "raw+tova(budget=512)",
    "raw+keydiff(budget=512)",
    "raw+learned(budget=512)",
    "int4+keydiff(budget=512)",
)
_EVERY = 16  # steps between two samples


@dataclass(frozen=True, slots=True)
class Run:
    """One recipe: ``held[i]`` bytes in use, notes of the method counted, after ``16 * (i + 1)`` steps."""

    recipe: str
    held: list[int]
    tokens: int
    tokens_per_s: float
    retention_runs: int


def measure(recipe: str, prompt: int, tokens: int) -> Run:
    """Generates ``tokens`` tokens and looks at the cache meanwhile."""
    model, tokenizer = load("bundled")
    model.config.max_position_embeddings = prompt + tokens + 1
    ids = tokenizer.encode(heldout_text()[: 8 * prompt])[:prompt]
    held = []
    began = time.perf_counter()
    with Engine(model, tokenizer=tokenizer, recipe=recipe, kv_memory="64MiB", prefix_caching=False) as engine:
        engine.add_request(ids, SamplingParams(max_tokens=tokens, ignore_eos=True))
        steps = 0
        while engine.has_unfinished():
            engine.step()
            steps += 1
            if steps % _EVERY == 0 and engine.has_unfinished():
                held.append(engine._runner.cache.bytes_in_use())
        stats = engine.stats()
    return Run(recipe, held, tokens, tokens / (time.perf_counter() - began), int(stats.get("retention_runs", 0)))


def draw(runs: list[Run], path: Path) -> None:
    """Bytes by generated tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        x = [_EVERY * (i + 1) for i in range(len(run.held))]
        axes.plot(x, [held / 2**20 for held in run.held], label=run.recipe, linewidth=1.4)
    axes.set_yscale("log", base=2)
    axes.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    axes.set_xlabel("tokens generated")
    axes.set_ylabel("cache in use, MiB")
    axes.set_title("Under a budget of 512 tokens memory stays flat while decoding", loc="left", fontsize=11)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    axes.set_ylim(0.2, 24)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to generate")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    runs = []
    for recipe in RECIPES:
        runs.append(measure(recipe, options.prompt, options.tokens))
        late = runs[-1].held[len(runs[-1].held) // 2 :]
        print(f"{recipe:28} {min(late) / 2**20:7.3f} to {max(late) / 2**20:7.3f} MiB in the second half", flush=True)
    data = {
        "command": "python -m benchmarks.flat_memory " + " ".join(sys.argv[1:]),
        "every": _EVERY,
        "runs": [asdict(run) for run in runs],
        "versions": versions(),
        "hardware": hardware(load("bundled")[0].device),
    }
    options.json.write_text(json.dumps(data) + "\n", encoding="utf-8")
    draw(runs, options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
