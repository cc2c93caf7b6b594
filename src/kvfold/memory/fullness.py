"""What is said when the cache is full: in tokens and bytes, which its user can do something about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvfold.errors import CacheFullError
from kvfold.formats import format_bytes
from kvfold.memory.books import Books
from kvfold.memory.capacity import Capacity, budget_for

__all__ = ["saying_what_fits"]


@contextmanager
def saying_what_fits(
    books: Books, capacity: Callable[[], Capacity], budget: int, what: str, wanted: tuple[int, int, int]
) -> Iterator[None]:
    """A CacheFullError from within says that ``what`` was asked for, what fits in ``budget`` bytes, and which budget
    would do for what is ``wanted`` (sequences of how many tokens, read in steps of how many, and how many sequences)
    together with the other sequences there are.
    """
    try:
        yield
    except CacheFullError as error:
        longest, chunk, sequences = wanted
        lengths = [state.length for state in books.sequences.values()]
        longest, count = max(longest, *lengths, 0), max(sequences, len(lengths))
        size = budget_for(books.specs, books.block_size, length=longest, chunk=max(1, chunk), sequences=count)
        raise CacheFullError(
            f"the KV cache is full: no room for {what}" + (f" of {sequences} sequences" if sequences > 1 else ""),
            why=f"{format_bytes(budget)} hold {capacity().tokens():,} tokens of one sequence; "
            f"{sum(lengths):,} tokens of {len(lengths)} sequence{'' if len(lengths) == 1 else 's'} are there",
            hint=f"end or shorten some sequence, raise the budget (at least {format_bytes(size)} for {count} x "
            f"{longest:,} tokens), or choose a recipe with fewer bits",
        ) from error
