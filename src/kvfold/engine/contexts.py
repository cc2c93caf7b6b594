"""Contexts that are read once and shared: their blocks, compressed if the recipe says so, begin many requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.engine.chunks import Chunking
from kvfold.engine.runner import ModelRunner, SeqWork, not_finite
from kvfold.errors import UnsupportedError
from kvfold.rotary import Lengths

__all__ = ["Context", "read_context"]


@dataclass(slots=True, eq=False)
class Context:
    """A text that an engine holds for requests to begin with: its ``tokens``, and the sequence of the cache that keeps
    their blocks. Only requests of the same ``salt`` may have it, and go on from it as long as their rotary factors are
    those ``factors``; longer ones read its tokens again.
    """

    tokens: tuple[int, ...]
    seq: int
    salt: bytes
    factors: bytes = b""
    stale: bool = False
    """Whether the prefix cache was reset since: the model has other weights."""


def read_context(runner: ModelRunner, chunking: Chunking, tokens: Sequence[int], budget: int, salt: bytes) -> Context:
    """Computes ``tokens`` in the chunks that ``chunking`` makes of a prompt of them, of at most ``budget`` tokens each,
    and runs retention where it would run on that.

    UnsupportedError if the recipe's method chooses by the queries of a request; CacheFullError, with the cache as it
    was, if there is no room; NumericsError if the model's logits are not finite.
    """
    retainer = runner.cache.retainer
    if retainer is not None and retainer.method.query_aware:
        why = "its retention chooses by the queries of a request, so that every request needs a choice of its own"
        hint = "take a query-agnostic method: kvzip, learned, keydiff, duo"
        raise UnsupportedError(f"a shared context under {runner.cache.recipe}", why=why, hint=hint)
    lengths = Lengths(len(tokens), len(tokens))
    seq = runner.create()
    try:
        start, length = 0, len(tokens)
        while start < length:
            runner.expect(seq, chunking.expected(start, length, length))
            end = chunking.end(start, length, length, budget)
            _read(runner, SeqWork(seq, tokens[start:end], start, salt, end == length, lengths=lengths))
            if end == chunking.next_point(start, length):
                runner.retain(seq, tokens[:end])
            start = end
    except BaseException:
        runner.free(seq)
        raise
    return Context(tuple(tokens), seq, salt, runner.rotary.key(lengths))


def _read(runner: ModelRunner, part: SeqWork) -> None:
    if runner.run([part]).broken:
        raise not_finite("a shared context", f"its first {part.start + len(part.tokens)} tokens")
