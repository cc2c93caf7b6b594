"""Few pages of many: sequences with one new token each read what a method chooses of their older pages.

What a step always reads (sinks, recent tokens, everything of sequences with few pages) is walked as ever. The other
pages are candidates: a method sees their bounds, has some of them attended, and its answer is merged with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from kvfold.attention.decode import attend_decode, attend_piece
from kvfold.attention.pieces import LayerCall, PagePiece, StateWalk, rotate_query, unrotate
from kvfold.codecs.pages import PageStore
from kvfold.codecs.summaries import read_summaries
from kvfold.kernels.bounds import BoundsCall
from kvfold.kernels.merge import Piece, merge
from kvfold.kernels.registry import OpRegistry

__all__ = ["Candidates", "PagesView", "RetrievalAudit", "Selected", "attend_selected"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pages that some sequences of a step may leave unread: ``addr [n, Hkv, P]``, byte addresses in the group's first
    layer, -1 where there is none; ``layered``: ``[L, n, Hkv, P]``, for lists that differ by layer and head.

    ``layer_bytes`` leads from a layer's page to the next layer's. ``rows [n]``: the sequences' places among the queries
    of the step (None: all, in order); ``positions [n]``: those of their new tokens. ``bias [L, n, Hkv, P * S]`` is
    added to the scores of layered pages. Lists that are not layered are longer than what the method reads at least.
    """

    store: PageStore
    addr: Tensor
    layer_bytes: int
    rows: Tensor | None
    positions: Tensor
    layered: bool = False
    bias: Tensor | None = None


class PagesView:
    """Candidate pages of ``n`` sequences in one layer, and the queries that may read them, as a method sees them.

    ``rest``: what the sequences have attended to already, ``(o [n, Hq, Dv], lse [n, Hq])``. Methods name pages by their
    places in the lists; -1 stands for no page.
    """

    def __init__(
        self, pages: Candidates, q: Tensor, rest: Piece, layer_in_group: int, call: LayerCall, registry: OpRegistry
    ) -> None:
        """``q [n, Hq, D]``: float32, in the model's basis (latent: absorbed)."""
        self.layer = layer_in_group
        self.positions = pages.positions
        self.rest = rest
        self.pages_read = 0
        self._pages = pages
        self._q = q
        self._call = call
        self._registry = registry
        self._addr = pages.addr[layer_in_group] if pages.layered else pages.addr
        self._shift = 0 if pages.layered else layer_in_group * pages.layer_bytes

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n, Hkv, P)``."""
        n, heads, pages = self._addr.shape
        return int(n), int(heads), int(pages)

    @property
    def there(self) -> Tensor:
        """bool ``[n, Hkv, P]``: which places of the lists hold a page."""
        return self._addr >= 0

    @cached_property
    def bounds(self) -> Tensor:
        """``[n, Hkv, P]``, float32: logits that no query of a head's group exceeds on any token of a page; minus
        infinity where there is no page.
        """
        bounds: Tensor = self._registry.select("bound_pages", self._bounds(0), ("bounds", self._pages.store)).run(
            self._bounds(0)
        )
        return bounds

    def best(self, count: int) -> Tensor:
        """Places ``[n, Hkv, k]``, rising, of the ``count`` pages with the greatest bounds."""
        call = self._bounds(count)
        places: Tensor = self._registry.select("choose_pages", call, ("bounds", self._pages.store)).run(call)
        return places

    def attend(self, places: Tensor) -> Piece:
        """Attention over the pages at ``places [n, Hkv, m]``: ``o [n, Hq, Dv]``, ``lse [n, Hq]``."""
        piece = self._piece(places, ragged=self._pages.layered)
        o, lse = attend_piece(self._rotated, self.layer, piece, self._call, self._registry)
        return unrotate(self._pages.store, self._q, o, lse, self.layer, self._call)

    def each(self, places: Tensor) -> Piece:
        """The same over every page on its own: ``o [n, m, Hq, Dv]``, ``lse [n, m, Hq]``."""
        n, heads, count = places.shape
        piece = self._piece(places, ragged=True)
        size = self._pages.store.fmt.block_size
        bias = None if piece.bias is None else piece.bias.view(n, heads * count, size)
        # A list of one page is a KV head of its own.
        alone = PagePiece(piece.store, piece.addr.view(n, -1, 1), 0, bias, ragged=True)
        rows = self._rotated.view(n, heads, 1, -1, self._rotated.shape[-1]).expand(-1, -1, count, -1, -1)
        o, lse = attend_piece(rows.flatten(1, 3), self.layer, alone, self._call, self._registry)
        o = o.view(n, heads, count, -1, o.shape[-1]).transpose(1, 2).flatten(2, 3)
        lse = lse.view(n, heads, count, -1).transpose(1, 2).flatten(2, 3)
        q = self._q.unsqueeze(1).expand(-1, count, -1, -1).flatten(0, 1)
        o, lse = unrotate(self._pages.store, q, o.flatten(0, 1), lse.flatten(0, 1), self.layer, self._call)
        return o.unflatten(0, (n, count)), lse.unflatten(0, (n, count))

    @cached_property
    def _rotated(self) -> Tensor:
        return rotate_query(self._pages.store, self._q, self.layer, self._call.latent)

    def _piece(self, places: Tensor, *, ragged: bool) -> PagePiece:
        """The pages at ``places [n, Hkv, m]`` (``ragged``: some may be -1), with their tokens' biases."""
        pages, there = self._pages, None
        if ragged:
            there = places >= 0
            places = places.clamp_min(0)
            self.pages_read += int(there.sum())
        else:
            self.pages_read += places.numel()
        addr = self._addr.gather(-1, places)
        if self._shift:
            addr = addr + self._shift
        if there is not None:
            addr = addr.masked_fill(~there, -1)
        bias = None
        if pages.bias is not None:
            size = pages.store.fmt.block_size
            bias = pages.bias[self.layer].unflatten(-1, (-1, size))
            bias = bias.gather(-2, places[..., None].expand(-1, -1, -1, size)).flatten(-2)
        return PagePiece(pages.store, addr, 0, bias, ragged=ragged)

    def _bounds(self, count: int) -> BoundsCall:
        pages, heads = self._pages, self._addr.shape[1]
        bias = None
        if pages.bias is not None:
            bias = pages.bias[self.layer].unflatten(-1, (-1, pages.store.fmt.block_size)).amax(-1)
        return BoundsCall(
            q=self._q.unflatten(1, (heads, -1)),
            arena=pages.store.arena,
            addr=self._addr,
            shift=self._shift,
            fmt=pages.store.fmt,
            scale=self._call.scale,
            read=partial(read_summaries, pages.store),
            softcap=self._call.softcap,
            bias=bias,
            pages=count,
        )


class _Method(Protocol):
    """A method of retrieval, as far as attention calls it."""

    def attend(self, view: PagesView) -> Piece:
        """Attention over the candidates, or what stands for it: ``o [n, Hq, Dv]``, ``lse [n, Hq]``."""
        ...


@dataclass(slots=True)
class RetrievalAudit:
    """What reading everything would have given, beside what was read. One number for each query head of each layer of
    each step that selected: ``errors``, the norm of the difference of two outputs relative to the exact one's.
    ``pages_read`` of ``pages`` candidates, over KV heads; what is always read is not among them.
    """

    errors: list[Tensor] = field(default_factory=list)
    pages_read: int = 0
    pages: int = 0

    @property
    def error(self) -> Tensor:
        """All of ``errors``, one after the other, float32."""
        return torch.cat(self.errors) if self.errors else torch.empty(0)

    @property
    def share_read(self) -> float:
        """Share of the candidate pages that was read."""
        return self.pages_read / self.pages if self.pages else 1.0

    def violations(self, eps: float) -> float:
        """Share of the errors above ``eps``."""
        error = self.error
        return float((error > eps).float().mean()) if error.numel() else 0.0

    def note(self, exact: Tensor, found: Tensor, view: PagesView) -> None:
        """Takes note of a layer: outputs ``[n, Hq, Dv]``."""
        gap = (found.float() - exact.float()).norm(dim=-1)
        self.errors.append((gap / exact.float().norm(dim=-1).clamp_min(1e-30)).flatten().cpu())
        self.pages_read += view.pages_read
        self.pages += int(view.there.sum())


@dataclass(frozen=True, slots=True)
class Selected:
    """How sequences with one new token each read, from ``first_layer`` of the group on: ``rest`` as ever, and what
    ``method`` chooses of the ``candidates``.
    """

    method: _Method
    first_layer: int
    rest: tuple[StateWalk, ...]
    candidates: tuple[Candidates, ...]
    audit: RetrievalAudit | None = None


def attend_selected(
    q: Tensor,
    layer_in_group: int,
    selected: Selected,
    exactly: Sequence[StateWalk],
    call: LayerCall,
    registry: OpRegistry,
) -> Piece:
    """As `kvfold.attention.decode.attend_decode`; ``exactly``: the walks over all pages, which only an audit takes."""
    wide = q.to(torch.float32, memory_format=torch.contiguous_format)
    total = attend_decode(wide, layer_in_group, selected.rest, call, registry)
    views: list[PagesView] = []
    for pages in selected.candidates:
        take = _taken(pages.rows)
        rest = take(total[0]), take(total[1])
        view = PagesView(pages, take(wide), rest, layer_in_group, call, registry)
        o, lse = merge([rest, selected.method.attend(view)])
        views.append(view)
        if pages.rows is None:
            total = o, lse
        else:
            total = total[0].index_copy(0, pages.rows, o), total[1].index_copy(0, pages.rows, lse)
    if selected.audit is not None:
        exact = attend_decode(wide, layer_in_group, exactly, call, registry)
        for pages, view in zip(selected.candidates, views, strict=True):
            take = _taken(pages.rows)
            selected.audit.note(take(exact[0]), take(total[0]), view)
    return total


def _taken(rows: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What takes some of the queries of a step from a tensor of all."""
    if rows is None:
        return lambda x: x
    return lambda x: x.index_select(0, rows)
