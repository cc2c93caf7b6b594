"""One step of the cache, for any recipe: what the drop-in cache and the engine share.

:class:`PagedCache` owns the arena and the books; :class:`Step` is one forward over some sequences. ``begin`` reserves
blocks (all or nothing), ``commit`` seals and releases them, ``abandon`` undoes the reservation; ``retain``, between
steps, drops what the recipe's retention does not keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.pieces import StateWalk
from kvfold.attention.prefill import FEW_TOKENS
from kvfold.attention.rows import FewRows, PrefillRows
from kvfold.attention.selected import Selected
from kvfold.attention.tables import (
    Blocks,
    DecodeTables,
    RowWrite,
    SequencePages,
    group_pages,
    past_of,
    place_rows,
)
from kvfold.codecs.pages import ArenaMemory, PageStore, copy_blocks, seal, unseal, zero_blocks
from kvfold.codecs.summaries import summarise
from kvfold.errors import UnsupportedError
from kvfold.geometry import Geometry, LayerGroup
from kvfold.kernels.catalog import full_registry
from kvfold.memory.manager import CacheManager, Reservation
from kvfold.recipe import Recipe
from kvfold.retainer import Retainer
from kvfold.retention.build import build_method, refusals
from kvfold.retrieval.build import build_retrieval, retrieval_refusals
from kvfold.retriever import Retriever, whole_blocks
from kvfold.spec import group_spec
from kvfold.step import GroupStep, SequenceWork, Step, StepLayers

__all__ = ["PagedCache", "SequenceWork", "Step"]


_DecodeKey = tuple[tuple[int, int], ...]
"""(sequence, version of its table) of each decoding sequence."""


class PagedCache:
    """A paged, packed KV cache for a model of ``geometry`` under ``recipe``, in at most ``kv_memory`` bytes.

    ``kv_memory=None`` lets the arena grow with its use (for the drop-in cache). ``window_margin``: tokens a sliding
    layer keeps behind its window, so that a rollback of that many stays possible. Raises UnsupportedError with every
    reason if the recipe cannot serve the model, and BudgetError if the budget does not hold a single block.
    """

    def __init__(
        self,
        geometry: Geometry,
        recipe: Recipe,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kv_memory: int | None = None,
        fingerprint: bytes = b"",
        prefix_caching: bool = True,
        window_margin: int = 0,
    ) -> None:
        reasons = recipe.supports(geometry) + refusals(recipe, geometry) + retrieval_refusals(recipe, geometry)
        if reasons:
            raise UnsupportedError(f"recipe {recipe} on {geometry.model_type}", reasons)
        self.geometry = geometry
        self.recipe = recipe
        self.dtype = dtype
        self.device = torch.device(device)
        self.groups: tuple[LayerGroup, ...] = geometry.groups(recipe, dtype.itemsize)
        self._layers = StepLayers(geometry, geometry.layer_slot(recipe), full_registry(), dtype)
        specs = [group_spec(group, window_margin, recipe) for group in self.groups]
        growable = kv_memory is None
        first = 8 * sum(spec.raw_block_bytes + spec.packed_block_bytes for spec in specs)
        self.manager = CacheManager(
            specs,
            first if kv_memory is None else kv_memory,
            recipe.block_size,
            growable=growable,
            fingerprint=fingerprint + recipe.fingerprint(),
            prefix_caching=prefix_caching,
        )
        with torch.inference_mode(False):
            self._memory = ArenaMemory(self.manager.arena.total_bytes, self.device)
            self._arena = self._memory.bytes
            self._generation = self.manager.arena.generation
            self._pages = [group_pages(g, self._arena, dtype, recipe.calibration) for g in self.groups]
        self.retainer: Retainer | None = None
        if recipe.method is not None:
            method = build_method(recipe.method)
            self.retainer = Retainer(
                method, self.groups, self._pages, self.manager, self._sequence_pages, self._follow_growth
            )
        self.retriever: Retriever | None = None
        if recipe.retrieval is not None:
            self.retriever = Retriever(build_retrieval(recipe.retrieval), self.groups, self._pages)
        self._discarded: deque[int] = deque()
        self._known: list[dict[int, tuple[int, SequencePages]]] = [{} for _ in self.groups]
        self._decode_tables: list[tuple[_DecodeKey, DecodeTables] | None] = [None] * len(self.groups)

    def create(self) -> int:
        """A new, empty sequence."""
        return self.manager.create()

    def length(self, seq: int) -> int:
        """Stored tokens of a sequence."""
        return self.manager.length(seq)

    def fork(self, seq: int) -> int:
        """A sequence that shares every block of ``seq``; blocks are copied when one of them writes."""
        self._end_discarded()
        child = self.manager.fork(seq)
        if self.retainer is not None:
            self.retainer.fork(seq, child)
        return child

    def discard(self, sequences: Sequence[int]) -> None:
        """Has sequences ended before anything else is done here. For owners that are collected as garbage, which can
        happen at any moment.
        """
        self._discarded.extend(sequences)

    def _end_discarded(self) -> None:
        while self._discarded:
            self.free(self._discarded.popleft())

    def free(self, seq: int) -> None:
        """Ends a sequence and gives its blocks back."""
        self.manager.free(seq)
        if self.retainer is not None:
            self.retainer.free(seq)
        for known in self._known:
            known.pop(seq, None)

    def truncate(self, seq: int, length: int) -> None:
        """Rolls a sequence back to its first ``length`` tokens.

        A packed block that is cut through is decoded into a raw one, so that new tokens can follow.
        """
        self._end_discarded()
        unseals = self.manager.truncate(seq, length)
        self._follow_growth()
        for job in unseals:
            pages = self._pages[job.group]
            if pages.packed is not None:
                packed = self._pages_of(job.group, pages.packed, "packed", [job.packed_id])
                unseal(pages.packed, packed, pages.raw, self._pages_of(job.group, pages.raw, "raw", [job.raw_id]))
        self.manager.finish_unseals(unseals)
        if self.retainer is not None:
            self.retainer.truncate(seq, length)

    def retain(self, seq: int, *, final: bool = False) -> bool:
        """Runs the recipe's retention on a sequence; whether anything was dropped. Its memory goes back at once.
        ``final``: it will not run on the sequence again, so that nothing noted of it needs to be kept.

        CacheFullError, with the cache as it was, if there is no room for what is kept beside what it is chosen from;
        UnsupportedError if the recipe has no retention.
        """
        if self.retainer is None:
            raise UnsupportedError(f"retention under {self.recipe}", why="the recipe names no method")
        dropped = self.retainer.run(seq, final=final)
        if dropped:
            self.give_back()
        return dropped

    def begin(self, work: Sequence[SequenceWork], *, check_finite: bool = False) -> Step:
        """Reserves room for the new tokens of ``work`` (all or nothing: CacheFullError leaves the cache as it was).
        ``check_finite``: what is not finite is not found by other sequences.
        """
        self._end_discarded()
        reservations = self.manager.reserve_many([(item.seq, item.count) for item in work])
        try:
            self._follow_growth()
            self._prepare_blocks(reservations)
            steps = [self._group_step(g, reservations) for g in range(len(self.groups))]
            return Step(self._layers, reservations, steps, work, self.retainer, check_finite=check_finite)
        except BaseException:
            self._roll_back(reservations)
            raise

    def bytes_allocated(self) -> int:
        """Bytes of the arena: the budget, or what a growing cache has grown to."""
        return self._arena.numel()

    def bytes_resident(self) -> int | None:
        """Bytes of the arena that are backed by real memory now; None where the system does not tell."""
        return self._memory.resident_bytes()

    def give_back(self) -> None:
        """Gives the memory of what fell empty back to the system."""
        self._memory.give_back(self.manager.arena.take_given_back())

    def bytes_in_use(self) -> int:
        """Bytes of all referenced blocks (slack, scales, raw tails counted), of the block tables, and of what retention
        has noted of its sequences.
        """
        self._end_discarded()
        return self.manager.bytes_in_use() + (0 if self.retainer is None else self.retainer.nbytes())

    def commit(
        self, step: Step, tokens: Sequence[Sequence[int] | None] | None = None, salts: Sequence[bytes] | None = None
    ) -> None:
        """Makes a step's tokens part of their sequences: seals what has left the recent window, releases what a window
        has passed.

        ``tokens`` (the new token ids of each sequence, in order; None: unknown) lets full blocks be found again by
        other sequences that start the same way under the same salt, if the step found them finite. All computing comes
        before the books change: when it fails, :meth:`abandon` still undoes the step.
        """
        self._encode(step.reservations)
        sound = step.finite()
        seals = [
            self.manager.commit(
                reservation,
                tokens[i] if tokens is not None and sound[i] else None,
                salts[i] if salts is not None else None,
            )
            for i, reservation in enumerate(step.reservations)
        ]
        for done in seals:
            self.manager.finish_seals(done)

    def abandon(self, step: Step) -> None:
        """Drops a step: every block it reserved goes back."""
        step.undo()
        self._roll_back(step.reservations)

    def _roll_back(self, reservations: Sequence[Reservation]) -> None:
        for reservation in reversed(reservations):
            self.manager.rollback(reservation)

    def _encode(self, reservations: Sequence[Reservation]) -> None:
        """Fills the packed blocks of everything that the commit of ``reservations`` seals, and writes the bounds of
        pages that have become whole.
        """
        raw_of: list[dict[int, int]] = [{} for _ in self.groups]
        for reservation in reservations:
            for job in self.manager.coming_seals(reservation):
                raw_of[job.group][job.packed_id] = job.raw_id
        for g, jobs in enumerate(raw_of):
            pages = self._pages[g]
            if jobs and pages.packed is not None:
                raw = self._pages_of(g, pages.raw, "raw", list(jobs.values()))
                seal(pages.raw, raw, pages.packed, self._pages_of(g, pages.packed, "packed", list(jobs)))
            store, state = pages.kept_store, "raw" if pages.packed is None else "packed"
            if not store.fmt.summary_dims:
                continue
            if whole := [*jobs, *whole_blocks(reservations, g, state, self.recipe.block_size)]:
                summarise(store, self._pages_of(g, store, state, whole))

    def _follow_growth(self) -> None:
        """Moves the pages to a larger allocation after the books' arena has grown."""
        arena = self.manager.arena
        if arena.generation == self._generation:
            return
        with torch.inference_mode(False):  # an arena made inside of it could not be written outside
            memory = ArenaMemory(arena.total_bytes, self.device)
            larger = memory.bytes
            larger[: self._arena.numel()] = self._arena
            self._memory, self._arena, self._generation = memory, larger, arena.generation
            for pages in self._pages:
                pages.raw.rebind(larger)
                if pages.packed is not None:
                    pages.packed.rebind(larger)
        self._decode_tables = [None] * len(self.groups)
        if self.retriever is not None:
            self.retriever.forget()

    def _pages_of(self, g: int, store: PageStore, state: str, ids: Sequence[int]) -> Tensor:
        """Addresses ``[n * layers * Hkv]`` of all pages of some blocks."""
        group = self.groups[g]
        offset = self.manager.pool(g, state).offset(np.asarray(ids, np.int64))
        pages = np.arange(len(group.layers) * group.kv_heads, dtype=np.int64) * store.fmt.page_bytes
        return torch.from_numpy((offset[:, None] + pages).reshape(-1)).to(self.device)

    def _prepare_blocks(self, reservations: Sequence[Reservation]) -> None:
        """Copies shared blocks that are about to be written, and clears new ones that this step does not fill.

        A recycled block may hold anything, NaN included, and a mask cannot hide NaN.
        """
        for g in range(len(self.groups)):
            pool = self.manager.pool(g, "raw")
            copies = [copy for r in reservations for copy in r.copies if copy.group == g]
            if copies:
                ends = np.asarray([(copy.src, copy.dst) for copy in copies], np.int64)
                src, dst = torch.from_numpy(pool.offset(ends.T)).to(self.device)
                copy_blocks(self._arena, src, dst, pool.block_bytes)
            size = self.recipe.block_size
            fresh = [
                run.block_id
                for r in reservations
                for run in r.runs[g]
                if run.state == "raw" and run.slot_start == 0 and run.slot_stop < size
            ]
            if fresh:
                offset = torch.from_numpy(pool.offset(np.asarray(fresh, np.int64))).to(self.device)
                zero_blocks(self._arena, offset, pool.block_bytes)

    def _sequence_pages(self, g: int, seq: int) -> SequencePages:
        """A sequence's blocks in a group; made again only when its table has changed."""
        version = self.manager.table_version(seq)
        known = self._known[g].get(seq)
        if known is None or known[0] != version:
            known = self._known[g][seq] = (version, self._read_table(g, seq))
        return known[1]

    def _read_table(self, g: int, seq: int) -> SequencePages:
        table = self.manager.table(seq, g)
        size = self.recipe.block_size
        kept = None if self.retainer is None else self.retainer.kept(g, seq)
        raw = Blocks(self.manager.pool(g, "raw").offset(table.raw_ids), table.raw_block_index * size)
        if not table.packed_ids.size:
            return SequencePages(raw, Blocks(table.packed_ids, table.packed_ids), kept)
        offset = self.manager.pool(g, "packed").offset(table.packed_ids)
        return SequencePages(raw, Blocks(offset, table.packed_block_index * size), kept)

    def _group_step(self, g: int, reservations: Sequence[Reservation]) -> GroupStep:
        pages = self._pages[g]
        few: dict[int, list[tuple[int, Reservation]]] = {}  # by number of new tokens: first rows, and whose they are
        prefill: list[PrefillRows] = []
        first = 0
        for r in reservations:
            if r.new_tokens == 1 and r.runs[g]:  # the last token of a chunk may have no page: no later query reads it
                few.setdefault(1, []).append((first, r))
            elif r.start and pages.window is None and r.new_tokens <= FEW_TOKENS:
                few.setdefault(r.new_tokens, []).append((first, r))
            else:
                past = past_of(pages, self._sequence_pages(g, r.seq), r.start)
                prefill.append(PrefillRows(first, first + r.new_tokens, r.start, past))
            first += r.new_tokens
        walks = [self._few(g, count, members, first) for count, members in few.items()]
        return GroupStep(self._writes(g, reservations, first), walks, prefill)

    def _few(self, g: int, queries: int, members: Sequence[tuple[int, Reservation]], total: int) -> FewRows:
        """The walks of sequences with ``queries`` new tokens each, among the step's ``total``.

        A single new token is read from its page, like everything before it; several attend each other beside the pages.
        """
        starts = np.asarray([r.start for _, r in members])
        selected = None
        if queries == 1:
            walks, selected = self._decode_walks(g, [r.seq for _, r in members], starts)
        else:
            sequences = [self._sequence_pages(g, r.seq).before(r.start) for _, r in members]
            walks = DecodeTables(self._pages[g], sequences, queries).at(starts - 1)
        if queries * len(members) == total:
            return FewRows(None, queries, walks, selected)
        rows = np.asarray([first for first, _ in members])[:, None] + np.arange(queries)
        return FewRows(torch.from_numpy(rows.reshape(-1)).to(self.device), queries, walks, selected)

    def _decode_walks(
        self, g: int, sequences: Sequence[int], positions: np.ndarray
    ) -> tuple[tuple[StateWalk, ...], Selected | None]:
        """The walks of sequences with one new token each, from the tables of the step before if no block changed, and
        how retrieval has them read less.
        """
        key = tuple((seq, self.manager.table_version(seq)) for seq in sequences)
        cached = self._decode_tables[g]
        if cached is None or cached[0] != key:
            tables = DecodeTables(self._pages[g], [self._sequence_pages(g, seq) for seq in sequences])
            cached = self._decode_tables[g] = (key, tables)
        selected = None
        if self.retriever is not None:
            pages = [self._sequence_pages(g, seq) for seq in sequences]
            selected = self.retriever.selected(g, key, pages, positions)
        return cached[1].at(positions), selected

    def _writes(self, g: int, reservations: Sequence[Reservation], total: int) -> list[RowWrite]:
        """Where each new token of the step goes in this group; tokens that a window has already passed go nowhere."""
        pages = self._pages[g]
        writes = []
        for state, store in (("raw", pages.raw), ("packed", pages.packed)):
            if store is None:
                continue
            ids: list[int] = []
            counts: list[int] = []
            slots: list[int] = []
            firsts: list[int] = []
            row = 0
            for r in reservations:
                for run in r.runs[g]:
                    if run.state == state:
                        ids.append(run.block_id)
                        counts.append(run.slot_stop - run.slot_start)
                        slots.append(run.slot_start)
                        firsts.append(row + run.token_start)
                row += r.new_tokens
            if not ids:
                continue
            offset = self.manager.pool(g, state).offset(np.asarray(ids, np.int64))
            writes.append(place_rows(pages, store, offset, np.asarray([counts, slots, firsts]), total))
        return writes
