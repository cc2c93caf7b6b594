"""The truth: attention in plain torch and float32, slow wherever slow is plain. Every kernel is tested on it."""

from __future__ import annotations

import math
from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor

__all__ = ["Rules", "attend", "best_pages", "gather_pages", "page_bounds", "paged_attend", "visible"]


class Rules(TypedDict, total=False):
    """What `paged_attend` passes on to `attend`: see there."""

    scale: Required[float]
    causal: bool
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: Tensor | None


def visible(
    q_pos: Tensor, k_pos: Tensor, *, causal: bool, window: int | None = None, chunk: int | None = None
) -> Tensor:
    """Which keys each query may see: bool ``[T, S]`` from positions ``q_pos [T]`` and ``k_pos [S]``.

    ``causal``: ``k_pos <= q_pos``; ``window``: ``k_pos > q_pos - window``; ``chunk``: both in the same run of ``chunk``
    positions. Conditions that are given all hold.
    """
    rows, columns = q_pos[:, None], k_pos[None, :]
    seen = torch.ones(q_pos.shape[0], k_pos.shape[0], dtype=torch.bool, device=q_pos.device)
    if causal:
        seen &= columns <= rows
    if window is not None:
        seen &= columns > rows - window
    if chunk is not None:
        seen &= torch.div(columns, chunk, rounding_mode="floor") == torch.div(rows, chunk, rounding_mode="floor")
    return seen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [T, Hq, D]`` over ``k [S, Hkv, D]``, ``v [S, Hkv, Dv]``: ``(o [T, Hq, Dv], lse [T, Hq])``.

    Query head ``h`` reads KV head ``h // (Hq / Hkv)``. Positions ``q_pos [T]``, ``k_pos [S]`` decide what is seen
    (`visible`); the order of the keys does not matter. Scores are ``scale * q.k``, then
    ``softcap * tanh(. / softcap)``, then ``bias [S]`` is added. ``sinks [Hq]``: a logit per head that takes probability
    and has no value; the log-sum-exp counts it. Both results are float32.

    A query that sees no key gets ``o = 0``, and ``lse`` minus infinity (its sink logit, if there is one). What a query
    does not see cannot reach it, whatever it holds, NaN included.
    """
    seen = visible(q_pos, k_pos, causal=causal, window=window, chunk=chunk)
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    used = seen.any(0)
    seen, k, v = seen[:, used], k[used].float(), v[used].float()
    rows = q.float().view(q.shape[0], heads, group, -1)
    scores = torch.einsum("thgd,shd->thgs", rows, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias[used].float()
    scores = scores.masked_fill(~seen[:, None, None, :], -math.inf)
    if sinks is not None:
        column = sinks.float().view(1, heads, group, 1).expand(q.shape[0], -1, -1, 1)
        scores = torch.cat((scores, column), dim=-1)
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else rows.new_full(rows.shape[:-1], -math.inf)
    # A query that sees nothing has lse = -inf: it takes 0 instead, so that its weights are exp(-inf) = 0 and not NaN.
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))[..., : k.shape[0]]
    return _weigh(weights, v, seen).flatten(1, 2), lse.flatten(1, 2)


def _weigh(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """``weights [T, H, G, S] @ v [S, H, Dv]``; a value that is not finite reaches only the queries that see it."""
    bad = ~v.isfinite().flatten(1).all(1)
    out = torch.einsum("thgs,shd->thgd", weights, v.masked_fill(bad[:, None, None], 0.0))
    for key in bad.nonzero()[:, 0].tolist():
        reaches = weights[..., key, None] * v[key][None, :, None, :]
        out = out + torch.where(seen[:, key, None, None, None], reaches, 0.0)
    return out


def gather_pages(pages: Tensor, table: Tensor) -> Tensor:
    """Rows ``[P * S, H, D]`` of the pages ``[N, S, D]`` that ``table [H, P]`` (page numbers) names for each head."""
    picked = pages[table]
    return picked.flatten(1, 2).transpose(0, 1)


def paged_attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    table: Tensor,
    block_index: Tensor,
    length: int,
    q_pos: Tensor,
    bias: Tensor | None = None,
    **rules: Unpack[Rules],
) -> tuple[Tensor, Tensor]:
    """`attend` over pages ``k_pages [N, S, D]``, ``v_pages [N, S, Dv]``, each one KV head's share of a block.

    ``table [Hkv, P]`` names each head's pages; page column ``p`` holds the positions from ``block_index[p] * S`` on, of
    which those below ``length`` are in use. ``bias [P, S]`` is per token. Everything else is as in `attend`.
    """
    size = k_pages.shape[1]
    k_pos = (block_index[:, None] * size + torch.arange(size, device=block_index.device)).flatten()
    in_use = k_pos < length
    k, v = (gather_pages(pages, table)[in_use] for pages in (k_pages, v_pages))
    bias = None if bias is None else bias.flatten()[in_use]
    return attend(q, k, v, q_pos=q_pos, k_pos=k_pos[in_use], bias=bias, **rules)


def page_bounds(q: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """What ``q [..., G, D]`` give any key between ``least`` and ``greatest [..., P, D]`` at most, the greatest of the
    ``G``: ``[..., P]``.
    """
    rows = q.float().unsqueeze(-3)
    ends = (rows * x.float().unsqueeze(-2) for x in (least, greatest))
    return torch.maximum(*ends).sum(-1).amax(-1)


def best_pages(bounds: Tensor, count: int) -> Tensor:
    """The places of the ``count`` greatest of ``bounds [P]``, rising; of equal ones the first."""
    order = sorted(range(bounds.numel()), key=lambda i: (-float(bounds[i]), i))
    return torch.tensor(sorted(order[:count]), dtype=torch.int64)
