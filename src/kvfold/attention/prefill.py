"""Prefill: many queries of one sequence, over their own fresh keys and over the pages of the past."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.pieces import LayerCall, PagePiece, rotate_query, unrotate, visible
from kvfold.codecs.pages import PageStore
from kvfold.kernels.dense import DenseCall
from kvfold.kernels.merge import Piece, merge
from kvfold.kernels.registry import OpRegistry

__all__ = ["FEW_TOKENS", "QUERY_TILE", "SPAN_PAGES", "Past", "PastSpan", "attend_fresh", "attend_prefill"]

FEW_TOKENS = 16
"""Up to so many new tokens of a sequence walk the pages of its past as they lie; more are worth unpacking it for."""

QUERY_TILE = 256
"""Queries that share a mask when a layer is local: bounds the mask to ``QUERY_TILE x (QUERY_TILE + window)``."""

SPAN_PAGES = 128
"""Pages of the past that are unpacked at a time: bounds the buffer, whatever the context."""


@dataclass(frozen=True, slots=True)
class PastSpan:
    """Some pages of a sequence's past, ``piece.addr [1, Hkv, P]``; ``valid`` of their ``P * S`` rows are in use.

    ``pos [P * S]``: the positions of the rows.
    """

    piece: PagePiece
    pos: Tensor
    valid: int


@dataclass(frozen=True, slots=True)
class Past:
    """A sequence's past in one state."""

    store: PageStore
    spans: tuple[PastSpan, ...]


def attend_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    layer_in_group: int,
    past: Sequence[Past],
    call: LayerCall,
    registry: OpRegistry,
) -> Piece:
    """Attention of ``q [T, Hq, D]`` at positions ``start ...`` over fresh ``k, v [T, H, D]`` and the pages of ``past``.

    Fresh keys are seen causally and as the layer made them (unquantized); ``H`` divides ``Hq``. No mask is made where a
    layer has no window. Returns ``o [T, Hq, Dv]`` and ``lse [T, Hq]``, sinks not counted.
    """
    fresh = [_attend_tile(q, k, v, start, tile, call, registry) for tile in _tiles(q.shape[0], start, call)]
    pieces = [fresh[0] if len(fresh) == 1 else (torch.cat([o for o, _ in fresh]), torch.cat([lse for _, lse in fresh]))]
    if past:
        wide = call.latent.query(q) if call.latent is not None else q
        pieces += [_attend_past(wide, start, layer_in_group, state, call, registry) for state in past]
    return merge(pieces)


def attend_fresh(q: Tensor, k: Tensor, v: Tensor, queries: int, call: LayerCall, registry: OpRegistry) -> Piece:
    """Causal attention of sequences with ``queries`` new tokens each among those, by themselves: ``q [m, Hq, D]``,
    ``k, v [m, H, D]``, sequence by sequence. Results as from :func:`attend_prefill`.
    """
    q, k, v = (x.unflatten(0, (-1, queries)) for x in (q, k, v))
    o, lse = _dense(q, k, v, None, call, registry)
    return o.flatten(0, 1), lse.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries ``[first, end)`` against fresh keys ``[first_key, end)``; ``masked``: some of those keys are hidden by a
    window.
    """

    first: int
    end: int
    first_key: int
    masked: bool


def _tiles(count: int, start: int, call: LayerCall) -> Iterator[_Tile]:
    """Tiles that cover ``count`` fresh tokens; one causal tile if a window hides nothing of them."""
    window = call.window
    if window is None or (start % window + count if call.kind == "chunked" else count) <= window:
        yield _Tile(0, count, 0, masked=False)
        return
    for a in range(0, count, QUERY_TILE):
        first_key = (start + a) // window * window - start if call.kind == "chunked" else a - window + 1
        yield _Tile(a, min(a + QUERY_TILE, count), max(0, first_key), masked=True)


def _attend_tile(
    q: Tensor, k: Tensor, v: Tensor, start: int, tile: _Tile, call: LayerCall, registry: OpRegistry
) -> Piece:
    bias = None
    if tile.masked:
        positions = torch.arange(start + tile.first_key, start + tile.end, device=q.device)
        bias = _bias(visible(positions[tile.first - tile.first_key :], positions, call), q.dtype)
    rows, keys = slice(tile.first, tile.end), slice(tile.first_key, tile.end)
    o, lse = _dense(q[None, rows], k[None, keys], v[None, keys], bias, call, registry)
    return o[0], lse[0]


def _dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: LayerCall, registry: OpRegistry) -> Piece:
    """``q [n, T, Hq, D]`` over ``k, v [n, S, H, D]``, causally where there is no ``bias``: ``o [n, T, Hq, Dv]``,
    ``lse [n, T, Hq]``.

    The query heads of a KV head lie along the batch, where their keys are repeated without a copy if ``n`` is 1.
    """
    group = q.shape[2] // k.shape[2]
    rows = q.unflatten(2, (-1, group)).permute(0, 3, 2, 1, 4).flatten(0, 1)
    keys, values = (x.transpose(1, 2).unsqueeze(1).expand(-1, group, -1, -1, -1).flatten(0, 1) for x in (k, v))
    dense = DenseCall(q=rows, k=keys, v=values, scale=call.scale, causal=bias is None, bias=bias, softcap=call.softcap)
    o, lse = registry.select("attend_dense", dense).run(dense)
    # [n * G, H, T, Dv] -> [n, T, H * G, Dv]
    o, lse = o.unflatten(0, (-1, group)), lse.unflatten(0, (-1, group))
    return o.permute(0, 3, 2, 1, 4).flatten(2, 3), lse.permute(0, 3, 2, 1).flatten(2, 3)


def _attend_past(
    q: Tensor, start: int, layer_in_group: int, past: Past, call: LayerCall, registry: OpRegistry
) -> Piece:
    """All spans of a state: its queries are rotated once, and its output once back."""
    count, q_heads = q.shape[:2]
    kv_heads = past.spans[0].piece.kv_heads
    group = q_heads // kv_heads
    q = q.to(past.store.read_dtype)
    # One KV head's queries as rows of one matrix, so that its keys are neither repeated nor read for every head.
    rows = rotate_query(past.store, q, layer_in_group, call.latent).unflatten(1, (kv_heads, group))
    rows = rows.permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)
    total: Piece | None = None
    for span in past.spans:
        k, v = (x[:, :, : span.valid] for x in span.piece.read(layer_in_group, call.latent))
        bias = None
        if span.piece.layered:
            bias = _kept_bias(span.piece, layer_in_group)
        elif call.local:
            positions = torch.arange(start, start + count, device=q.device)
            bias = _bias(visible(positions, span.pos[: span.valid], call).repeat(group, 1), q.dtype)
        dense = DenseCall(q=rows, k=k, v=v, scale=call.scale, bias=bias, softcap=call.softcap)
        o, lse = registry.select("attend_dense", dense).run(dense)
        total = (o.float(), lse) if total is None else merge([total, (o, lse)])
    if total is None:
        raise RuntimeError("a state without pages has no past")
    o, lse = (x.reshape(q_heads, count, *x.shape[3:]).transpose(0, 1) for x in total)
    return unrotate(past.store, q, o, lse, layer_in_group, call)


def _kept_bias(piece: PagePiece, layer_in_group: int) -> Tensor | None:
    """Additive ``[1, Hkv, 1, S]``, float32, for the tokens that retention kept: their own biases, and what hides
    padding.
    """
    addr, _, bias = piece.of_layer(layer_in_group)
    if bias is None and not piece.ragged:
        return None
    size = piece.store.fmt.block_size
    bias = torch.zeros(1, device=addr.device) if bias is None else bias
    gone = (addr < 0).repeat_interleave(size, dim=-1)
    return bias.masked_fill(gone, torch.finfo(bias.dtype).min)[:, :, None]


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive ``[1, 1, T, S]`` from bool ``[T, S]``; finite, so that a row that sees nothing stays finite."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
