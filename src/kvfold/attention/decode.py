"""Few queries per sequence over its pages, vectorised over the batch: a decode step is one query for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kvfold.attention.pieces import LayerCall, PagePiece, StateWalk, rotate_query, unrotate
from kvfold.kernels.merge import Piece, merge
from kvfold.kernels.pages import HIDDEN, PagesCall
from kvfold.kernels.registry import OpRegistry

__all__ = ["attend_decode", "attend_piece"]


def attend_decode(
    q: Tensor, layer_in_group: int, walks: Sequence[StateWalk], call: LayerCall, registry: OpRegistry
) -> Piece:
    """Attention of ``q [m, Hq, D]`` (latent: ``[m, Hq, rank + rope]``) over the pages of ``walks``.

    The query heads that share a KV head, and the queries that share a list of pages, are packed into rows, so that keys
    are read once for all of them and never repeated. Which kernel walks the pages, ``registry`` decides; one that
    unpacks them unpacks a piece of a layer at a time. Returns ``o [m, Hq, Dv]`` and ``lse [m, Hq]``, float32, sinks not
    counted.
    """
    # Rotations and the merge are small: in float32 they are exact enough, and faster than in bfloat16.
    wide = q.to(torch.float32, memory_format=torch.contiguous_format)
    results = []
    for walk in walks:
        rotated = rotate_query(walk.store, wide, layer_in_group, call.latent)
        o, lse = _attend_state(rotated, layer_in_group, walk, call, registry)
        results.append(unrotate(walk.store, wide, o, lse, layer_in_group, call))
    return merge(results)


def _attend_state(q: Tensor, layer_in_group: int, walk: StateWalk, call: LayerCall, registry: OpRegistry) -> Piece:
    """Rotated queries over all pages of a state; what has no page there is left with nothing seen."""
    total: Piece | None = None
    for piece in walk.own:
        found = attend_piece(q, layer_in_group, piece, call, registry)
        if piece.rows is None:
            total = found
        else:
            total = _put(total or _nothing_seen(q, found), piece.rows, found)
    for piece in (*walk.shared, *walk.kept):
        found = attend_piece(q, layer_in_group, piece, call, registry)
        if piece.rows is None:
            total = found if total is None else merge([total, found])
        else:
            total = total or _nothing_seen(q, found)
            before = (total[0].index_select(0, piece.rows), total[1].index_select(0, piece.rows))
            total = _put(total, piece.rows, merge([before, found]))
    if total is None:
        raise RuntimeError("a state without pages has no walk")
    return total


def _nothing_seen(q: Tensor, like: Piece) -> Piece:
    o, lse = like
    return o.new_zeros((q.shape[0], *o.shape[1:])), lse.new_full(q.shape[:2], HIDDEN)


def _put(total: Piece, rows: Tensor, part: Piece) -> Piece:
    return total[0].index_copy_(0, rows, part[0]), total[1].index_copy_(0, rows, part[1])


def attend_piece(q: Tensor, layer_in_group: int, piece: PagePiece, call: LayerCall, registry: OpRegistry) -> Piece:
    """The queries of a piece, of all (rotated) queries ``q [m, Hq, D]``, over its pages: ``o [n, Hq, Dv]`` in the basis
    of the stored values, ``lse [n, Hq]``.
    """
    if piece.rows is not None:
        q = q.index_select(0, piece.rows)
    (count, q_heads, dim), lists, kv_heads = q.shape, piece.lists, piece.kv_heads
    group, queries = q_heads // kv_heads, count // lists
    if queries > 1:
        q = q.view(lists, queries, kv_heads, group, dim).transpose(1, 2)
    addr, shift, bias = piece.of_layer(layer_in_group)
    read = partial(piece.read, layer_in_group, call.latent)
    if piece.ragged or (piece.layered and bias is not None):  # then every head is a list with a length and biases
        addr, bias = addr.flatten(0, 1).unsqueeze(1), None if bias is None else bias.flatten(0, 1)
        read = partial(_read_heads, piece, layer_in_group, call)
    pages = PagesCall(
        q=q.reshape(*addr.shape[:2], queries * group, dim),
        arena=piece.store.arena,
        addr=addr,
        shift=shift,
        fmt=piece.store.fmt,
        dtype=piece.store.read_dtype,
        scale=call.scale,
        read=read,
        bias=bias,
        softcap=call.softcap,
        latent=call.latent is not None,
        ragged=piece.ragged,
    )
    learns = q.requires_grad and torch.is_grad_enabled()
    # What a kernel can take hangs on these, and is the same in every layer and step.
    alike = (piece.store, queries * group, bias is None, piece.ragged, call.softcap, call.latent is None, learns)
    o, lse = registry.select("attend_pages", pages, alike).run(pages)
    if queries > 1:
        o = o.view(lists, kv_heads, queries, group, -1).transpose(1, 2)
        lse = lse.view(lists, kv_heads, queries, group).transpose(1, 2)
    return o.reshape(count, q_heads, -1), lse.reshape(count, q_heads)


def _read_heads(piece: PagePiece, layer_in_group: int, call: LayerCall, pages: slice) -> tuple[Tensor, Tensor]:
    """Keys and values of a piece, every head's a list of its own: ``[n * Hkv, 1, P * S, D]``."""
    k, v = piece.read(layer_in_group, call.latent, pages)
    return k.flatten(0, 1).unsqueeze(1), v.flatten(0, 1).unsqueeze(1)
