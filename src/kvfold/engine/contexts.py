"""Contexts that are read once and shared: their blocks, compressed if the recipe says so, begin many requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.errors import UnsupportedError
from kvfold.rotary import Lengths
from kvfold.rule import KeepRule

__all__ = ["Context", "read_context"]


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """A text that an engine holds for requests to begin with: its ``tokens``, and the sequence of the cache that keeps
    their blocks. Only requests of the same ``salt`` may have it, and go on from it as long as their rotary factors are
    those ``factors``; longer ones read its tokens again.
    """

    tokens: tuple[int, ...]
    seq: int
    salt: bytes
    factors: bytes = b""


def read_context(runner: ModelRunner, rule: KeepRule | None, tokens: Sequence[int], chunk: int, salt: bytes) -> Context:
    """Computes ``tokens`` in steps of at most ``chunk``; retention runs where ``rule`` has it run on a prompt of them.

    UnsupportedError if the recipe's method chooses by the queries of a request; CacheFullError, with the cache as it
    was, if there is no room.
    """
    retainer = runner.cache.retainer
    if retainer is not None and retainer.method.query_aware:
        why = "its retention chooses by the queries of a request, so that every request needs a choice of its own"
        hint = "take a query-agnostic method: kvzip, learned, keydiff, duo"
        raise UnsupportedError(f"a shared context under {runner.cache.recipe}", why=why, hint=hint)
    lengths = Lengths(len(tokens), len(tokens))
    seq = runner.create()
    try:
        start = 0
        while start < len(tokens):
            point = None if rule is None else rule.next_point(start, len(tokens))
            end = min(len(tokens), start + chunk, point or len(tokens))
            last = end == len(tokens)
            runner.execute([SeqWork(seq, tokens[start:end], start, salt, last, lengths=lengths)])
            if end == point:
                runner.retain(seq, tokens[:end])
            start = end
    except BaseException:
        runner.free(seq)
        raise
    return Context(tuple(tokens), seq, salt, runner.rotary.key(lengths))
