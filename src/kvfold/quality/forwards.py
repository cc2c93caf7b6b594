"""How given tokens go through the runtime so that a score is the recipe's: the one rule of everything that scores text.

Behind its prompt a text goes in as decoding would read it. Retrieval chooses only for a forward of one token, so a
recipe with retrieval is scored token by token. Everything else sees in small chunks nearly what decoding sees: chunks
end where retention runs, and what it drops is gone for the next. A figure of a recipe counts only if each of its
methods acted before or while tokens were scored (`Watch`): else it would be the figure of a cache without the method.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvfold.cache import PagedCache
from kvfold.quality.contestant import SCORED_TOKENS
from kvfold.recipe import Recipe

__all__ = ["Watch", "forwards", "scored_tokens"]


def scored_tokens(recipe: Recipe) -> int:
    """Tokens of one forward behind the prompt."""
    return SCORED_TOKENS if recipe.retrieval is None else 1


def forwards(recipe: Recipe, length: int, *, prompt: int, prefill: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The forwards of ``length`` tokens, from ``start`` on: the first ``prompt`` in chunks of ``prefill``, then as
    `scored_tokens`; none crosses a point of retention.
    """
    rule = recipe.rule
    while start < length:
        end, size = (prompt, prefill) if start < prompt else (length, scored_tokens(recipe))
        point = None if rule is None else rule.next_point(start, prompt)
        stop = min(start + size, end, point or end)
        yield start, stop
        start = stop


class Watch:
    """Which methods of a cache's recipe have acted since it was made.

    Retention acts by dropping blocks, retrieval by leaving pages unread.
    """

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self._dropped = False

    def before_scoring(self) -> None:
        """Tokens are scored next: what retention has dropped by now shows in them."""
        if self._cache.retainer is not None:
            stats = self._cache.retainer.stats
            self._dropped = stats.blocks_after < stats.blocks_before

    @property
    def idle(self) -> tuple[str, ...]:
        """The methods that have not acted."""
        recipe, retriever = self._cache.recipe, self._cache.retriever
        found = []
        if recipe.retention is not None and not self._dropped:
            found.append(str(recipe.retention))
        if recipe.retrieval is not None and (retriever is None or retriever.selections == 0):
            found.append(str(recipe.retrieval))
        return tuple(found)
