"""Decode: one query per sequence, over pages, vectorised over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from kvfold.attention.pieces import LayerCall, PagePiece
from kvfold.kernels.merge import Piece, merge
from kvfold.kernels.pages import PagesCall
from kvfold.kernels.registry import OpRegistry

__all__ = ["attend_decode"]


def attend_decode(
    q: Tensor, layer_in_group: int, pieces: Sequence[PagePiece], call: LayerCall, registry: OpRegistry
) -> Piece:
    """Attention of ``q [n, Hq, D]`` (latent: ``[n, Hq, rank + rope]``) over the pages of ``pieces``.

    The query heads that share a KV head are packed into rows, so that keys are read once for the whole group and never
    repeated. Which kernel walks the pages, ``registry`` decides; one that unpacks them unpacks a piece of a layer at a
    time. Returns ``o [n, Hq, Dv]`` and ``lse [n, Hq]``, float32, sinks not counted.
    """
    n, q_heads = q.shape[0], q.shape[1]
    results: list[Piece] = []
    wide = q.float()  # rotations and the merge are small: in float32 they are exact enough, and faster than in bfloat16
    for piece in pieces:
        kv_heads = piece.addr.shape[1]
        rows = piece.rotate_query(wide, layer_in_group, call.latent).reshape(n, kv_heads, q_heads // kv_heads, -1)
        pages = PagesCall(
            q=rows,
            arena=piece.store.arena,
            addr=piece.addr,
            shift=layer_in_group * piece.layer_bytes,
            fmt=piece.store.fmt,
            dtype=piece.store.read_dtype,
            scale=call.scale,
            read=partial(piece.read, layer_in_group, call.latent),
            bias=piece.bias,
            softcap=call.softcap,
            latent=call.latent is not None,
        )
        o, lse = registry.select("attend_pages", pages).run(pages)
        o = piece.unrotate_output(o.reshape(n, q_heads, -1), layer_in_group, call.latent)
        lse = lse.reshape(n, q_heads)
        if (offset := piece.offset(wide, layer_in_group, call.latent)) is not None:
            lse = lse + call.scale * offset
        results.append((o, lse))
    return merge(results)
