"""Which pages of a sequence are candidates of retrieval, and the tables of those of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.kept import joined
from kvfold.attention.selected import Candidates
from kvfold.attention.tables import Blocks, GroupPages, SequencePages
from kvfold.formats import sealed_until, sink_blocks

__all__ = ["SplitPages", "candidate_tables", "split"]

_SMALLEST_BUCKET_BITS = 3  # as in the tables of what is always read


@dataclass(frozen=True, slots=True)
class SplitPages:
    """A sequence's pages: ``rest`` is always read, ``older`` blocks and what was kept are candidates. ``most``: pages
    of the longest list of candidates.
    """

    rest: SequencePages
    older: Blocks
    most: int


def split(group: GroupPages, pages: SequencePages, length: int, sinks: int, recent: int) -> SplitPages:
    """The pages of a sequence with ``length`` tokens before the new one: candidates are its whole blocks between the
    blocks of the ``sinks`` and those of the ``recent`` tokens, and what retention kept.
    """
    size = group.raw.fmt.block_size
    first, end = sink_blocks(sinks, size), sealed_until(length, size, sinks, recent)
    if group.packed is None:
        older, raw = pages.raw.apart(first * size, end * size)
        rest = SequencePages(raw, pages.packed)
    else:
        # A block that this very step fills has no bounds yet.
        older, packed = pages.packed.apart(0, length // size * size)
        rest = SequencePages(pages.raw, packed)
    kept = 0 if pages.kept is None else pages.kept.pages
    return SplitPages(rest, older, older.offset.size + kept)


def candidate_tables(
    group: GroupPages, pages: Sequence[SequencePages], older: Sequence[Blocks], members: np.ndarray, total: int
) -> list[Candidates]:
    """Tables of the candidates of the sequences ``members [m]`` of a step's ``total``: those with similarly many pages
    together, those with kept pages apart. ``positions`` are left at 0.
    """
    buckets: dict[tuple[int, bool], list[int]] = {}
    for i, (each, blocks) in enumerate(zip(pages, older, strict=True)):
        kept = each.kept is not None and each.kept.pages > 0
        count = blocks.offset.size + (each.kept.pages if each.kept is not None else 0)
        buckets.setdefault((max(_SMALLEST_BUCKET_BITS, count.bit_length()), kept), []).append(i)
    tables = []
    for (_, kept), inside in buckets.items():
        device = group.raw.arena.device
        rows = None if len(inside) == total else torch.from_numpy(members[inside]).to(device)
        store = group.kept_store
        table = Candidates(
            store, _listed(group, [older[i] for i in inside]), group.layer_bytes(store), rows, torch.zeros(0)
        )
        tables.append(_with_kept(table, [pages[i] for i in inside]) if kept else table)
    return tables


def _listed(group: GroupPages, blocks: Sequence[Blocks]) -> Tensor:
    """Page addresses ``[n, Hkv, P]`` of some blocks, -1 behind the last."""
    offset = np.full((len(blocks), max(each.offset.size for each in blocks)), -1, np.int64)
    for i, each in enumerate(blocks):
        offset[i, : each.offset.size] = each.offset
    there = torch.from_numpy(offset >= 0).to(group.raw.arena.device)[:, None]
    return group.addresses(group.kept_store, offset).where(there, -1)


def _with_kept(table: Candidates, pages: Sequence[SequencePages]) -> Candidates:
    """The same lists, in every layer and head its own kept pages before the blocks."""
    own = joined(table.store, [each.kept for each in pages if each.kept is not None], None)
    layers = torch.arange(own.addr.shape[0], device=own.addr.device).view(-1, 1, 1, 1) * table.layer_bytes
    blocks = torch.where(table.addr >= 0, table.addr + layers, -1)
    bias = own.bias
    if bias is not None:  # blocks have none
        bias = torch.nn.functional.pad(bias, (0, table.addr.shape[-1] * table.store.fmt.block_size))
    return replace(table, addr=torch.cat((own.addr, blocks), dim=-1), layer_bytes=0, layered=True, bias=bias)
