"""Repeating a context to a model that has read it, for retention methods that watch how (see `Seen.replay`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from kvfold.cache import PagedCache, SequenceWork
from kvfold.errors import CacheFullError, RequestError
from kvfold.packed import PackedModel
from kvfold.rotary import Lengths

__all__ = ["INSTRUCTION", "replay"]

INSTRUCTION: Final = "\n\nRepeat the previous context exactly."
"""What is said before a repetition, where there is a tokenizer to say it with (arXiv 2505.23416)."""

_LEAD = 8  # tokens before a chunk, so that the model finds where it is
_LEAST_CHUNK = 32  # below, the instruction costs more than the chunk


def replay(
    packed: PackedModel,
    cache: PagedCache,
    seq: int,
    tokens: Sequence[int],
    instruction: Sequence[int] = (),
    *,
    first: int = 0,
    chunk: int = 2048,
    lengths: Lengths | None = None,
) -> None:
    """Shows the retention method of ``cache`` how the model repeats ``tokens``, all that ``seq`` has read, from token
    ``first`` on: those before an earlier retention need not be repeated again.

    For each ``chunk`` of them, the model reads ``instruction``, the few tokens before the chunk and the chunk, at the
    positions behind the context, on a fork in a step that is abandoned. Chunks are smaller where the positions of the
    model or the room in the cache do not allow more. Afterwards, and after any error, blocks and books are as before;
    only the notes of ``seq`` have grown. ``lengths``: what the rotary factors of ``seq`` follow from, and those of the
    repetition; None: they are those of one forward. RequestError if the model has no positions left, CacheFullError if
    there is no room.
    """
    length = cache.length(seq)
    if len(tokens) != length or not 0 <= first < length:
        raise RequestError(f"repeating {len(tokens)} tokens from {first} on", why=f"the sequence holds {length}")
    spare = cache.geometry.max_positions - length - len(instruction) - _LEAD
    if spare < min(_LEAST_CHUNK, length - first):
        raise RequestError(
            f"repeating a context of {length} tokens",
            why=f"the model has {cache.geometry.max_positions} positions, and the repetition comes behind",
            hint="give it a shorter context, or retain by a method that does not repeat it",
        )
    chunk = max(1, min(chunk, spare))
    count = length - first
    chunk = -(-count // -(-count // chunk))  # as many, but none of them a crumb
    start = first
    lengths = Lengths.whole(length) if lengths is None else lengths._replace(fixed=True)
    while start < length:
        stop = min(start + chunk, length)
        said = [*instruction, *tokens[max(0, start - _LEAD) : start], *tokens[start:stop]]
        try:
            _repeat(packed, cache, seq, said, (start, stop), lengths)
        except CacheFullError:
            if chunk <= _LEAST_CHUNK:
                raise
            chunk = max(_LEAST_CHUNK, chunk // 2)
        else:
            start = stop


def _repeat(
    packed: PackedModel,
    cache: PagedCache,
    seq: int,
    said: Sequence[int],
    part: tuple[int, int],
    lengths: Lengths,
) -> None:
    fork = cache.fork(seq)
    try:
        step = cache.begin([SequenceWork(fork, len(said), replay=(seq, *part))])
        try:
            ids = torch.tensor(said, device=cache.device)
            positions = torch.arange(len(said), device=cache.device) + cache.length(seq)
            packed.forward(step, ids, positions, ids.new_empty(0), [len(said)], [lengths])
        finally:
            cache.abandon(step)
    finally:
        cache.free(fork)
