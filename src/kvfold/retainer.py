"""Retention on the paged cache: what a method has seen of each sequence, and the re-packing of what it keeps.

A `Retainer` watches the forwards of a cache for its method, and at a retention point lets it score every layer, moves
the survivors of each head densely into new pages (codes as they are, never encoded again), and gives the old blocks
back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold.attention.kept import KeptPages
from kvfold.attention.pieces import LayerCall
from kvfold.attention.tables import Blocks, GroupPages, SequencePages
from kvfold.codecs.pages import PageStore
from kvfold.codecs.summaries import summarise
from kvfold.geometry import LayerGroup
from kvfold.memory.manager import CacheManager, Keeping
from kvfold.retention.method import Merged, Notes, RetentionMethod, Seen
from kvfold.retention.repack import chosen, dealt, lay_out
from kvfold.retention.view import LayerFacts, LayerView, PagePart
from kvfold.retention.write import write_merged

__all__ = ["ForwardInputs", "Retainer", "RetentionStats"]


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What a layer's attention module was given for the ``N`` tokens of a step: its input ``hidden [N, E]``, and the
    rotary embedding ``rotary (cos, sin)``, each ``[N, R]``; None where it has none.
    """

    module: torch.nn.Module
    hidden: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None

    def of(self, rows: slice) -> ForwardInputs:
        """Those of some of the tokens."""
        rotary = None if self.rotary is None else (self.rotary[0][rows], self.rotary[1][rows])
        return ForwardInputs(self.module, None if self.hidden is None else self.hidden[rows], rotary)


@dataclass(slots=True)
class RetentionStats:
    """What retention has done since the start. ``blocks_before``, ``blocks_after``: of the sequences it ran on, in the
    groups it ran on; ``bytes_before``, ``bytes_after``: theirs. ``notes_peak_bytes``: the most that was noted when it
    began.
    """

    runs: int = 0
    blocks_before: int = 0
    blocks_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    notes_peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Packed:
    """A group of a sequence, re-packed: its pages, the number of new blocks they take, and the layers' notes."""

    pages: KeptPages
    blocks: int
    notes: dict[int, Notes]


class Retainer:
    """See the module. ``pages_of(g, seq)``: what a group holds of a sequence, an open reservation's blocks included.
    ``follow_growth``: has the memory follow the books after blocks were taken.
    """

    def __init__(
        self,
        method: RetentionMethod,
        groups: Sequence[LayerGroup],
        stores: Sequence[GroupPages],
        manager: CacheManager,
        pages_of: Callable[[int, int], SequencePages],
        follow_growth: Callable[[], None],
    ) -> None:
        self.method = method
        self.stats = RetentionStats()
        self._groups = groups
        self._group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
        self._stores = stores
        self._manager = manager
        self._pages_of = pages_of
        self._follow_growth = follow_growth
        self._notes: dict[int, dict[int, Notes]] = {}  # sequence -> layer -> notes
        self._kept: dict[int, tuple[KeptPages | None, ...]] = {}
        self._facts: dict[int, LayerFacts] = {}

    # ---------------------------------------------------------------------------------------------------- sequences

    def kept(self, g: int, seq: int) -> KeptPages | None:
        """What retention has left of a sequence in a group; None where it has not run."""
        kept = self._kept.get(seq)
        return None if kept is None else kept[g]

    def fork(self, seq: int, child: int) -> None:
        """``child`` shares everything with ``seq``."""
        if seq in self._kept:
            self._kept[child] = self._kept[seq]
        if seq in self._notes:
            self._notes[child] = {layer: notes.copy() for layer, notes in self._notes[seq].items()}

    def free(self, seq: int) -> None:
        """A sequence has ended."""
        self._kept.pop(seq, None)
        self._notes.pop(seq, None)

    def truncate(self, seq: int, length: int) -> None:
        """A sequence was rolled back to ``length`` tokens: notes of tokens that are gone go too."""
        if seq in self._kept:
            ends = [self._manager.kept_end(seq, g) for g in range(len(self._groups))]
            sinks = [spec.sink_end(self._manager.block_size) for spec in self._manager.groups]
            if ends == sinks:  # rolled back to before what retention ever touched
                del self._kept[seq]
        for layer, notes in self._notes.get(seq, {}).items():
            if notes.per_token is not None:
                columns = self._view(self._group_of[layer], layer, seq, length).columns
                notes.per_token = notes.per_token[:, :columns].clone()

    def nbytes(self) -> int:
        """Bytes of all notes."""
        return sum(notes.nbytes for layers in self._notes.values() for notes in layers.values())

    # ----------------------------------------------------------------------------------------------------- watching

    def observe(
        self,
        layer: int,
        seq: int,
        start: int,
        tokens: tuple[Tensor, Tensor, Tensor],
        stored: tuple[Tensor, Tensor],
        call: LayerCall,
        inputs: ForwardInputs,
        replay: tuple[int, int] | None = None,
    ) -> None:
        """Shows the method a layer's part of a forward for one sequence, from position ``start`` on.

        ``tokens``: its queries, keys and values ``[T, H, D]`` as the layer attends with them; ``stored``: keys and
        values as they go to the pages (of latent layers: latent and rotary part). ``replay``: as in `Seen`.
        """
        g = self._group_of[layer]
        if self._manager.groups[g].rule is None:
            return
        q, k, v = tokens
        if call.latent is not None:
            q, k, v = call.latent.query(q), torch.cat(stored, dim=-1), stored[0]
        self._facts[layer] = LayerFacts(
            module=inputs.module,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        view = self._view(g, layer, seq, start, None if replay else (k, v))
        notes = self._notes.setdefault(seq, {}).setdefault(layer, Notes())
        self.method.observe(Seen(view, q, k, v, inputs.hidden, inputs.rotary, replay), notes)

    def noted(self, layer: int, seq: int) -> Notes | None:
        """A copy of what is noted of a sequence in a layer; None if nothing is."""
        notes = self._notes.get(seq, {}).get(layer)
        return None if notes is None else notes.copy()

    def put_back(self, layer: int, seq: int, notes: Notes | None) -> None:
        """Sets the notes of a layer back to what `noted` gave before a step that was abandoned."""
        layers = self._notes.get(seq)
        if layers is None:
            return
        if notes is not None:
            layers[layer] = notes
        else:
            layers.pop(layer, None)

    # ------------------------------------------------------------------------------------------------------ keeping

    def done_until(self, seq: int) -> int:
        """Tokens of a sequence that retention has gone over; 0 if it never ran."""
        if seq not in self._kept:
            return 0
        ends = [self._manager.kept_end(seq, g) for g, kept in enumerate(self._kept[seq]) if kept is not None]
        return max(ends, default=0) * self._manager.block_size

    def would_drop(self, seq: int) -> bool:
        """Whether `run` would drop anything now."""
        return self._manager.has_to_drop(seq)

    def run(self, seq: int, *, final: bool = False) -> bool:
        """Drops what the rule and the method say; whether there was anything to drop. ``final``: as in
        `PagedCache.retain`.

        CacheFullError if there is no room for what is kept beside what it is chosen from; with any error, nothing has
        changed.
        """
        self.stats.notes_peak_bytes = max(self.stats.notes_peak_bytes, self.nbytes())
        keeping = self._manager.reserve_keep(seq)
        if keeping is None:
            if final:
                self._notes.pop(seq, None)
            return False
        try:
            self._follow_growth()
            packed = [self._pack(g, seq, keeping) for g in range(len(self._groups))]
        except BaseException:
            self._manager.rollback_keep(keeping)
            raise
        before = self._held(seq)
        self._manager.keep(
            keeping,
            [0 if each is None else each.blocks for each in packed],
            [0 if each is None else self._entries(g, each) for g, each in enumerate(packed)],
        )
        old = self._kept.get(seq, (None,) * len(packed))
        self._kept[seq] = tuple(was if each is None else each.pages for was, each in zip(old, packed, strict=True))
        for each in packed:
            if each is not None:
                self._notes.setdefault(seq, {}).update(each.notes)
        if final:
            del self._notes[seq]
        self._count(before, self._held(seq))
        return True

    def _entries(self, g: int, packed: _Packed) -> int:
        """Table entries of blocks and pages, biases counted as so many more."""
        biased = 0 if packed.pages.bias is None else self._manager.groups[g].page_entries - 1
        return packed.blocks + packed.pages.flat.numel() * (1 + biased)

    def _held(self, seq: int) -> tuple[int, int]:
        """(blocks, bytes) of a sequence in the groups that retention runs on."""
        blocks = size = 0
        for g, spec in enumerate(self._manager.groups):
            if spec.rule is not None:
                table = self._manager.table(seq, g)
                raw, packed = table.raw_ids.size, table.packed_ids.size
                kept = len(self._manager.kept(seq, g))
                blocks += raw + packed + kept
                packed += kept if spec.seals else 0
                raw += 0 if spec.seals else kept
                size += raw * spec.raw_block_bytes + packed * spec.packed_block_bytes
        return blocks, size

    def _count(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        stats = self.stats
        stats.runs += 1
        stats.blocks_before += before[0]
        stats.bytes_before += before[1]
        stats.blocks_after += after[0]
        stats.bytes_after += after[1]

    def _pack(self, g: int, seq: int, keeping: Keeping) -> _Packed | None:
        end = keeping.end[g]
        if end is None:
            return None
        group, spec, store = self._groups[g], self._manager.groups[g], self._stores[g].kept_store
        size, length = store.fmt.block_size, self._manager.length(seq)
        views = [self._view(g, layer, seq, length, end=end) for layer in group.layers]
        # Copies: what a method changes there while it works is true only once all is done.
        notes = [self._notes.get(seq, {}).get(layer, Notes()).copy() for layer in group.layers]
        scores = []
        for view, note in zip(views, notes, strict=True):
            found = self.method.score(view, note).float()
            scores.append(found.masked_fill(~view.shown[:, view.candidates], -torch.inf))
            view.forget()
        total = spec.kept_pages(length, size)
        counts = dealt(self.method.deal(scores, total, size, group.layers), scores, total, size)
        layout = lay_out(counts.cpu().numpy())
        offset = self._manager.pool(g, spec.kept_state).offset(np.asarray(keeping.blocks[g][: layout.blocks], np.int64))
        there = layout.block >= 0
        addr = np.full(layout.block.shape, -1, np.int64)
        addr[there] = offset[layout.block[there]] + layout.slot[there] * store.fmt.page_bytes
        device = store.arena.device
        lists = torch.from_numpy(addr).to(device)
        biases: list[Tensor | None] = []
        after = {}
        for i, (view, note) in enumerate(zip(views, notes, strict=True)):
            kept = chosen(scores[i], counts[i], size)
            merged = self.method.merge(view, note, scores[i], kept)
            if merged is not None:
                write_merged(store, i, lists[i], kept, merged)
            biases.append(_biases(view, kept, merged))
            self._move(view, kept, lists[i], None if merged is None else ~merged.fresh)
            if store.fmt.summary_dims:
                summarise(store, lists[i].T.reshape(-1), i)
            after[view.layer] = Notes(dict(note.values), _carried(note.per_token, view, kept, int(counts.max()) * size))
            view.forget()
        flat = torch.from_numpy(addr[there]).to(device)
        return _Packed(KeptPages(counts.to(device), flat, _joined(biases, counts.sum(1) * size)), layout.blocks, after)

    def _move(self, view: LayerView, kept: Tensor, lists: Tensor, moved: Tensor | None) -> None:
        """Copies the codes of the ``kept [H, m]`` candidates of a layer to the pages ``lists [H, P]``."""
        store = self._stores[self._group_of[view.layer]].kept_store
        size = store.fmt.block_size
        there = kept >= 0
        if moved is not None:
            there = there & moved
        source, slot = view.page_of((kept + view.candidates.start).clamp_min(0))
        number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        target = lists.gather(1, number // size)
        store.copy_rows(source[there], slot[there], target[there], (number % size)[there])

    # -------------------------------------------------------------------------------------------------------- views

    def _view(
        self,
        g: int,
        layer: int,
        seq: int,
        length: int,
        fresh: tuple[Tensor, Tensor] | None = None,
        *,
        end: int | None = None,
    ) -> LayerView:
        """A layer's first ``length`` tokens, and ``fresh`` ones behind. ``end``: the block before which candidates
        end.
        """
        group, stores = self._groups[g], self._stores[g]
        index = group.layers.index(layer)
        spec, size = self._manager.groups[g], stores.raw.fmt.block_size
        kept, kept_end = self.kept(g, seq), self._manager.kept_end(seq, g)
        sinks = min(length, spec.sink_end(size) * size)
        older = 0 if kept is None else kept.pages * size
        stop = sinks if end is None else sinks + older + (end - kept_end) * size

        def parts() -> list[PagePart]:
            pages = self._pages_of(g, seq).before(length)
            heads, tail = pages.raw.apart(0, sinks)
            found = [self._part(stores, stores.raw, index, heads, sinks)]
            if kept is not None and kept.pages:
                biases = kept.biases(size)
                shown = kept.shown[index].repeat_interleave(size, dim=1)
                lists = kept.lists()[index]
                lists = lists.where(lists >= 0, kept.flat[:1])
                bias = None if biases is None else biases[index]
                found.append(PagePart(stores.kept_store, lists, older, shown, bias))
            if stores.packed is not None:
                found.append(self._part(stores, stores.packed, index, pages.packed, length))
            found.append(self._part(stores, stores.raw, index, tail, length))
            return found

        facts = self._facts.get(layer)
        latent, replaced = group.kind == "latent", None if kept is None else sinks + older
        return LayerView(layer, index, parts, facts, slice(sinks, stop), fresh, latent=latent, replaced=replaced)

    def _part(self, group: GroupPages, store: PageStore, index: int, blocks: Blocks, stop: int) -> PagePart:
        """The columns before position ``stop`` of ``blocks``, which follow each other without a gap."""
        addr = group.addresses(store, blocks.offset) + index * group.layer_bytes(store)
        count, size = blocks.offset.size, store.fmt.block_size
        columns = min(count * size, (count - 1) * size + stop - int(blocks.start[-1])) if count else 0
        return PagePart(store, addr, columns)


def _biases(view: LayerView, kept: Tensor, merged: Merged | None) -> Tensor | None:
    """Biases ``[tokens]`` of what a layer keeps, head by head: those that merging gave, else those that the tokens have
    had; None if none has any.
    """
    if merged is not None:
        return merged.bias[kept >= 0].float()
    if not view.biased:
        return None
    return view.bias[:, view.candidates].gather(1, kept.clamp_min(0))[kept >= 0]


def _joined(biases: Sequence[Tensor | None], tokens: Tensor) -> Tensor | None:
    """The biases of all layers, layer ``i`` with ``tokens[i]`` of them, 0 where it has none; None if no layer has."""
    like = next((each for each in biases if each is not None), None)
    if like is None:
        return None
    counts = tokens.tolist()
    return torch.cat([like.new_zeros(n) if each is None else each for each, n in zip(biases, counts, strict=True)])


def _carried(per_token: Tensor | None, view: LayerView, kept: Tensor, width: int) -> Tensor | None:
    """The numbers ``[H, columns, ...]`` of the tokens that are left, in their new columns: the ``kept [H, m]`` have
    ``width`` of them, as many as those of the layer of the group that keeps most.
    """
    if per_token is None:
        return None
    heads = torch.arange(kept.shape[0], device=kept.device)[:, None]
    middle = per_token[:, view.candidates][heads, kept.clamp_min(0)]
    padding = middle.new_zeros((kept.shape[0], width - kept.shape[1], *middle.shape[2:]))
    middle = torch.cat((middle, padding), dim=1)
    return torch.cat((per_token[:, : view.candidates.start], middle, per_token[:, view.candidates.stop :]), dim=1)
