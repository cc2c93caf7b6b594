"""How a prompt is cut into chunks, and which of its tokens may come from the prefix index.

Retention runs at points that depend on the request alone, and no chunk crosses one. What a request may take from the
index ends where its own blocks are final once its prompt is stored. If requests are to be repeatable, a chunk ends
there too: the tokens behind are then computed from the same stored blocks, by the same forward, whether those were
found or just written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.memory.manager import GroupSpec
from kvfold.rule import KeepRule

__all__ = ["Chunking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """``groups``: layer groups of the cache, whose packing decides which blocks are final. ``rule``: when retention
    runs; None: never. ``watches``: tokens before such a point that its method has to see, None: all of them (see
    `RetentionMethod.watches`). ``prefix_caching``: whether blocks are taken from the prefix index at all.
    ``repeatable``: see above.
    """

    groups: Sequence[GroupSpec]
    block_size: int
    rule: KeepRule | None = None
    watches: int | None = 0
    prefix_caching: bool = True
    repeatable: bool = True

    def next_point(self, start: int, context: int) -> int | None:
        """The first length beyond ``start`` at which retention runs, for a context of ``context`` tokens."""
        return None if self.rule is None else self.rule.next_point(start, context)

    def expected(self, start: int, length: int, context: int) -> int:
        """The length up to which a prompt of ``length`` tokens is read before retention changes what is stored."""
        return min(length, self.next_point(start, context) or length)

    def final(self, length: int) -> int:
        """Tokens at the start of a sequence of ``length`` tokens whose blocks are final, so that others find them."""
        size = self.block_size
        whole = length // size * size
        return min([whole, *(group.packed_end(length, size) * size for group in self.groups if group.seals)])

    def shareable(self, length: int, context: int) -> int:
        """Tokens that a prompt of ``length`` tokens may take from the prefix index: whole final blocks, never all
        tokens, and only from before the first retention point, less what its method has to see.
        """
        point = self.next_point(0, context)
        if not self.prefix_caching or (point is not None and self.watches is None):
            return 0
        free = length if point is None else min(length, point - (self.watches or 0))
        return min(self.final(self.expected(0, length, context)), max(0, free - 1) // self.block_size * self.block_size)

    def end(self, start: int, length: int, context: int, budget: int) -> int:
        """Where the chunk from ``start`` on ends, for a prompt of ``length`` tokens and at most ``budget`` of them: at
        the end, at the next retention point, where what may be shared ends (if repeatable), or where the budget does,
        then at the end of a block if there is one.
        """
        end = self.expected(start, length, context)
        shareable = self.shareable(length, context) if self.repeatable else 0
        if start < shareable:
            end = min(end, shareable)
        if end - start <= budget:
            return end
        whole = (start + budget) // self.block_size * self.block_size
        return whole if whole > start else start + budget
