"""Retrieval on the paged cache: bounds of pages that have become whole, and what a method may choose from at a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvfold.attention.candidates import candidate_tables, split
from kvfold.attention.selected import Candidates, RetrievalAudit, Selected
from kvfold.attention.tables import Blocks, DecodeTables, GroupPages, SequencePages
from kvfold.formats import sealed_until
from kvfold.geometry import LayerGroup
from kvfold.memory.manager import Reservation
from kvfold.retrieval.method import RetrievalMethod

__all__ = ["Retriever", "whole_blocks"]


@dataclass(frozen=True, slots=True)
class _Tables:
    """What stays from step to step, as long as no sequence's blocks change their state."""

    rest: DecodeTables
    candidates: list[Candidates]


class Retriever:
    """See the module. ``stores``: the pages of the layer ``groups``."""

    def __init__(self, method: RetrievalMethod, groups: Sequence[LayerGroup], stores: Sequence[GroupPages]) -> None:
        self.method = method
        self._groups = groups
        self._stores = stores
        self._first = [sum(layer < method.dense for layer in group.layers) for group in groups]
        self._known: list[tuple[object, _Tables | None] | None] = [None] * len(groups)
        self._audit: RetrievalAudit | None = None
        self.selections = 0
        """Forwards of groups of layers in which pages were chosen so far."""

    def selected(self, g: int, key: object, sequences: Sequence[SequencePages], starts: np.ndarray) -> Selected | None:
        """How sequences with one new token each, at positions ``starts [n]``, read their pages in a group; None if they
        read all. ``key``: changes when any of the pages does.
        """
        group, stores = self._groups[g], self._stores[g]
        if group.window is not None or self._first[g] == len(group.layers):
            return None
        size = stores.raw.fmt.block_size
        ends = tuple(sealed_until(int(start), size, group.sinks, group.recent) for start in starts)
        known = self._known[g]
        if known is None or known[0] != (key, ends):
            known = self._known[g] = ((key, ends), self._tables(g, sequences, starts))
        if known[1] is None:
            return None
        self.selections += 1
        positions = torch.from_numpy(starts).to(stores.raw.arena.device)
        candidates = tuple(
            replace(each, positions=positions if each.rows is None else positions[each.rows])
            for each in known[1].candidates
        )
        return Selected(self.method, self._first[g], known[1].rest.at(starts), candidates, self._audit)

    def _tables(self, g: int, sequences: Sequence[SequencePages], starts: np.ndarray) -> _Tables | None:
        group, stores = self._groups[g], self._stores[g]
        splits = [
            split(stores, pages, int(start), group.sinks, group.recent)
            for pages, start in zip(sequences, starts, strict=True)
        ]
        # Below that, the bounds take more to read than what is not read.
        fmt, least = stores.kept_store.fmt, self.method.least
        worth = max(least, least * fmt.page_bytes / (fmt.page_bytes - fmt.summary_bytes))
        members = np.asarray([i for i, each in enumerate(splits) if each.most > worth], np.int64)
        if not members.size:
            return None
        chosen: set[int] = set(members.tolist())
        rest = [splits[i].rest if i in chosen else pages for i, pages in enumerate(sequences)]
        older: list[Blocks] = [splits[i].older for i in members]
        tables = candidate_tables(stores, [sequences[i] for i in members], older, members, len(sequences))
        return _Tables(DecodeTables(stores, rest), tables)

    def forget(self) -> None:
        """The pages lie in another arena now."""
        self._known = [None] * len(self._groups)

    @contextmanager
    def audit(self) -> Iterator[RetrievalAudit]:
        """Until it ends, every step that selects also reads everything, and the difference is noted."""
        before, self._audit = self._audit, RetrievalAudit()
        try:
            yield self._audit
        finally:
            self._audit = before


def whole_blocks(reservations: Iterable[Reservation], g: int, state: str, size: int) -> list[int]:
    """The blocks of a group in a state whose last slot the steps of ``reservations`` fill."""
    return [run.block_id for r in reservations for run in r.runs[g] if run.state == state and run.slot_stop == size]
