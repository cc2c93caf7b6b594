"""Device-side page tables of one step, built from the block lists of its sequences.

Block lists come as byte offsets and first positions (numpy); what goes to the device are page addresses ``[n, Hkv, P]``
and additive masks. Sequences with similarly many pages share a bucket, so that a short one never pays for a long one;
what several begin with has one list of pages for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.cascade import SharedRun, shared_runs
from kvfold.attention.kept import KeptPages, joined
from kvfold.attention.pieces import PagePiece, StateWalk
from kvfold.attention.prefill import SPAN_PAGES, Past, PastSpan
from kvfold.codecs.calibrated import calibrated_bases
from kvfold.codecs.pages import PageStore
from kvfold.geometry import LayerGroup
from kvfold.kernels.pages import HIDDEN
from kvfold.kernels.runs import TokenRuns

__all__ = [
    "Blocks",
    "DecodeTables",
    "GroupPages",
    "RowWrite",
    "SequencePages",
    "group_pages",
    "past_of",
    "place_rows",
]

_SMALLEST_BUCKET_BITS = 3  # up to 7 pages cost about the same: no bucket is finer than that
_FAR = np.iinfo(np.int64).max // 2  # the position of padding: no query ever reaches it


@dataclass(frozen=True, slots=True)
class Blocks:
    """Live blocks of one sequence in one state, in position order: byte offsets ``[n]`` and first positions ``[n]``,
    int64.
    """

    offset: np.ndarray
    start: np.ndarray

    def before(self, position: int) -> Blocks:
        """Those that begin before ``position``."""
        count = int(np.searchsorted(self.start, position))
        return Blocks(self.offset[:count], self.start[:count])

    def apart(self, first: int, last: int) -> tuple[Blocks, Blocks]:
        """Those that begin at positions ``[first, last)``, and the others."""
        a, b = np.searchsorted(self.start, (first, last))
        cut = slice(int(a), int(b))
        rest = np.delete(self.offset, cut), np.delete(self.start, cut)
        return Blocks(self.offset[cut], self.start[cut]), Blocks(*rest)


@dataclass(frozen=True, slots=True)
class SequencePages:
    """Everything a group holds of one sequence; ``kept``: what retention left of earlier blocks."""

    raw: Blocks
    packed: Blocks
    kept: KeptPages | None = None

    def before(self, position: int) -> SequencePages:
        """The blocks that begin before ``position``, and all that was kept, which is older than any new token."""
        return SequencePages(self.raw.before(position), self.packed.before(position), self.kept)


@dataclass(frozen=True, slots=True)
class GroupPages:
    """How a layer group lies in its blocks: stores of both states (``packed`` None if nothing is ever packed), its KV
    heads, and what its queries may see (as in :class:`~kvfold.attention.pieces.LayerCall`).
    """

    raw: PageStore
    packed: PageStore | None
    kv_heads: int
    kind: str
    window: int | None

    @property
    def kept_store(self) -> PageStore:
        """Where the pages lie that retention fills."""
        return self.raw if self.packed is None else self.packed

    def layer_bytes(self, store: PageStore) -> int:
        """Bytes between a layer's page and the next layer's page of the same head."""
        return self.kv_heads * store.fmt.page_bytes

    def addresses(self, store: PageStore, offset: np.ndarray) -> Tensor:
        """Page addresses ``[..., Hkv, P]`` in the group's first layer, of blocks at ``offset [..., P]``."""
        heads = np.arange(self.kv_heads, dtype=np.int64)[:, None] * store.fmt.page_bytes
        return torch.from_numpy(offset[..., None, :] + heads).to(store.arena.device)


def group_pages(group: LayerGroup, arena: Tensor, dtype: torch.dtype, calibration: str | None) -> GroupPages:
    """The stores of a group in ``arena``, the packed one with the bases of ``calibration`` where there is one."""
    packed = group.packed
    store = partial(PageStore, arena, dtype=dtype, heads=group.kv_heads, layers=len(group.layers))
    bases = calibrated_bases(calibration, group.layers, packed, arena.device) if calibration and packed else None
    return GroupPages(
        raw=store(group.raw),
        packed=None if packed is None else store(packed, bases=bases),
        kv_heads=group.kv_heads,
        kind=group.kind,
        window=group.window,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Pages of one state for sequences ``members [n]`` of the step, whose queries are ``rows`` (None: all, in order).

    ``pos [n, P * S]``: positions of the tokens; None where what is hidden does not hang on the queries: ``bias``, then,
    hides padding for good.
    """

    members: np.ndarray
    rows: Tensor | None
    addr: Tensor
    pos: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _StateTables:
    store: PageStore
    own: list[_Part]
    shared: list[_Part]
    kept: list[PagePiece]


class DecodeTables:
    """Page tables of sequences that have the same, small number of queries in a step. Good for as long as no sequence's
    blocks change.
    """

    def __init__(self, group: GroupPages, sequences: Sequence[SequencePages], queries: int = 1) -> None:
        """``queries``: of each sequence; rows come sequence by sequence."""
        self._group = group
        self._queries = queries
        self._states: list[_StateTables] = []
        kept = self._kept([pages.kept for pages in sequences])
        for store, blocks in (
            (group.raw, [pages.raw for pages in sequences]),
            (group.packed, [pages.packed for pages in sequences]),
        ):
            more = kept if store is group.kept_store else []
            if store is not None and (more or any(each.offset.size for each in blocks)):
                self._states.append(self._state(store, blocks, more))

    def _kept(self, kept: Sequence[KeptPages | None]) -> list[PagePiece]:
        """What retention kept of the sequences, those with similarly many pages together."""
        buckets: dict[int, list[int]] = {}
        for i, each in enumerate(kept):
            if each is not None and each.pages:
                buckets.setdefault(max(_SMALLEST_BUCKET_BITS, each.pages.bit_length()), []).append(i)
        return [
            joined(
                self._group.kept_store,
                [each for i in members if (each := kept[i]) is not None],
                self._rows(np.asarray(members), len(kept)),
            )
            for members in buckets.values()
        ]

    def _state(self, store: PageStore, blocks: Sequence[Blocks], kept: list[PagePiece]) -> _StateTables:
        runs: list[SharedRun] = []
        if self._group.window is None:
            # The last raw block is a sequence's own, with room left or written in this step: whole ones are shared.
            offsets = [each.offset[:-1] if store is self._group.raw else each.offset for each in blocks]
            runs = shared_runs(offsets, self._group.layer_bytes(store))
        done = np.zeros(len(blocks), np.int64)
        shared = []
        for run in runs:
            offset = blocks[int(run.members[0])].offset[run.first : run.last]
            rows = self._rows(run.members, len(blocks))
            shared.append(_Part(run.members, rows, self._group.addresses(store, offset[None])))
            done[run.members] = run.last
        buckets: dict[int, list[int]] = {}
        for i, each in enumerate(blocks):
            if left := each.offset.size - int(done[i]):
                buckets.setdefault(max(_SMALLEST_BUCKET_BITS, left.bit_length()), []).append(i)
        own = []
        for members in buckets.values():
            rest = [Blocks(blocks[i].offset[done[i] :], blocks[i].start[done[i] :]) for i in members]
            index = np.asarray(members)
            own.append(self._own(store, index, rest, self._rows(index, len(blocks))))
        return _StateTables(store, own, shared, kept)

    def _rows(self, members: np.ndarray, total: int) -> Tensor | None:
        """The rows of some of ``total`` sequences among all queries; None: all, in order."""
        if members.size == total:
            return None
        rows = (members[:, None] * self._queries + np.arange(self._queries)).reshape(-1)
        return torch.from_numpy(rows).to(self._group.raw.arena.device)

    def _own(self, store: PageStore, members: np.ndarray, blocks: Sequence[Blocks], rows: Tensor | None) -> _Part:
        size = store.fmt.block_size
        widest = max(block.offset.size for block in blocks)
        offset = np.empty((len(blocks), widest), np.int64)
        start = np.full((len(blocks), widest), _FAR, np.int64)
        for i, block in enumerate(blocks):
            n = block.offset.size
            offset[i, :n], start[i, :n] = block.offset, block.start
            offset[i, n:] = block.offset[0]  # padding reads the sequence's own memory, never a neighbour's
        addr = self._group.addresses(store, offset)
        if store is self._group.raw or self._group.window is not None:
            pos = torch.from_numpy((start[:, :, None] + np.arange(size)).reshape(len(blocks), -1))
            return _Part(members, rows, addr, pos=pos.to(store.arena.device))
        # Sealed blocks lie before every query: of them only padding is hidden.
        bias = None
        if (start == _FAR).any():
            bias = torch.zeros(len(blocks), widest, dtype=torch.float32)
            bias = bias.masked_fill_(torch.from_numpy(start == _FAR), HIDDEN).repeat_interleave(size, dim=1)
            bias = bias.to(store.arena.device)
        return _Part(members, rows, addr, bias=bias)

    def at(self, positions: np.ndarray) -> tuple[StateWalk, ...]:
        """The walks, with masks: ``positions [n]`` are the last ones that the queries of each sequence may see in its
        pages.
        """
        seen = torch.from_numpy(positions).to(self._group.raw.arena.device)[:, None]
        return tuple(
            StateWalk(
                store=state.store,
                own=tuple(self._piece(state.store, part, seen) for part in state.own),
                shared=tuple(self._piece(state.store, part, seen) for part in state.shared),
                kept=tuple(state.kept),
            )
            for state in self._states
        )

    def _piece(self, store: PageStore, part: _Part, seen: Tensor) -> PagePiece:
        bias = part.bias
        if part.pos is not None:
            window, chunked = self._group.window, self._group.kind == "chunked"
            query = seen if part.rows is None else seen[part.members]
            hidden = part.pos > query
            if window is not None:
                hidden |= part.pos < (query - query % window if chunked else query - window + 1)
            bias = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device).masked_fill_(hidden, HIDDEN)
        return PagePiece(store, part.addr, self._group.layer_bytes(store), bias, part.rows)


def past_of(group: GroupPages, pages: SequencePages, start: int) -> tuple[Past, ...]:
    """The pages that hold a sequence's positions before ``start``, in spans of at most ``SPAN_PAGES`` pages."""
    before = pages.before(start)
    states = ((group.raw, before.raw), (group.packed, before.packed))
    past = [
        Past(store, tuple(_spans(group, store, blocks, start)))
        for store, blocks in states
        if store is not None and blocks.offset.size
    ]
    if before.kept is not None and before.kept.pages:
        past.append(Past(group.kept_store, tuple(_kept_spans(group.kept_store, before.kept))))
    return tuple(past)


def _kept_spans(store: PageStore, kept: KeptPages) -> Iterator[PastSpan]:
    whole, size, nowhere = joined(store, [kept], None), store.fmt.block_size, torch.empty(0, dtype=torch.int64)
    for a in range(0, kept.pages, SPAN_PAGES):
        addr = whole.addr[..., a : a + SPAN_PAGES]
        bias = None if whole.bias is None else whole.bias[..., a * size : (a + SPAN_PAGES) * size]
        piece = replace(whole, addr=addr, bias=bias)
        # Every query sees all of it, wherever it stood.
        yield PastSpan(piece=piece, pos=nowhere, valid=addr.shape[-1] * size)


def _spans(group: GroupPages, store: PageStore, past: Blocks, start: int) -> Iterator[PastSpan]:
    size = store.fmt.block_size
    for a in range(0, past.offset.size, SPAN_PAGES):
        offset, first = past.offset[a : a + SPAN_PAGES], past.start[a : a + SPAN_PAGES]
        pos = (first[:, None] + np.arange(size)).reshape(-1)
        piece = PagePiece(store, group.addresses(store, offset[None]), group.layer_bytes(store))
        valid = int(min(pos.size, pos.size - size + start - first[-1]))
        yield PastSpan(piece=piece, pos=torch.from_numpy(pos).to(store.arena.device), valid=valid)


@dataclass(frozen=True, slots=True)
class RowWrite:
    """Where new tokens of a step go in one store."""

    store: PageStore
    runs: TokenRuns

    def __call__(self, layer_in_group: int, k: Tensor, v: Tensor) -> None:
        """Stores the step's keys ``[M, Hkv, Dk]`` and values ``[M, Hkv, Dv]`` of a layer, as far as they go here."""
        self.store.write_runs(self.runs, k, v, layer_in_group)


def place_rows(pages: GroupPages, store: PageStore, offset: np.ndarray, runs: np.ndarray, total: int) -> RowWrite:
    """Runs of tokens in blocks at byte ``offset [n]``; ``runs [3, n]``: their token counts, first slots, and first rows
    among the ``total`` tokens of the step.
    """
    count, slots, _ = runs
    if not store.fmt.movable and (slots.any() or (count != store.fmt.block_size).any()):
        raise RuntimeError(f"blocks with scales of channels would be written in part: {count} tokens at {slots}")
    table = torch.from_numpy(np.column_stack((offset, runs.T)).astype(np.int64, order="C", copy=False))
    return RowWrite(store, TokenRuns(table, total, pages.kv_heads, store.fmt.page_bytes, store.arena.device))
