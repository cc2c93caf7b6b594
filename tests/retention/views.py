"""A view of a layer over real pages, from dense tensors; and attention as a formula says it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvfold.codecs.pages import PageStore
from kvfold.formats import PageFormat, VectorFormat
from kvfold.retention.method import Notes, RetentionMethod, Seen
from kvfold.retention.view import LayerFacts, LayerView, PagePart

__all__ = ["attention", "layer_view", "normal", "watched"]

SIZE = 8
"""Tokens of a page."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_view(
    k: Tensor,
    v: Tensor,
    *,
    module: nn.Module | None = None,
    scale: float = 0.25,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    candidates: slice | None = None,
    fresh: int = 0,
    shown: Tensor | None = None,
    latent: bool = False,
) -> LayerView:
    """A view of ``k [H, N, D]``, ``v [H, N, Dv]``, of which the last ``fresh`` are in no page yet; what no page holds
    is NaN.
    """
    heads, count = k.shape[0], k.shape[1] - fresh
    facts = LayerFacts(module or nn.Identity(), scale, softcap, sinks)
    given = tuple(x[:, count:].transpose(0, 1) for x in (k, v)) if fresh else None
    part = _part(k[:, :count], v[:, :count], heads, shown) if not latent else _latent(k[:, :count], v)
    return LayerView(0, 0, lambda: [part], facts, candidates or slice(0, k.shape[1]), given, latent=latent)


def _part(k: Tensor, v: Tensor, heads: int, shown: Tensor | None) -> PagePart:
    pages = -(-k.shape[1] // SIZE)
    fmt = PageFormat(SIZE, VectorFormat.raw(k.shape[2], 4), VectorFormat.raw(v.shape[2], 4))
    arena = torch.full((max(1, pages) * heads * fmt.page_bytes,), 255, dtype=torch.uint8)
    store = PageStore(arena, fmt, torch.float32, heads=heads)
    number = torch.randperm(pages * heads, generator=torch.Generator().manual_seed(1)).view(heads, pages)
    addr = number * fmt.page_bytes
    padded = [nn.functional.pad(x, (0, 0, 0, pages * SIZE - x.shape[1]), value=torch.nan) for x in (k, v)]
    in_pages = [x.unflatten(1, (pages, SIZE)).transpose(0, 1).flatten(0, 1).contiguous() for x in padded]
    if pages:
        store.write_pages(addr.T.reshape(-1).contiguous(), *in_pages)
    return PagePart(store, addr, k.shape[1], shown)


def _latent(k: Tensor, v: Tensor) -> PagePart:
    """Latent pages hold the latent as key, the rotary part as value."""
    rank = v.shape[2]
    return _part(k[..., :rank], k[..., rank:], 1, None)


def watched(method: RetentionMethod, q: Tensor, k: Tensor, v: Tensor, counts: list[int], **facts: object) -> Notes:
    """The notes of a method that has seen ``q [N, Hq, D]``, ``k, v [H, N, D]`` in forwards of so many tokens."""
    notes, start = Notes(), 0
    for count in counts:
        stop = start + count
        view = layer_view(k[:, :stop], v[:, :stop], fresh=count, **facts)
        rows = slice(start, stop)
        method.observe(Seen(view, q[rows], k[:, rows].transpose(0, 1), v[:, rows].transpose(0, 1)), notes)
        start = stop
    return notes


def attention(
    q: Tensor, k: Tensor, *, scale: float = 0.25, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention weights ``[H, G, N, N]`` of ``q [N, Hq, D]`` on ``k [H, N, D]``, one query at a time."""
    count, group = q.shape[0], q.shape[1] // k.shape[0]
    weights = torch.zeros(k.shape[0], group, count, count)
    for head in range(k.shape[0]):
        for member in range(group):
            for row in range(count):
                logits = scale * k[head, : row + 1] @ q[row, head * group + member]
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                size = logits.exp().sum()
                if sinks is not None:
                    size = size + sinks[head * group + member].exp()
                weights[head, member, row, : row + 1] = logits.exp() / size
    return weights
