"""A prefix that many sequences share: its pages walked for each of them, and once for all of them (cascade).

Only the prefix is timed. What a sequence has of its own is attended as ever and merged by the log-sum-exp, which must
therefore be the same either way.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from kvfold.bench.attention import check, rounds
from kvfold.bench.pages import UNPACKS, PagedCodes, draw
from kvfold.bench.shapes import AttentionShape
from kvfold.errors import KVFoldError
from kvfold.kernels.merge import Piece
from kvfold.kernels.pages import PagesCall
from kvfold.recipe import Recipe

__all__ = ["PrefixRow", "bench_prefix"]

_SAME = 1e-5
"""How far the two log-sum-exps may be apart, relative to their size."""

_ROUNDED = 1e-2  # where torch attends in the model's dtype


@dataclass(frozen=True, slots=True)
class PrefixRow:
    """A prefix of ``context`` tokens under ``batch`` sequences. ``factor``: how many times faster one walk for all is
    than a walk for each; ``lse_difference``: how far their log-sum-exps are apart at most.
    """

    recipe: str
    head_dim: int
    rope: int
    group: int
    kv_heads: int
    context: int
    batch: int
    each_seconds: float
    cascade_seconds: float
    factor: float
    lse_difference: float
    stream_gb_s: float
    each_variant: str
    cascade_variant: str

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


class _Walk:
    """All sequences' queries over the pages of one prefix; ``once``: as rows of one sequence."""

    def __init__(self, codes: PagedCodes, q: Tensor, *, once: bool) -> None:
        self.layers = codes.layers
        self._codes = codes
        self._q = q
        self._once = once
        self._addr = codes.addr if once else codes.addr.expand(q.shape[0], -1, -1).contiguous()

    def __call__(self, layer: int) -> Piece:
        o, lse = self._codes.run(self._call(layer))
        if not self._once:
            return o, lse
        o, lse = (x[0].unflatten(1, (self._q.shape[0], -1)).transpose(0, 1) for x in (o, lse))
        return o, lse

    @property
    def variant(self) -> str:
        """Which implementation runs."""
        return self._codes.variant_of(self._call(0))

    def _call(self, layer: int) -> PagesCall:
        rows = self._codes.rows(self._q)  # [n, Hkv, G, D']
        if self._once:
            rows = rows.transpose(0, 1).flatten(1, 2)[None]
        return self._codes.call(layer, rows, self._addr)


def bench_prefix(
    shape: AttentionShape,
    *,
    recipes: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    repeats: int = 15,
    seconds: float = 30.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> list[PrefixRow]:
    """Times both walks of every recipe, ``shape.batch`` sequences over ``shape.context`` shared tokens; otherwise as
    `kvfold.bench.attention.bench_attention`, its gate included.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    walks: dict[str, _Walk] = {}
    differences: dict[str, float] = {}
    with torch.inference_mode():
        q = draw(replace(shape, context=1), device, dtype, seed).q
        alone = replace(shape, batch=1)
        prefix = draw(alone, device, dtype, seed)
        for name in recipes:
            say(f"filling and checking {name}")
            codes = PagedCodes(Recipe.parse(name), alone, prefix)
            check(name, codes, codes.truth())
            each, once = (_Walk(codes, q, once=once) for once in (False, True))
            walks |= {f"{name} each": each, f"{name} once": once}
            differences[name] = _difference(name, each, once)
        measured = rounds(walks, device, repeats=repeats, seconds=seconds, say=say)
    rows = []
    for name, difference in differences.items():
        each_s, once_s = (statistics.median(measured[f"{name} {way}"].seconds) for way in ("each", "once"))
        rows.append(
            PrefixRow(
                recipe=name,
                head_dim=shape.head_dim,
                rope=shape.rope,
                group=shape.group,
                kv_heads=shape.kv_heads,
                context=shape.context,
                batch=shape.batch,
                each_seconds=each_s,
                cascade_seconds=once_s,
                factor=each_s / once_s,
                lse_difference=difference,
                stream_gb_s=statistics.median(measured[f"{name} once"].stream),
                each_variant=walks[f"{name} each"].variant,
                cascade_variant=walks[f"{name} once"].variant,
            )
        )
    return rows


def _difference(name: str, each: _Walk, once: _Walk) -> float:
    want, found = each(0)[1], once(0)[1]
    difference = float((want - found).abs().max())
    allowed = _ROUNDED if UNPACKS in (each.variant, once.variant) else _SAME
    if not difference <= allowed * max(1.0, float(want.abs().max())):
        why = f"walking a prefix once and for each differ by {difference:.2g} in the log-sum-exp"
        raise KVFoldError(f"the correctness gate of {name}", why=why)
    return difference
