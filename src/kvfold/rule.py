"""When retention runs on a sequence, and how much of it stays: plain arithmetic, shared by books, scheduler and cache.

Sinks, the recent tokens and what shares their blocks always stay and count as kept. Between them lie the *candidates*,
whole blocks ``[sink_blocks, sealed_until)``; what is kept of those is dealt out in whole pages, for a page is what
memory is freed by.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.formats import sealed_until, sink_blocks

__all__ = ["KeepRule"]


@dataclass(frozen=True, slots=True)
class KeepRule:
    """How many tokens a head keeps on average: the share ``keep`` of a sequence, or ``budget`` tokens; one is given.

    Retention runs at the end of the prompt; with ``chunk``, also after every so many tokens of it, so that a prompt
    longer than the memory can be read; with ``every``, after every so many tokens behind it. 0: never.
    """

    keep: float | None = None
    budget: int | None = None
    every: int = 0
    chunk: int = 0

    def tokens(self, length: int) -> int:
        """Tokens that a head keeps of a sequence of ``length`` tokens, on average and at most."""
        return min(length, int(length * self.keep) if self.keep is not None else self.budget or 0)

    def pages(self, length: int, heads: int, *, block_size: int, sinks: int, recent: int) -> int:
        """Pages that all ``heads`` (of all layers of a group) together keep of their candidates."""
        first, end = sink_blocks(sinks, block_size), sealed_until(length, block_size, sinks, recent)
        if end <= first:
            return 0
        protected = length - (end - first) * block_size
        spare = max(0, self.tokens(length) - protected)
        return min(heads * (end - first), heads * spare // block_size)

    def next_point(self, length: int, prompt: int) -> int | None:
        """The first length beyond ``length`` at which retention runs on a sequence whose prompt has ``prompt`` tokens;
        None if there is none.
        """
        if length < prompt:
            return min(prompt, (length // self.chunk + 1) * self.chunk) if self.chunk else prompt
        return prompt + ((length - prompt) // self.every + 1) * self.every if self.every else None
