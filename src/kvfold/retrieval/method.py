"""What a retrieval method is: at every step and layer it chooses which of the older pages are read. All are kept.

A method is one file of ``methods/`` named after its recipe word, with one subclass of `RetrievalMethod` in it: a frozen
dataclass whose fields are its options. Sinks, recent tokens and the first ``dense`` layers are always read, as is
everything by chunks of a prompt.

Shapes here: ``n`` sequences with one new token each, ``Hq`` query heads, ``H`` KV heads, ``P`` candidate pages, ``m``
of which a method names by their places in a list (-1: none).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from kvfold.kernels.merge import Piece

if TYPE_CHECKING:
    from kvfold.geometry import Geometry

__all__ = ["PagesView", "RetrievalMethod"]


class PagesView(Protocol):
    """The candidates of some sequences in one layer, as a method sees them."""

    layer: int
    """Place of the layer in its group."""
    positions: Tensor
    """``[n]``, int64: positions of the new tokens."""
    rest: Piece
    """What has been attended to already: ``o [n, Hq, Dv]``, ``lse [n, Hq]``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n, H, P)``."""
        ...

    @property
    def there(self) -> Tensor:
        """bool ``[n, H, P]``: which places hold a page."""
        ...

    @property
    def bounds(self) -> Tensor:
        """``[n, H, P]``: logits that no query of a head's group exceeds on any token of a page."""
        ...

    def best(self, count: int) -> Tensor:
        """Places ``[n, H, k]``, rising, of the ``count`` pages with the greatest bounds."""
        ...

    def attend(self, places: Tensor) -> Piece:
        """Attention over the pages at ``places [n, H, m]``: ``o [n, Hq, Dv]``, ``lse [n, Hq]``."""
        ...

    def each(self, places: Tensor) -> Piece:
        """The same over every page on its own: ``o [n, m, Hq, Dv]``, ``lse [n, m, Hq]``."""
        ...


@dataclass(frozen=True)
class RetrievalMethod(ABC):
    """A way to choose what is read. Stateless, and a dataclass: its fields are the options.

    ``pages``: so many each KV head reads at least. ``dense``: layers of the model, from the first on, that read all.
    """

    pages: int = 64
    dense: int = 2

    def __post_init__(self) -> None:
        if self.pages < 1:
            raise ValueError("pages must be at least 1")
        if self.dense < 0:
            raise ValueError("dense must not be negative")

    @property
    def least(self) -> int:
        """Candidates of a sequence up to which all are read, without asking the method."""
        return self.pages

    def refusals(self, geometry: Geometry) -> list[str]:
        """Every reason why the method cannot serve a model of this geometry."""
        full = [layer.index for layer in geometry.layers if layer.stores and layer.window is None]
        if not full:
            return ["every layer has a window: there is no past for retrieval to choose from"]
        if self.dense > max(full):
            return [f"the first {self.dense} layers read all, and no layer behind them lacks a window"]
        return []

    @abstractmethod
    def attend(self, view: PagesView) -> Piece:
        """Attention over the candidates, or what stands for it: ``o [n, Hq, Dv]``, ``lse [n, Hq]``."""
