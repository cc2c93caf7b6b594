"""The attention of a layer over all rows of a step: who walks pages with few queries, and who prefills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.decode import attend_decode
from kvfold.attention.pieces import LayerCall, StateWalk
from kvfold.attention.prefill import Past, attend_fresh, attend_prefill
from kvfold.attention.selected import Selected, attend_selected
from kvfold.kernels.merge import Piece, merge, with_sinks
from kvfold.kernels.registry import OpRegistry

__all__ = ["FewRows", "PrefillRows", "attend_rows"]


@dataclass(frozen=True, slots=True)
class FewRows:
    """Sequences with the same few new tokens each, ``queries``: ``rows`` of the step (None: all, in order).

    A single new token is read from its page, like everything before it; several attend each other beside the pages of
    the past. ``selected``: how single tokens read few pages of many; None: they read all.
    """

    rows: Tensor | None
    queries: int
    walks: tuple[StateWalk, ...]
    selected: Selected | None = None


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """One sequence with many new tokens: rows ``[first, end)`` of the step, at positions ``start ...``."""

    first: int
    end: int
    start: int
    past: tuple[Past, ...]


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_in_group: int,
    few: Sequence[FewRows],
    prefill: Sequence[PrefillRows],
    call: LayerCall,
    registry: OpRegistry,
) -> Tensor:
    """``q [N, Hq, D]`` over the pages and the fresh ``k, v [N, H, D]``: ``[N, Hq, Dv]`` in the dtype of ``q``."""
    parts: list[tuple[Tensor | slice, Tensor]] = []
    for each in few:
        out = _finish(_attend_few(q, k, v, layer_in_group, each, call, registry), call, q.dtype)
        if each.rows is None:
            return out
        parts.append((each.rows, out))
    for span in prefill:
        rows = slice(span.first, span.end)
        piece = attend_prefill(q[rows], k[rows], v[rows], span.start, layer_in_group, span.past, call, registry)
        parts.append((rows, _finish(piece, call, q.dtype)))
    out = q.new_empty((q.shape[0], *parts[0][1].shape[1:]))
    for where, part in parts:
        out[where] = part
    return out


def _attend_few(
    q: Tensor, k: Tensor, v: Tensor, layer_in_group: int, few: FewRows, call: LayerCall, registry: OpRegistry
) -> Piece:
    if few.rows is not None:
        q = q.index_select(0, few.rows)
    wide = call.latent.query(q) if call.latent is not None else q
    if few.selected is not None and layer_in_group >= few.selected.first_layer:
        return attend_selected(wide, layer_in_group, few.selected, few.walks, call, registry)
    # Without walks, retention has left nothing of any past.
    pieces = [attend_decode(wide, layer_in_group, few.walks, call, registry)] if few.walks else []
    if few.queries > 1:
        if few.rows is not None:
            k, v = k.index_select(0, few.rows), v.index_select(0, few.rows)
        pieces.append(attend_fresh(q, k, v, few.queries, call, registry))
    return merge(pieces)


def _finish(piece: Piece, call: LayerCall, dtype: torch.dtype) -> Tensor:
    return (piece if call.sinks is None else with_sinks(piece, call.sinks))[0].to(dtype)
