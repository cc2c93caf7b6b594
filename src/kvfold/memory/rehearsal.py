"""Whether a lone sequence gets there: its steps, taken on books that nobody else uses."""

from __future__ import annotations

from kvfold.memory import keeping, sharing, steps
from kvfold.memory.books import Books
from kvfold.memory.table import SeqId

__all__ = ["rehearse"]


def rehearse(books: Books, total_tokens: int, chunk: int, prompt: int) -> bool:
    """Whether a sequence in the empty ``books`` gets to ``total_tokens`` tokens in steps of at most ``chunk``, with
    retention where its rule has it run on a prompt of ``prompt`` tokens.
    """
    rule = next((spec.rule for spec in books.specs if spec.rule is not None), None)
    seq = sharing.create(books)
    state = books.state(seq)
    while state.length < total_tokens:
        point = None if rule is None else rule.next_point(state.length, prompt)
        end = total_tokens if point is None else min(total_tokens, point)
        quiet = (min(state.quiet_until, end) - state.length) // chunk * chunk
        state.expected = min(end, prompt) if state.length < prompt else 0
        step = min(max(chunk, quiet), end - state.length)  # steps that change nothing are one
        if not books.fits(steps.demand(books, state, step)):
            return False
        reservation = steps.reserve(books, ((seq, step),))[0]
        books.finish(steps.commit(books, reservation, None, None))
        if state.length == point and not _keep(books, seq):
            return False
    return True


def _keep(books: Books, seq: SeqId) -> bool:
    """Retention that keeps all it may; whether there was room."""
    if not books.fits(keeping.demand_keep(books, books.state(seq).length)):
        return False
    kept = keeping.reserve_keep(books, seq)
    if kept is not None:
        blocks = [len(each) for each in kept.blocks]
        pages = [spec.pages * spec.page_entries for spec in books.specs]
        keeping.keep(books, kept, blocks, [n * (1 + size) for n, size in zip(blocks, pages, strict=True)])
    return True
