"""Teacher forcing through the same paged runtime that serves: given tokens in, every position's logits out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.quality.contestant import PREFILL_TOKENS, Forced
from kvfold.quality.forwards import Watch, forwards
from kvfold.rotary import Lengths

__all__ = ["teacher_force"]


def teacher_force(
    runner: ModelRunner,
    tokens: Sequence[int],
    *,
    score_from: int,
    decode_steps: int = 0,
) -> Forced:
    """Feeds ``tokens`` to a new sequence and frees it again. Retention runs where it would if what stands before
    ``score_from`` were a prompt.

    ``score_from``: the first position whose logits are kept; what stands before it is the prompt. ``decode_steps``:
    greedy single-token steps timed after the tokens.
    """
    if not 0 < score_from < len(tokens):
        raise ValueError(f"score_from={score_from} leaves no prompt or nothing to score of {len(tokens)} tokens")
    seq = runner.create()
    kept: list[Tensor] = []
    recipe, watch = runner.cache.recipe, Watch(runner.cache)
    rule = recipe.rule
    whole = Lengths.whole(len(tokens) + decode_steps)  # rotary factors as in one forward
    try:
        for start, stop in forwards(recipe, len(tokens), prompt=score_from, prefill=PREFILL_TOKENS):
            watched = rule is not None and rule.next_point(start, score_from) is not None
            work = SeqWork(seq, tokens[start:stop], start, b"", sample=True, watched=watched, lengths=whole)
            if start < score_from:
                runner.execute([work])
            else:
                watch.before_scoring()
                kept.append(runner.execute_all(work))
            if rule is not None and rule.next_point(start, score_from) == stop:
                runner.retain(seq, tokens[:stop], final=not rule.every and stop >= score_from)
        idle = watch.idle  # the timed steps are not scored
        kv_bytes = runner.cache.bytes_in_use()
        speed = _decode_speed(runner, seq, len(tokens), kept[-1][-1], decode_steps)
    finally:
        runner.free(seq)
    return Forced(logits=torch.cat(kept), kv_bytes=kv_bytes, decode_tok_s=speed, idle=idle)


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
        work = SeqWork(seq, [token], length + i, b"", sample=True, watched=False)
        logits = runner.execute([work])[0]
        token = int(logits.argmax())
        times.append(time.perf_counter() - begin)
    return 1.0 / sorted(times)[steps // 2]
