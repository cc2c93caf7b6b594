"""What one attention reads: pages of one state (raw or packed), for some sequences, and what a layer asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvfold.attention.latent import LatentProjection
from kvfold.codecs.pages import PageStore

__all__ = ["AttendedKind", "LayerCall", "PagePiece", "StateWalk", "rotate_query", "unrotate", "visible"]

AttendedKind = Literal["full", "sliding", "chunked", "latent"]
"""Kinds of layers that attend; see :data:`kvfold.geometry.LayerKind`."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What a layer asks for beside its tensors.

    ``window``: tokens of a sliding window, or of a chunk when ``kind`` is ``"chunked"``. ``sinks [Hq]``: learned sink
    logits. ``latent``: the projections of a latent (MLA) layer, whose pages are attended in absorbed form.
    """

    scale: float
    kind: AttendedKind = "full"
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    latent: LatentProjection | None = None

    @property
    def local(self) -> bool:
        """Whether a query sees only some of the positions before it."""
        return self.window is not None


def visible(q_pos: Tensor, k_pos: Tensor, call: LayerCall) -> Tensor:
    """Which keys each query may see: bool ``[..., T, S]`` from positions ``[..., T]`` and ``[..., S]``."""
    q_pos, k_pos = q_pos.unsqueeze(-1), k_pos.unsqueeze(-2)
    seen = k_pos <= q_pos
    if call.window is not None:
        if call.kind == "chunked":
            seen &= k_pos >= q_pos - q_pos % call.window
        else:
            seen &= k_pos > q_pos - call.window
    return seen


@dataclass(frozen=True, slots=True)
class PagePiece:
    """Page lists of one state: ``addr [n, Hkv, P]`` holds the pages' byte addresses in the group's first layer.

    ``layer_bytes`` leads from a layer's page to the same page of the next layer. Queries come list by list, as many for
    one list as for the other: ``rows [m]`` are their places among the queries of the step (None: all, in order).
    ``bias [n, P * S]`` (additive, float32) hides what no query of a list may see; None when all of it is visible.
    ``layered``: lists and biases differ by layer and head: ``addr [L, n, Hkv, P]``, ``bias [L, n, Hkv, P * S]``.
    ``ragged``: some lists end early, with -1.
    """

    store: PageStore
    addr: Tensor
    layer_bytes: int
    bias: Tensor | None = None
    rows: Tensor | None = None
    layered: bool = False
    ragged: bool = False

    @property
    def lists(self) -> int:
        """Page lists, ``n``."""
        return int(self.addr.shape[-3])

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return int(self.addr.shape[-2])

    def of_layer(self, layer_in_group: int) -> tuple[Tensor, int, Tensor | None]:
        """A layer's lists ``[n, Hkv, P]``, what is to be added to each address, and their biases."""
        if not self.layered:
            return self.addr, layer_in_group * self.layer_bytes, self.bias
        return self.addr[layer_in_group], 0, None if self.bias is None else self.bias[layer_in_group]

    def read(
        self, layer_in_group: int, latent: LatentProjection | None, pages: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, Hkv, P * S, D]`` of a range of the pages, in their rotated basis; in the place of pages
        that are not there, those of some other.

        Latent pages come as one wide key (latent ⊕ rotary part); the same tensor serves as value, its prefix being the
        latent.
        """
        addr, shift, _ = self.of_layer(layer_in_group)
        if self.ragged:
            addr = addr.where(addr >= 0, self.addr.max())
        addr = addr[..., pages] + shift
        k, v = self.store.read_k(addr), self.store.read_v(addr)
        if latent is not None:
            wide = torch.cat((k, v), dim=-1)
            return wide, wide
        return k, v


@dataclass(frozen=True, slots=True)
class StateWalk:
    """All pages of one state that the queries of a step read.

    ``own``: each sequence's own list of pages, every sequence in at most one piece. ``shared``: prefixes of several
    sequences, one list for all their queries, without any mask (:mod:`kvfold.attention.cascade`). ``kept``: what
    retention has left of earlier pages (:mod:`kvfold.attention.kept`).
    """

    store: PageStore
    own: tuple[PagePiece, ...]
    shared: tuple[PagePiece, ...] = ()
    kept: tuple[PagePiece, ...] = ()


def rotate_query(store: PageStore, q: Tensor, layer_in_group: int, latent: LatentProjection | None) -> Tensor:
    """``q [..., Hq, D]`` taken to the basis of the stored keys: one small product instead of one for each key."""
    if latent is not None:
        head, tail = q.split((latent.rank, latent.rope), dim=-1)
        parts = (store.k_basis.query(head, layer_in_group), store.v_basis.query(tail, layer_in_group))
        return torch.cat(parts, dim=-1)
    return store.k_basis.query(q, layer_in_group)


def unrotate(
    store: PageStore, q: Tensor, o: Tensor, lse: Tensor, layer_in_group: int, call: LayerCall
) -> tuple[Tensor, Tensor]:
    """Output ``[..., Hq, Dv]`` over stored pages taken back from the basis of the stored values (of latents: expanded
    to value heads), and its log-sum-exp with what the products with the stored keys all lack of the scores of ``q``.
    """
    if call.latent is not None:
        return call.latent.output(store.k_basis.output(o[..., : call.latent.rank], layer_in_group)), lse
    offset = store.k_basis.offset(q, layer_in_group)
    if offset is not None:
        lse = lse + call.scale * offset
    return store.v_basis.output(o, layer_in_group), lse
