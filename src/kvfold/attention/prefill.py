"""Prefill: many queries of one sequence, over their own fresh keys and over the pages of the past."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.pieces import LayerCall, PagePiece, visible
from kvfold.kernels.dense import DenseCall
from kvfold.kernels.merge import Piece, merge
from kvfold.kernels.registry import OpRegistry

__all__ = ["QUERY_TILE", "SPAN_PAGES", "PastSpan", "attend_prefill"]

QUERY_TILE = 256
"""Queries that share a mask when a layer is local: bounds the mask to ``QUERY_TILE x (QUERY_TILE + window)``."""

SPAN_PAGES = 64
"""Pages of the past that are unpacked at a time: bounds the buffer, whatever the context."""


@dataclass(frozen=True, slots=True)
class PastSpan:
    """Some pages of a sequence's past, ``piece.addr [1, Hkv, P]``; ``valid`` of their ``P * S`` rows are in use.

    ``pos [P * S]``: the positions of the rows.
    """

    piece: PagePiece
    pos: Tensor
    valid: int


def attend_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    layer_in_group: int,
    past: Sequence[PastSpan],
    call: LayerCall,
    registry: OpRegistry,
) -> Piece:
    """Attention of ``q [T, Hq, D]`` at positions ``start ...`` over fresh ``k, v [T, H, D]`` and the pages of ``past``.

    Fresh keys are seen causally and as the layer made them (unquantized); ``H`` divides ``Hq``. Returns
    ``o [T, Hq, Dv]`` and ``lse [T, Hq]``, sinks not counted.
    """
    fresh = [_fresh_piece(q, k, v, start, tile, call, registry) for tile in _tiles(q.shape[0], start, call)]
    o = torch.cat([piece[0] for piece in fresh]) if len(fresh) > 1 else fresh[0][0]
    lse = torch.cat([piece[1] for piece in fresh]) if len(fresh) > 1 else fresh[0][1]
    pieces = [(o, lse)]
    if past:
        wide = call.latent.query(q) if call.latent is not None else q
        pieces += [_past_piece(wide, start, layer_in_group, span, call, registry) for span in past]
    return merge(pieces)


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


def _fresh_piece(
    q: Tensor, k: Tensor, v: Tensor, start: int, tile: _Tile, call: LayerCall, registry: OpRegistry
) -> Piece:
    group = q.shape[1] // k.shape[1]
    rows = q[tile.first : tile.end].transpose(0, 1).unsqueeze(0)
    keys, values = (
        x[tile.first_key : tile.end].repeat_interleave(group, dim=1).transpose(0, 1).unsqueeze(0) for x in (k, v)
    )
    bias = None
    if tile.masked:
        positions = torch.arange(start + tile.first_key, start + tile.end, device=q.device)
        bias = _bias(visible(positions[tile.first - tile.first_key :], positions, call), q.dtype)
    dense = DenseCall(
        q=rows, k=keys, v=values, scale=call.scale, causal=not tile.masked, bias=bias, softcap=call.softcap
    )
    o, lse = registry.select("attend_dense", dense).run(dense)
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)


def _past_piece(
    q: Tensor, start: int, layer_in_group: int, span: PastSpan, call: LayerCall, registry: OpRegistry
) -> Piece:
    count, q_heads = q.shape[:2]
    kv_heads = span.piece.addr.shape[1]
    group = q_heads // kv_heads
    q = q.to(span.piece.store.read_dtype)
    rows = span.piece.rotate_query(q, layer_in_group, call.latent).reshape(count, kv_heads, group, -1)
    rows = rows.permute(1, 2, 0, 3).reshape(1, kv_heads, group * count, -1)
    k, v = (x[:, :, : span.valid] for x in span.piece.read(layer_in_group, call.latent))
    bias = None
    if call.local:
        positions = torch.arange(start, start + count, device=q.device)
        seen = visible(positions, span.pos[: span.valid], call)
        bias = _bias(seen.repeat(group, 1), q.dtype)
    dense = DenseCall(q=rows, k=k, v=v, scale=call.scale, bias=bias, softcap=call.softcap)
    o, lse = registry.select("attend_dense", dense).run(dense)
    o = o.reshape(q_heads, count, -1).transpose(0, 1)
    lse = lse.reshape(q_heads, count).transpose(0, 1)
    if (offset := span.piece.offset(q, layer_in_group, call.latent)) is not None:
        lse = lse + call.scale * offset
    return span.piece.unrotate_output(o, layer_in_group, call.latent), lse


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive ``[1, 1, T, S]`` from bool ``[T, S]``; finite, so that a row that sees nothing stays finite."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
