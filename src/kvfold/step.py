"""One forward over some sequences on the paged cache: takes every layer's new keys and values, answers attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.pieces import LayerCall
from kvfold.attention.rows import FewRows, PrefillRows, attend_rows
from kvfold.attention.tables import RowWrite
from kvfold.geometry import Geometry
from kvfold.kernels.registry import OpRegistry
from kvfold.memory.manager import Reservation
from kvfold.retainer import ForwardInputs, Retainer
from kvfold.retention.method import Notes

__all__ = ["GroupStep", "SequenceWork", "Step", "StepLayers"]


@dataclass(frozen=True, slots=True)
class SequenceWork:
    """``count`` new tokens of sequence ``seq`` in one step. ``watched``: retention will run on it some time later, so
    that its method has to see them. ``replay``: a fork of this sequence repeats tokens ``[start, stop)`` of the context
    (see `kvfold.retention.method.Seen`), in a step that will be abandoned.
    """

    seq: int
    count: int
    watched: bool = True
    replay: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class GroupStep:
    """What a step does in one layer group: where new tokens go, and who attends how."""

    writes: list[RowWrite]
    few: list[FewRows]
    prefill: list[PrefillRows]


@dataclass(frozen=True, slots=True)
class StepLayers:
    """What is the same in every step: the model's layers, where each one's pages are, and the kernels.

    ``slots``: layer -> (group, layer within the group) whose pages it reads. ``dtype``: of the rows that pages take.
    """

    geometry: Geometry
    slots: Mapping[int, tuple[int, int]]
    registry: OpRegistry
    dtype: torch.dtype

    def slot(self, layer: int) -> tuple[int, int]:
        """(group, layer within the group) whose pages a layer reads."""
        return self.slots[layer]


class Step:
    """One forward over some sequences, whose new tokens lie one sequence after the other: ``N`` rows in all.

    ``work``: what they are, in the order of ``reservations``. ``retainer``: whose method watches; None: nobody does.
    ``check_finite``: note whether the stored rows are finite numbers, for :meth:`finite`.
    """

    def __init__(
        self,
        layers: StepLayers,
        reservations: Sequence[Reservation],
        groups: Sequence[GroupStep],
        work: Sequence[SequenceWork],
        retainer: Retainer | None,
        *,
        check_finite: bool = False,
    ) -> None:
        self.layers = layers
        self.reservations = tuple(reservations)
        self._groups = groups
        self._retainer = retainer
        self._watched: list[tuple[Reservation, SequenceWork, slice]] = []
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._check_finite = check_finite
        self._sums: list[Tensor] = []  # of each stored row: not finite if any number of it is not
        self._noted: list[tuple[int, int, Notes | None]] = []  # what was noted before this step, by layer and sequence
        first = 0
        for r, item in zip(reservations, work, strict=True):
            if item.watched and retainer is not None:
                self._watched.append((r, item, slice(first, first + r.new_tokens)))
            first += r.new_tokens

    @property
    def wants_inputs(self) -> bool:
        """Whether `attend` is to be told what the layer's attention was given."""
        return bool(self._watched) and self._retainer is not None and self._retainer.method.wants_hidden

    @property
    def differentiable(self) -> bool:
        """Whether attention reads nothing but the step's own rows, as the layers have made them: gradients flow."""
        return all(r.start == 0 and r.new_tokens > 1 for r in self.reservations)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores a layer's new keys and values, ``k [N, Hkv, Dk]`` and ``v [N, Hkv, Dv]``."""
        g, index = self.layers.slot(layer)
        for write in self._groups[g].writes:
            write(index, k, v)
        if self._check_finite:
            self._sums += [rows.sum((1, 2), dtype=torch.float32) for rows in (k, v)]
        if self._watched:
            self._stored[layer] = (k, v)

    def finite(self) -> list[bool]:
        """For each reservation, whether all its keys and values were finite numbers, in every layer.

        Attention does not always show one that is not: it has no weight where every query meets it with minus
        infinity. All True without ``check_finite``.
        """
        if not self._sums:
            return [True] * len(self.reservations)
        rows = torch.stack(self._sums).isfinite().all(0).tolist()
        found, first = [], 0
        for r in self.reservations:
            found.append(all(rows[first : first + r.new_tokens]))
            first += r.new_tokens
        return found

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: LayerCall, inputs: ForwardInputs | None = None
    ) -> Tensor:
        """A layer's attention: ``q [N, Hq, D]`` over the pages and the fresh ``k, v [N, H, D]``; ``[N, Hq, Dv]``.

        The layer's new keys and values must have been written before. ``inputs``: what its attention was given, for
        retention.
        """
        g, index = self.layers.slot(layer)
        group = self._groups[g]
        out = attend_rows(q, k, v, index, group.few, group.prefill, call, self.layers.registry)
        if (stored := self._stored.pop(layer, None)) is not None and inputs is not None:
            self._show(layer, (q, k, v), stored, call, inputs)
        return out

    @torch.no_grad()
    def _show(
        self,
        layer: int,
        tokens: tuple[Tensor, Tensor, Tensor],
        stored: tuple[Tensor, Tensor],
        call: LayerCall,
        inputs: ForwardInputs,
    ) -> None:
        """Shows retention what the layer has attended with."""
        if self._retainer is None:
            return
        q, k, v = tokens
        for r, item, rows in self._watched:
            seq, replay = (item.replay[0], item.replay[1:]) if item.replay else (r.seq, None)
            if item.replay is None:
                self._noted.append((layer, seq, self._retainer.noted(layer, seq)))
            of_rows = (q[rows], k[rows], v[rows]), (stored[0][rows], stored[1][rows])
            self._retainer.observe(layer, seq, r.start, *of_rows, call, inputs.of(rows), replay)

    def undo(self) -> None:
        """Takes back what retention has noted in this step, when it is abandoned. Notes of a repetition stay."""
        while self._noted and self._retainer is not None:
            self._retainer.put_back(*self._noted.pop())
