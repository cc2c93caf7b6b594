"""Device-side page tables of one step, built from the block lists of its sequences.

Block lists come as byte offsets and first positions (numpy); what goes to the device are page addresses ``[n, Hkv, P]``
and additive masks. Sequences of similar length share a bucket, so that a short one never pays for a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.pieces import PagePiece
from kvfold.attention.prefill import SPAN_PAGES, PastSpan
from kvfold.codecs.calibrated import calibrated_bases
from kvfold.codecs.pages import PageStore
from kvfold.geometry import LayerGroup
from kvfold.kernels.pages import HIDDEN
from kvfold.kernels.runs import TokenRuns

__all__ = [
    "Blocks",
    "DecodeBucket",
    "DecodeTables",
    "GroupPages",
    "RowWrite",
    "SequencePages",
    "group_pages",
    "past_spans",
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


@dataclass(frozen=True, slots=True)
class SequencePages:
    """Everything a group holds of one sequence."""

    raw: Blocks
    packed: Blocks


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
class DecodeBucket:
    """Sequences of similar length that decode together: ``rows [n]`` of the step's tokens (None: all of them, in
    order).
    """

    rows: Tensor | None
    pieces: tuple[PagePiece, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """Pages of one state for the sequences of a bucket: addresses, first-token positions ``[n, P * S]``, whether any is
    padding.
    """

    store: PageStore
    addr: Tensor
    pos: Tensor
    layer_bytes: int
    padded: bool


class DecodeTables:
    """Page tables of the decoding sequences of a step. Good for as long as no sequence's blocks change."""

    def __init__(self, group: GroupPages, sequences: Sequence[SequencePages], rows: np.ndarray) -> None:
        """``rows [n]``: where each sequence's one token lies among the tokens of the step."""
        self._group = group
        buckets: dict[tuple[int, int], list[int]] = {}
        for i, pages in enumerate(sequences):
            buckets.setdefault((_size_class(pages.raw), _size_class(pages.packed)), []).append(i)
        self._buckets: list[tuple[np.ndarray, Tensor, list[_Part]]] = []
        for members in buckets.values():
            chosen = [sequences[i] for i in members]
            parts = []
            if chosen[0].raw.offset.size:
                parts.append(self._part(group.raw, [pages.raw for pages in chosen]))
            if group.packed is not None and chosen[0].packed.offset.size:
                parts.append(self._part(group.packed, [pages.packed for pages in chosen]))
            index = np.asarray(members)
            self._buckets.append((index, torch.from_numpy(rows[index]).to(group.raw.arena.device), parts))
        self._in_order = len(self._buckets) == 1 and bool((rows == np.arange(rows.size)).all())

    def _part(self, store: PageStore, blocks: Sequence[Blocks]) -> _Part:
        size = store.fmt.block_size
        widest = max(block.offset.size for block in blocks)
        offset = np.empty((len(blocks), widest), np.int64)
        start = np.full((len(blocks), widest), _FAR, np.int64)
        for i, block in enumerate(blocks):
            n = block.offset.size
            offset[i, :n], start[i, :n] = block.offset, block.start
            offset[i, n:] = block.offset[0]  # padding reads the sequence's own memory, never a neighbour's
        pos = (start[:, :, None] + np.arange(size)).reshape(len(blocks), -1)
        return _Part(
            store=store,
            addr=self._group.addresses(store, offset),
            pos=torch.from_numpy(pos).to(store.arena.device),
            layer_bytes=self._group.layer_bytes(store),
            padded=any(block.offset.size < widest for block in blocks),
        )

    def at(self, positions: np.ndarray, total_rows: int) -> tuple[DecodeBucket, ...]:
        """The buckets with masks for queries at ``positions [n]`` (each sequence's current token), among ``total_rows``
        tokens.
        """
        group = self._group
        ready = []
        for index, rows, parts in self._buckets:
            query = torch.from_numpy(positions[index]).to(rows.device)[:, None]
            pieces = []
            for part in parts:
                bias = None
                if part.store is group.raw or part.padded or group.window is not None:
                    hidden = part.pos > query
                    if group.window is not None:
                        first = query - query % group.window if group.kind == "chunked" else query - group.window + 1
                        hidden |= part.pos < first
                    bias = torch.zeros(hidden.shape, dtype=torch.float32, device=rows.device)
                    bias = bias.masked_fill_(hidden, HIDDEN)
                pieces.append(PagePiece(part.store, part.addr, part.layer_bytes, bias))
            everything = self._in_order and rows.numel() == total_rows
            ready.append(DecodeBucket(rows=None if everything else rows, pieces=tuple(pieces)))
        return tuple(ready)


def _size_class(blocks: Blocks) -> int:
    count = int(blocks.offset.size)
    return max(_SMALLEST_BUCKET_BITS, count.bit_length()) if count else 0


def past_spans(group: GroupPages, pages: SequencePages, start: int) -> list[PastSpan]:
    """The pages that hold a sequence's positions before ``start``, in spans of at most ``SPAN_PAGES`` pages."""
    spans = []
    for store, blocks in ((group.raw, pages.raw), (group.packed, pages.packed)):
        if store is None:
            continue
        size = store.fmt.block_size
        past = blocks.before(start)
        for a in range(0, past.offset.size, SPAN_PAGES):
            offset, first = past.offset[a : a + SPAN_PAGES], past.start[a : a + SPAN_PAGES]
            pos = (first[:, None] + np.arange(size)).reshape(-1)
            piece = PagePiece(store, group.addresses(store, offset[None]), group.layer_bytes(store))
            valid = int(min(pos.size, pos.size - size + start - first[-1]))
            spans.append(PastSpan(piece=piece, pos=torch.from_numpy(pos).to(store.arena.device), valid=valid))
    return spans


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
