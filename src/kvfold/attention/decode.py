"""Decode: one query per sequence, over pages, vectorised over the batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvfold.attention.merge import Piece, merge
from kvfold.attention.pieces import LayerCall, PagePiece
from kvfold.kernels.dense import DenseCall
from kvfold.kernels.registry import OpRegistry

__all__ = ["attend_decode"]


def attend_decode(
    q: Tensor, layer_in_group: int, pieces: Sequence[PagePiece], call: LayerCall, registry: OpRegistry
) -> Piece:
    """Attention of ``q [n, Hq, D]`` (latent: ``[n, Hq, rank + rope]``) over the pages of ``pieces``.

    The query heads that share a KV head are packed into rows, so that keys are read once for the whole group and never
    repeated. Only one piece of one layer is unpacked at a time. Returns ``o [n, Hq, Dv]`` and ``lse [n, Hq]``, sinks
    not counted.
    """
    n, q_heads = q.shape[0], q.shape[1]
    results: list[Piece] = []
    for piece in pieces:
        kv_heads = piece.addr.shape[1]
        rows = piece.rotate_query(q, call.latent).reshape(n, kv_heads, q_heads // kv_heads, -1)
        k, v = piece.read(layer_in_group, call.latent)
        dense = DenseCall(q=rows, k=k, v=v, scale=call.scale, bias=piece.bias, softcap=call.softcap)
        o, lse = registry.select("attend_dense", dense).run(dense)
        o = piece.unrotate_output(o.reshape(n, q_heads, -1), call.latent)
        results.append((o, lse.reshape(n, q_heads)))
    return merge(results)
