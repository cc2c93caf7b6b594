"""Attention weights, in blocks of queries and head by head: never more of them at once than a bounded block.

The same rules as the kernels': windows and chunks (`kvfold.attention.pieces.visible`), soft-caps, and learned sink
logits, which take part of the softmax and have no value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvfold.attention.pieces import LayerCall, visible
from kvfold.quality.watch import Attended

__all__ = ["Weights", "streamed", "weigh"]

_BLOCK: Final = 1 << 22
"""Numbers of a block of weights."""

_TILE: Final = 256
"""Queries whose sinks and recent windows are attended together."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of ``r`` query heads that read one key head, over the first ``S`` positions.

    ``heads``: the query heads. ``rows``: which of the asked positions. ``positions [m]``: what those are.
    ``p [r, m, S]``: the weights, float32; ``nowhere [r, m]``: what a learned sink logit takes of the sum of 1.
    """

    heads: slice
    rows: slice
    positions: Tensor
    p: Tensor
    nowhere: Tensor


def weigh(seen: Attended, positions: Tensor) -> Iterator[Weights]:
    """The weights of the queries at ``positions [n]`` (rising), key head by key head, in blocks of them."""
    heads = seen.k.shape[1]
    group = seen.q.shape[1] // heads
    size = max(1, _BLOCK // (group * seen.k.shape[0]))
    for head in range(heads):
        mine = slice(head * group, (head + 1) * group)
        for first in range(0, positions.numel(), size):
            rows = slice(first, min(first + size, positions.numel()))
            at = positions[rows]
            keys = torch.arange(int(at[-1]) + 1, device=at.device)
            p, nowhere = _softmax(
                seen.q[at, mine], seen.k[: keys.numel(), head], visible(at, keys, seen.call), seen.call, mine
            )
            yield Weights(mine, rows, at, p, nowhere)


def streamed(seen: Attended, sinks: int, recent: int) -> Tensor:
    """What all heads would give from the first ``sinks`` positions and the latest ``recent`` ones (each query's own
    included) alone: ``[T, Hq, Dv]``, float32.
    """
    count, heads = seen.k.shape[:2]
    group = seen.q.shape[1] // heads
    out = torch.empty((count, seen.q.shape[1], seen.v.shape[2]), device=seen.q.device)
    for first in range(0, count, _TILE):
        at = torch.arange(first, min(first + _TILE, count), device=seen.q.device)
        oldest = max(sinks, first - recent + 1)
        keys = torch.cat((torch.arange(min(sinks, count)), torch.arange(oldest, int(at[-1]) + 1))).to(at.device)
        kept = visible(at, keys, seen.call) & ((keys < sinks) | (keys > at[:, None] - recent))
        for head in range(heads):
            mine = slice(head * group, (head + 1) * group)
            p, _ = _softmax(seen.q[at, mine], seen.k[keys, head], kept, seen.call, mine)
            out[at, mine] = (p @ seen.v[keys, head].float()).transpose(0, 1)
    return out


def _softmax(q: Tensor, k: Tensor, kept: Tensor, call: LayerCall, heads: slice) -> tuple[Tensor, Tensor]:
    """Weights ``[r, m, S]`` of ``q [m, r, D]`` over ``k [S, D]`` where ``kept [m, S]``, and what the sink logits of
    ``heads`` take ``[r, m]``.
    """
    scores = q.transpose(0, 1).float() @ k.float().mT * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill_(~kept, torch.finfo(scores.dtype).min)
    if call.sinks is None:
        return scores.softmax(-1), scores.new_zeros(scores.shape[:2])
    logit = call.sinks[heads].to(scores).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    p = torch.cat((scores, logit), dim=-1).softmax(-1)
    return p[..., :-1], p[..., -1]
