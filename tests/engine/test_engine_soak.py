"""Thousands of random steps: requests arrive, fork, share, are preempted and cancelled; in the end the pool is
empty.
"""

from __future__ import annotations

import random

import pytest
import torch

from kvfold.engine import Engine, RequestOutput, SamplingParams
from tests.engine.tiny_engine import VOCAB, assert_idle, tiny_model

CHECK_EVERY = 97


def random_params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        n=draw.choice([1, 1, 1, 2, 3]),
        max_tokens=draw.choice([1, 10, 90]),
        temperature=draw.choice([0.0, 0.0, 1.0]),
        top_p=draw.choice([1.0, 0.9]),
        presence_penalty=draw.choice([0.0, 0.0, 0.5]),
        ignore_eos=draw.random() < 0.5,
        logprobs=draw.choice([None, None, 2]),
    )


def soak(recipe: str, memory: str, steps: int, seed: int) -> dict[str, int | float]:
    """Runs ``steps`` random steps and drains; the engine's statistics."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    model = tiny_model(layers=1, hidden=16, context=256)
    engine = Engine(model, recipe=recipe, kv_memory=memory, max_batched_tokens=48, max_sequences=6, check=False)
    prefixes = [[draw.randrange(3, VOCAB) for _ in range(48)] for _ in range(3)]
    ended: list[RequestOutput] = []
    live: list[str] = []
    for step in range(steps):
        if len(live) < 10 and draw.random() < 0.4:
            start = draw.choice([*prefixes, []])[: draw.randint(0, 48)]
            prompt = start + [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 30))]
            live.append(engine.add_request(prompt, random_params(draw), salt=draw.choice([b"", b"x"])))
        if live and draw.random() < 0.03:
            output = engine.abort(live.pop(draw.randrange(len(live))))
            assert output is None or all(c.finish_reason for c in output.outputs)
        ended += engine.step()
        live = [request_id for request_id in live if request_id in engine._core.requests]
        if step % CHECK_EVERY == 0:
            engine._runner.manager.check()
            usage = engine._runner.manager.usage()
            assert usage.in_use + usage.cached <= usage.budget
    while engine.has_unfinished():
        ended += engine.step()
    assert_idle(engine)
    assert not [output.error for output in ended if output.error]
    for output in ended:
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length")
    engine._runner.manager.reset_prefix_cache()
    assert engine._runner.manager.bytes_lent() == 0
    return engine.stats()


@pytest.mark.parametrize(("recipe", "memory"), [("raw,block=4", "15KiB"), ("int8,block=8,recent=8,sinks=2", "14KiB")])
def test_random_steps_leave_an_empty_pool(recipe: str, memory: str) -> None:
    stats = soak(recipe, memory, steps=700, seed=2)
    assert stats["preemptions"] > 0
    assert stats["prefix_hit_tokens"] > 0
    assert stats["copied_blocks"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "memory"), [("raw,block=4", "15KiB"), ("int4,block=4,recent=8,sinks=2", "12KiB")])
def test_ten_thousand_random_steps_leave_an_empty_pool(recipe: str, memory: str) -> None:
    assert soak(recipe, memory, steps=10_000, seed=3)["preemptions"] > 100
