"""What a retention method is: it watches forwards, scores tokens, deals pages to heads, and may merge what is dropped.

A method is one file of ``methods/`` named after its recipe word, with one subclass of `RetentionMethod` in it: a frozen
dataclass whose fields are its options. Methods that build on another one (``adakv(snapkv)``) have it as ``inner``.

Shapes here: ``T`` new tokens, ``Hq`` query heads, ``H`` KV heads, ``D`` key dims (latent layers: latent and rotary part
side by side), ``n`` candidates, ``L`` layers of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from kvfold.retention.dealing import pages_there

if TYPE_CHECKING:
    from kvfold.geometry import Geometry
    from kvfold.retention.view import LayerView

__all__ = ["Composed", "Merged", "Notes", "RetentionMethod", "Seen"]


@dataclass(slots=True)
class Notes:
    """What a method keeps of one sequence in one layer between forwards, and what it costs.

    ``values``: tensors under names of the method's own. ``per_token [H, columns, ...]``: a number, or several, for each
    token of each head, in the order of the view's columns; the runtime carries it along when tokens move, and cuts it
    when they are rolled back. Tensors are replaced, never written to: forks share them.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    per_token: Tensor | None = None

    def copy(self) -> Notes:
        """The notes of a fork."""
        return Notes(dict(self.values), self.per_token)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        held = [*self.values.values(), *([] if self.per_token is None else [self.per_token])]
        return sum(x.nbytes for x in held)


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer's part of a forward, for one sequence: what its ``T`` new tokens brought.

    ``q [T, Hq, D]`` and ``k [T, H, D]`` as the layer attends with them (rotary phases in), ``v [T, H, Dv]``. ``view``:
    all columns, the new tokens the last of them. ``hidden [T, E]``, the layer's input to its attention, and ``rotary
    (cos, sin)``, each ``[T, R]``, with which it turned queries and keys, only for methods that ask for them.
    ``replay``: the tokens ``[start, stop)`` of the context that are being repeated; ``T`` is then the instruction and
    those, they are not among the columns, and ``k``, ``v`` are those of the repetition.
    """

    view: LayerView
    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    replay: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Merged:
    """What takes the place of the kept tokens of one layer: ``k [H, m, D]``, ``v [H, m, Dv]``, in the model's basis,
    ``bias [H, m]`` added to their scores in the place of what biases they have had, and ``fresh [H, m]``: which of them
    are to be encoded anew; the codes of the others are moved, their ``k`` and ``v`` not looked at.
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    fresh: Tensor


class RetentionMethod(ABC):
    """A way to choose what stays. Stateless: what is learnt of a sequence goes to its `Notes`. A dataclass: its fields
    are the options, those of type ``RetentionMethod`` methods it builds on, those of type ``str`` names of files.
    """

    query_aware: ClassVar[bool] = False
    """Whether the result hangs on queries of this request, so that it must not be shared with others."""
    wants_hidden: ClassVar[bool] = False
    """Whether `observe` needs the hidden states, or the rotary embedding."""
    watches: ClassVar[int | None] = 0
    """Latest tokens before a retention point whose forwards it must have observed; None: all tokens. Blocks of these
    are computed, not taken from the prefix index.
    """
    replays: ClassVar[bool] = False
    """Whether the context is to be repeated to the model before it is scored (see `Seen.replay`)."""
    merges: ClassVar[bool] = False
    """Whether `merge` gives anything: kept tokens then have logit biases."""

    def refusals(self, geometry: Geometry) -> list[str]:
        """Every reason why the method cannot serve a model of this geometry."""
        return []

    def model_refusals(self, model: nn.Module) -> list[str]:
        """Every reason why the method cannot serve this very model, whose geometry it can."""
        return []

    def observe(self, seen: Seen, notes: Notes) -> None:  # noqa: B027 - many methods watch nothing
        """Takes note of a forward; called for every layer and sequence, after the layer has attended."""

    @abstractmethod
    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """``[H, n]``, float32: how much each candidate matters; the greater stay. Padding may have any value."""

    def deal(self, scores: Sequence[Tensor], pages: int, size: int, layers: Sequence[int]) -> Tensor:
        """How many pages of ``size`` tokens each head keeps: int64 ``[L, H]``, at most ``pages`` in all.

        ``scores[l] [H, n]``, of the model's layer ``layers[l]``: minus infinity at padding. By default all heads get
        equally many.
        """
        have = pages_there(scores, size)
        return have.clamp(max=pages // have.numel())

    def merge(self, view: LayerView, notes: Notes, scores: Tensor, kept: Tensor) -> Merged | None:
        """What is to stand in the place of the ``kept [H, m]`` candidates (numbers, rising; -1: none) of ``scores
        [H, n]``, so that the others are not merely lost; None: just those.
        """
        return None


@dataclass(frozen=True)
class Composed(RetentionMethod):
    """A method that builds on ``inner`` and does what that does, but for what it overrides."""

    inner: RetentionMethod

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """As the inner one."""
        return self.inner.query_aware

    @property
    def wants_hidden(self) -> bool:  # type: ignore[override]
        """As the inner one."""
        return self.inner.wants_hidden

    @property
    def watches(self) -> int | None:  # type: ignore[override]
        """As the inner one."""
        return self.inner.watches

    @property
    def replays(self) -> bool:  # type: ignore[override]
        """As the inner one."""
        return self.inner.replays

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """As the inner one."""
        return self.inner.merges

    def refusals(self, geometry: Geometry) -> list[str]:
        """As the inner one."""
        return self.inner.refusals(geometry)

    def model_refusals(self, model: nn.Module) -> list[str]:
        """As the inner one."""
        return self.inner.model_refusals(model)

    def observe(self, seen: Seen, notes: Notes) -> None:
        """As the inner one."""
        self.inner.observe(seen, notes)

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """As the inner one."""
        return self.inner.score(view, notes)

    def deal(self, scores: Sequence[Tensor], pages: int, size: int, layers: Sequence[int]) -> Tensor:
        """As the inner one."""
        return self.inner.deal(scores, pages, size, layers)

    def merge(self, view: LayerView, notes: Notes, scores: Tensor, kept: Tensor) -> Merged | None:
        """As the inner one."""
        return self.inner.merge(view, notes, scores, kept)
