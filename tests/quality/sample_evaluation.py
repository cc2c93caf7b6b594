"""An evaluation as a run might give it: six recipes, twelve rivals, nine tasks. The figures are invented."""

from __future__ import annotations

import random

from kvfold.quality.results import ErrorMap, Evaluation, Generation, Row, TaskScore

TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "kv", "copy")
RAW_BYTES = 12288.0

# name, family, recipe, bits, share of raw's bytes, mean KL, mean loss of task score
CONTESTANTS: tuple[tuple[str, str, str | None, float | None, float, float, float], ...] = (
    ("raw", "kvfold", "raw", 16.0, 1.0, 0.0, 0.0),
    ("int8", "kvfold", "int8", 8.5, 0.56, 2.4e-5, 0.0),
    ("int4", "kvfold", "int4", 4.5, 0.32, 4.1e-3, 0.004),
    ("k4v2", "kvfold", "k4v2", 3.5, 0.26, 2.2e-2, 0.02),
    ("int2", "kvfold", "int2", 2.5, 0.2, 0.31, 0.31),
    ("int2,rotation=calibrated", "kvfold", "int2,rotation=calibrated", 2.4, 0.195, 0.043, 0.025),
    ("transformers-hqq-8bit", "transformers", None, 8.5, 0.6, 5.2e-5, 0.0),
    ("transformers-hqq-4bit", "transformers", None, 4.5, 0.36, 8.9e-3, 0.01),
    ("transformers-hqq-2bit", "transformers", None, 2.5, 0.24, 0.62, 0.48),
    ("transformers-quanto-4bit", "transformers", None, 4.5, 0.35, 1.1e-2, 0.012),
    ("transformers-quanto-2bit", "transformers", None, 2.5, 0.23, 0.83, 0.55),
    ("kvpress-snapkv-0.50", "kvpress", None, None, 0.5, 0.061, 0.08),
    ("kvpress-snapkv-0.75", "kvpress", None, None, 0.25, 0.17, 0.22),
    ("kvpress-expected-attention-0.50", "kvpress", None, None, 0.5, 0.047, 0.06),
    ("kvpress-expected-attention-0.75", "kvpress", None, None, 0.25, 0.12, 0.18),
    ("kvpress-streaming-llm-0.75", "kvpress", None, None, 0.25, 0.33, 0.5),
    ("truncation-0.50", "truncation", None, None, 0.5, 0.29, 0.45),
    ("truncation-0.75", "truncation", None, None, 0.25, 0.54, 0.66),
)


def sample_rows() -> list[Row]:
    """The rows, the same at every call."""
    chance = random.Random(3)
    return [_row(chance, *contestant) for contestant in CONTESTANTS]


def _row(
    chance: random.Random,
    name: str,
    family: str,
    recipe: str | None,
    bits: float | None,
    share: float,
    kl: float,
    lost: float,
) -> Row:
    drift = 2.5 if family == "transformers" else 1.0
    packed = recipe is not None and kl > 0
    size = {"int8": 0.006, "int4": 0.08, "k4v2": 0.08}.get(name, 0.3)
    return Row(
        contestant=name,
        family=family,
        recipe=recipe,
        bits_per_value=bits,
        kv_bytes_per_token=RAW_BYTES * share,
        compression=1 / share,
        kl_mean=kl,
        kl_p99=kl * 11,
        top1_agreement=1 - min(kl**0.5 * 0.4, 0.6),
        ppl=9.2 + 9 * kl,
        ppl_delta=9 * kl - 0.0004 * (kl > 0),
        positions=2048,
        decode_tok_s=74.0 - 20 * (1 - share) if family == "kvfold" else 31.0 + 20 * chance.random(),
        tasks={task: _score(0.97 - lost * (0.3 + 1.4 * chance.random()) - 0.06 * (task == "vt")) for task in TASKS},
        generation=Generation(
            tokens=512,
            passages=4,
            kl_mean=kl * drift,
            kl_p99=kl * drift * 9,
            top1_agreement=1 - min(kl**0.5 * 0.5, 0.7),
            first_divergence=512.0 if kl < 1e-4 else max(512 * (1 - kl**0.25), 3.0),
        ),
        kl_by_position=[
            (1792 + 16 * step, kl * (1 + (drift - 1) * step / 15) * chance.uniform(0.8, 1.25)) for step in range(16)
        ],
        errors=ErrorMap(k=_grid(chance, size), v=_grid(chance, 0.3 if name == "k4v2" else size)) if packed else None,
    )


def _score(mean: float, n: int = 40) -> TaskScore:
    mean = round(min(max(mean, 0.0), 1.0) * n) / n
    z = 1.96
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (mean * (1 - mean) / n + z * z / (4 * n * n)) ** 0.5
    return TaskScore(mean, max(middle - half, 0.0), min(middle + half, 1.0), n)


def _grid(chance: random.Random, size: float, layers: int = 6, heads: int = 2) -> list[list[float]]:
    return [[size * chance.uniform(0.7, 1.6) for _ in range(heads)] for _ in range(layers)]


def sample_evaluation(rows: list[Row] | None = None) -> Evaluation:
    """The whole of it, with what a run says about itself."""
    return Evaluation(
        command="kvfold eval --model bundled --recipes 'raw;int8;int4;k4v2;int2;int2,rotation=calibrated' "
        "--context 2048 --samples 40 --seed 0 --json eval.json --report report",
        seed=0,
        model="bundled",
        settings={"tasks": list(TASKS), "context": 2048, "samples": 40, "text": None, "text_windows": 8},
        versions={"kvfold": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        hardware={"processor": "2 cores, AVX2", "memory": "8 GiB", "threads": 2, "cuda": False},
        rows=sample_rows() if rows is None else rows,
    )
