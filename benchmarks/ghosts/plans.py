"""How a budget of bytes is spent on tokens: pages of one format, or of one for the best tokens and one for the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.tables import group_pages
from kvfold.codecs.pages import PageStore
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe

__all__ = ["Coded", "Plan", "plans"]

_SHARES = (0.75, 0.5, 0.25)
"""How much of its pages a mixture keeps; ghosts take the bytes of the others."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A head's best ``pages`` of tokens in format ``word``, and its next best ``ghost_pages`` in ``ghost_word``."""

    word: str
    pages: int
    ghost_word: str = ""
    ghost_pages: int = 0

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Formats and their pages, best tokens first."""
        return tuple(
            (word, pages) for word, pages in ((self.word, self.pages), (self.ghost_word, self.ghost_pages)) if pages
        )

    @property
    def name(self) -> str:
        """For people."""
        ghosts = f" + {self.ghost_pages} ghost pages {self.ghost_word}" if self.ghost_pages else ""
        return f"{self.pages} pages {self.word}{ghosts}"


class Coded:
    """The format of a recipe's packed pages as a function of tokens, through the page stores of the runtime."""

    def __init__(self, geometry: Geometry, word: str, folder: str, *, heads: int) -> None:
        recipe = Recipe.of(word, folder)
        self.word, self.heads = word, heads
        self.size = recipe.block_size
        self._places: dict[int, tuple[PageStore, int]] = {}
        for group in geometry.groups(recipe, torch.float32.itemsize):
            stored = group_pages(group, torch.zeros(0, dtype=torch.uint8), torch.float32, recipe.calibration).packed
            if stored is None:
                raise ValueError(f"{word} packs nothing")
            self._places |= {layer: (stored, index) for index, layer in enumerate(group.layers)}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in every layer and head."""
        return self.heads * sum(store.fmt.page_bytes for store, _ in self._places.values())

    def read_back(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H, m, D]`` of whole pages, encoded and decoded."""
        store, index = self._places[layer]
        count = k.shape[1] // self.size * self.heads
        store.rebind(torch.zeros(count * store.fmt.page_bytes, dtype=torch.uint8))
        addr = torch.arange(count) * store.fmt.page_bytes
        # [H, m, D] -> [P * H, S, D], heads fastest
        pages = [x.unflatten(1, (-1, self.size)).transpose(0, 1).flatten(0, 1) for x in (k, v)]
        store.write_pages(addr, *pages, index)
        found = store.decode_pages(addr, index)
        k, v = (x.unflatten(0, (-1, self.heads)).transpose(0, 1).flatten(1, 2) for x in found)
        return k, v


def plans(codes: Sequence[Coded], pages: int, most: int) -> list[Plan]:
    """Ways to spend the bytes of ``pages`` pages of the first of ``codes``, out of ``most`` pages of tokens.

    All of it for the first format; all of it for each other one; and mixtures of the first with ghosts in each 2-bit
    one.
    """
    best, budget = codes[0], pages * codes[0].page_bytes
    found = [Plan(best.word, pages)]
    found += [Plan(code.word, min(most, budget // code.page_bytes)) for code in codes[1:]]
    for code in codes[1:]:
        for share in _SHARES if code.word.startswith("int2") else ():
            kept = round(share * pages)
            ghosts = min(most - kept, (budget - kept * best.page_bytes) // code.page_bytes)
            found.append(Plan(best.word, kept, code.word, ghosts))
    return found
