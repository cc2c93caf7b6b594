"""Teacher forcing through the same paged runtime that serves: given tokens in, every position's logits out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.engine.runner import ModelRunner, SeqWork

__all__ = ["Forced", "teacher_force"]

CHUNK_TOKENS = 32
"""Tokens per forward. A chunk attends to its past as it is stored, so small chunks see nearly what decoding sees."""


@dataclass(frozen=True, slots=True)
class Forced:
    """Logits ``[N, V]`` of the scored positions, the bytes the cache held at the end, and the speed of single-token
    steps.
    """

    logits: Tensor
    kv_bytes: int
    decode_tok_s: float


def teacher_force(
    runner: ModelRunner,
    tokens: Sequence[int],
    *,
    score_from: int,
    decode_steps: int = 0,
) -> Forced:
    """Feeds ``tokens`` to a new sequence and frees it again.

    ``score_from``: the first position whose logits are kept. ``decode_steps``: greedy single-token steps timed after
    the tokens.
    """
    seq = runner.create()
    kept: list[Tensor] = []
    try:
        last: Tensor | None = None
        for start in range(0, len(tokens), CHUNK_TOKENS):
            chunk = tokens[start : start + CHUNK_TOKENS]
            logits = runner.execute_all(SeqWork(seq=seq, tokens=chunk, start=start, salt=b"", sample=True))
            last = logits[-1]
            if start + len(chunk) > score_from:
                kept.append(logits[max(0, score_from - start) :].clone())
        kv_bytes = runner.cache.bytes_in_use()
        speed = _decode_speed(runner, seq, len(tokens), last, decode_steps) if last is not None else 0.0
    finally:
        runner.free(seq)
    return Forced(logits=torch.cat(kept), kv_bytes=kv_bytes, decode_tok_s=speed)


def _decode_speed(runner: ModelRunner, seq: int, length: int, logits: Tensor, steps: int) -> float:
    """Tokens per second of ``steps`` greedy steps, from the median step; 0 for no steps.

    A step ends with its token on the host, which also waits for a GPU to finish.
    """
    if not steps:
        return 0.0
    times = []
    token = int(logits.argmax())
    for i in range(steps):
        begin = time.perf_counter()
        logits = runner.execute([SeqWork(seq=seq, tokens=[token], start=length + i, salt=b"", sample=True)])[0]
        token = int(logits.argmax())
        times.append(time.perf_counter() - begin)
    return 1.0 / sorted(times)[steps // 2]
