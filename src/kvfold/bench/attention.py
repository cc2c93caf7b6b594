"""Decode attention of one layer, by recipe: seconds, bytes and their share of what memory can deliver.

Before anything is timed, every recipe's attention must agree with the float32 reference on the same codes. Then come
rounds in which every contestant has a turn: a read of a large buffer, which tells how fast memory is at that moment and
throws everything else out of the caches, a pause until the threads that read have gone to sleep, and a sweep over
several layers that lie in memory one beside the other. What counts is the median sweep.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kvfold.bench.pages import UNPACKS, PagedCodes, draw, exact
from kvfold.bench.rivals import STOCK, DenseCache, Rival, rivals
from kvfold.bench.shapes import AttentionShape
from kvfold.bench.stream import Stream, wait_for
from kvfold.errors import KVFoldError, RequestError
from kvfold.kernels.merge import Piece
from kvfold.recipe import Recipe

__all__ = ["GATE", "AttentionRow", "Contestant", "Samples", "bench_attention", "check", "rounds"]

GATE = 2e-3
"""The largest relative error of a kernel that reads codes: of any row of the outputs, and of any log-sum-exp."""

_ROUNDED_GATE = 0.03  # of the path through torch, which rounds what it unpacks to the model's dtype
_RIVAL_GATE = 0.2  # rivals round scores, probabilities and outputs to bfloat16; sharp heads feel that
_FEWEST = 3
_PAUSE_S = 0.03  # where nobody bounds it, OpenMP's threads spin for some 15 ms after their work, on cores of others

Say = Callable[[str], None]


class Contestant(Protocol):
    """Attends over one of its ``layers`` when it is called."""

    layers: int

    def __call__(self, layer: int) -> object:
        """One layer's attention."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One contestant. ``rope``: of latent pages, else 0. ``seconds``: median of one layer's attention. ``stream_gb_s``:
    median of the reads of a large buffer right before its sweeps.

    The ``vs`` say how many times faster it is: than the fastest rival and than stock SDPA, both in bfloat16, than any
    kernel that reads bfloat16 at stream speed could be, and than ``raw`` (None without it). ``max_abs_err``,
    ``rel_err``: of the outputs, against float32 on the same codes; ``lse_err``: of the log-sum-exp, relative (None for
    rivals, which have none). ``samples``: sweeps, each over ``layers`` layers.
    """

    recipe: str
    rival: bool
    head_dim: int
    rope: int
    group: int
    kv_heads: int
    context: int
    batch: int
    seconds: float
    bytes_read: int
    flops: int
    gb_s: float
    stream_gb_s: float
    fraction_of_stream: float
    vs_best_bf16: float
    vs_stock_sdpa: float
    vs_bf16_limit: float
    vs_raw: float | None
    max_abs_err: float
    rel_err: float
    lse_err: float | None
    variant: str
    threads: int
    layers: int
    samples: int

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Samples:
    """What rounds have measured of one contestant: seconds of a layer, and GB/s of the stream just before."""

    seconds: list[float] = field(default_factory=list)
    stream: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Error:
    absolute: float
    relative: float
    lse: float | None = None


def bench_attention(
    shape: AttentionShape,
    *,
    recipes: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    repeats: int = 15,
    seconds: float = 30.0,
    seed: int = 0,
    say: Say = lambda _: None,
) -> list[AttentionRow]:
    """Times ``shape`` under each recipe and the rivals' ways, in at most ``repeats`` rounds.

    A contestant that has had its share of ``seconds`` and three sweeps sits out the remaining rounds. ``dtype``: the
    model's, which raw pages hold; rivals have bfloat16. Raises RecipeError or UnsupportedError for a recipe,
    KVFoldError if the correctness gate fails.
    """
    if repeats < 1:
        raise RequestError(f"repeats={repeats}", why="it must be at least 1")
    parsed = {text: Recipe.parse(text) for text in recipes}
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        drawn = draw(shape, device, dtype, seed)
        contestants: dict[str, PagedCodes | Rival] = {}
        errors: dict[str, _Error] = {}
        for name, recipe in parsed.items():
            say(f"filling and checking {name}")
            codes = PagedCodes(recipe, shape, drawn)
            errors[name] = check(name, codes, codes.truth())
            contestants[name] = codes
        say("filling and checking the rivals")
        dense = DenseCache(shape, drawn)
        want = exact(shape, dense.q.unflatten(1, (shape.kv_heads, -1)), dense.k[0, 0], dense.v[0, 0])[0]
        for rival in rivals(dense):
            errors[rival.name] = _check_rival(rival, want)
            contestants[rival.name] = rival
        measured = rounds(contestants, device, repeats=repeats, seconds=seconds, say=say)
    return _rows(shape, contestants, measured, errors)


def rounds(
    contestants: Mapping[str, Contestant],
    device: torch.device,
    *,
    repeats: int,
    seconds: float,
    say: Say = lambda _: None,
) -> dict[str, Samples]:
    """Measures everyone in turn, as in `bench_attention`."""
    stream = Stream(device)
    measured = {name: Samples() for name in contestants}
    share = seconds / len(contestants)
    for number in range(1, repeats + 1):
        for name, contestant in contestants.items():
            found = measured[name]
            if len(found.seconds) >= _FEWEST and sum(found.seconds) * contestant.layers > share:
                continue
            found.stream.append(stream.read())
            time.sleep(_PAUSE_S)
            begin = time.perf_counter()
            for layer in range(contestant.layers):
                contestant(layer)
            wait_for(device)
            found.seconds.append((time.perf_counter() - begin) / contestant.layers)
        say(f"round {number} of {repeats}")
    return measured


def check(name: str, codes: PagedCodes, truth: Piece) -> _Error:
    """The correctness gate: the first and the last layer of ``codes`` against the ``truth``. KVFoldError above
    what is allowed: `GATE`, and more where codes are unpacked to the model's dtype first.
    """
    allowed = _ROUNDED_GATE if codes.variant == UNPACKS else GATE
    want_o, want_lse = truth
    worst = _Error(0.0, 0.0, 0.0)
    for layer in sorted({0, codes.layers - 1}):
        o, lse = codes.attend(layer)
        absolute, relative = _deviation(o, want_o)
        lse_error = float(((lse - want_lse).abs() / want_lse.abs().clamp_min(1.0)).max())
        # max() would drop a NaN in its first place
        if not (relative <= allowed and lse_error <= allowed):
            raise KVFoldError(
                f"the correctness gate of {name}",
                why=f"its error is {relative:.2g} (log-sum-exp: {lse_error:.2g}), at most {allowed:g} is allowed",
            )
        worst = _Error(*(max(pair) for pair in zip(_values(worst), (absolute, relative, lse_error), strict=True)))
    return worst


def _values(error: _Error) -> tuple[float, float, float]:
    return error.absolute, error.relative, error.lse or 0.0


def _check_rival(rival: Rival, want: Tensor) -> _Error:
    absolute, relative = _deviation(rival(rival.layers - 1).float(), want.flatten(1, 2))
    if not relative <= _RIVAL_GATE:
        raise KVFoldError(f"the correctness gate of {rival.name}", why=f"its relative error is {relative:.2g}")
    return _Error(absolute, relative)


def _deviation(found: Tensor, want: Tensor) -> tuple[float, float]:
    """The largest error of a number, and of a row relative to the row's length."""
    difference = found - want
    return float(difference.abs().max()), float((difference.norm(dim=-1) / want.norm(dim=-1)).max())


def _rows(
    shape: AttentionShape,
    contestants: Mapping[str, PagedCodes | Rival],
    measured: Mapping[str, Samples],
    errors: Mapping[str, _Error],
) -> list[AttentionRow]:
    median = {name: statistics.median(found.seconds) for name, found in measured.items()}
    best = min(median[name] for name, contestant in contestants.items() if isinstance(contestant, Rival))
    rows = []
    for name, contestant in contestants.items():
        seconds, error = median[name], errors[name]
        stream = statistics.median(measured[name].stream)
        gb_s = contestant.bytes_read / seconds / 1e9
        rows.append(
            AttentionRow(
                recipe=name,
                rival=isinstance(contestant, Rival),
                head_dim=shape.head_dim,
                rope=shape.rope,
                group=shape.group,
                kv_heads=shape.kv_heads,
                context=shape.context,
                batch=shape.batch,
                seconds=seconds,
                bytes_read=contestant.bytes_read,
                flops=shape.flops,
                gb_s=gb_s,
                stream_gb_s=stream,
                fraction_of_stream=gb_s / stream,
                vs_best_bf16=best / seconds,
                vs_stock_sdpa=median[STOCK] / seconds,
                vs_bf16_limit=shape.bf16_bytes / (stream * 1e9) / seconds,
                vs_raw=median["raw"] / seconds if "raw" in median else None,
                max_abs_err=error.absolute,
                rel_err=error.relative,
                lse_err=error.lse,
                variant=contestant.variant,
                threads=torch.get_num_threads(),
                layers=contestant.layers,
                samples=len(measured[name].seconds),
            )
        )
    return rows
