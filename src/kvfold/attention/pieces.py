"""What one attention reads: pages of one state (raw or packed), for some sequences, and what a layer asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvfold.attention.latent import LatentProjection
from kvfold.codecs.pages import PageStore

__all__ = ["AttendedKind", "LayerCall", "PagePiece", "visible"]

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
    """Pages of one state for ``n`` sequences: ``addr [n, Hkv, P]`` holds their byte addresses in the group's first
    layer.

    ``layer_bytes`` leads from a layer's page to the same page of the next layer. ``bias [n, P * S]`` (additive,
    float32) hides what a sequence's query may not see; None when all of it is visible.
    """

    store: PageStore
    addr: Tensor
    layer_bytes: int
    bias: Tensor | None = None

    def read(
        self, layer_in_group: int, latent: LatentProjection | None, pages: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, Hkv, P * S, D]`` of a range of the pages, in their rotated basis.

        Latent pages come as one wide key (latent ⊕ rotary part); the same tensor serves as value, its prefix being the
        latent.
        """
        addr = self.addr[..., pages] + layer_in_group * self.layer_bytes
        k, v = self.store.read_k(addr), self.store.read_v(addr)
        if latent is not None:
            wide = torch.cat((k, v), dim=-1)
            return wide, wide
        return k, v

    def rotate_query(self, q: Tensor, layer_in_group: int, latent: LatentProjection | None) -> Tensor:
        """``q [..., Hq, D]`` taken to the basis of the stored keys: one small product instead of one for each key."""
        keys, values = self.store.k_basis, self.store.v_basis
        if latent is not None:
            head, tail = q.split((latent.rank, latent.rope), dim=-1)
            return torch.cat((keys.query(head, layer_in_group), values.query(tail, layer_in_group)), dim=-1)
        return keys.query(q, layer_in_group)

    def offset(self, q: Tensor, layer_in_group: int, latent: LatentProjection | None) -> Tensor | None:
        """What the products with the stored keys all lack of the scores of ``q``, ``[..., Hq]``; None: nothing."""
        return None if latent is not None else self.store.k_basis.offset(q, layer_in_group)

    def unrotate_output(self, o: Tensor, layer_in_group: int, latent: LatentProjection | None) -> Tensor:
        """Output ``[..., Hq, Dv]`` taken back from the basis of the stored values (for latents, expanded to value
        heads).
        """
        if latent is not None:
            return latent.output(self.store.k_basis.output(o[..., : latent.rank], layer_in_group))
        return self.store.v_basis.output(o, layer_in_group)
