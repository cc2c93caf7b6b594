"""Shared prefixes: which pages are walked once for several sequences, and that it changes no result."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvfold.attention import cascade
from kvfold.attention.cascade import shared_runs
from kvfold.attention.decode import attend_decode
from kvfold.attention.pieces import LayerCall, StateWalk
from kvfold.attention.tables import DecodeTables
from kvfold.cache import PagedCache, SequenceWork
from kvfold.engine import SamplingParams
from kvfold.geometry import Geometry
from kvfold.kernels.catalog import full_registry
from kvfold.recipe import Recipe
from tests.calibrations import write_white
from tests.conformance.families import build_model, tiny_config
from tests.engine.tiny_engine import assert_idle, engine_of, expected, prompts_of, tiny_model
from tests.test_cache import GEMMA, LLAMA, World

NEVER = 1 << 60
RECIPES = ["raw", "int8,recent=16", "int4,recent=16", "int2,recent=0,sinks=0", "k16v4,recent=16", "calibrated"]


def always(patch: pytest.MonkeyPatch, least: int = 1) -> None:
    """Whatever is shared is walked once (``NEVER``: nothing is)."""
    patch.setattr(cascade, "CASCADE_BYTES", least)


# == which pages


def test_runs_follow_the_tree_of_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for _ in range(200):
        fresh = iter(range(1 << 30))
        lists: list[list[int]] = [[]]
        for _ in range(rng.randint(0, 12)):  # a child keeps some of a parent's blocks and goes on with its own
            parent = rng.choice(lists)
            kept = parent[: rng.randint(0, len(parent))]
            lists.append(kept + [next(fresh) for _ in range(rng.randint(0, 9))])
        rng.shuffle(lists)
        least = rng.choice([1, 2, 5, 11])
        monkeypatch.setattr(cascade, "CASCADE_BYTES", 10 * least)
        runs = shared_runs([np.asarray(x, np.int64) for x in lists], 10)
        done = Counter[int]()
        for run in runs:
            assert len(run.members) * 10 > 10
            assert (len(run.members) - 1) * (run.last - run.first) >= least
            assert len({tuple(lists[i][: run.last]) for i in run.members}) == 1
            assert all(done[i] == run.first for i in run.members)
            done.update(dict.fromkeys(run.members, run.last - run.first))
        for i, a in enumerate(lists):  # what is left does not pay for any pair
            for j, b in enumerate(lists[:i]):
                common = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                assert common - min(done[i], done[j], common) < least


def test_what_does_not_pay_is_left_alone() -> None:
    a, b = np.arange(10), np.asarray([*range(9), 77])
    assert shared_runs([a, b], 1000) == []
    assert shared_runs([a], 1 << 20) == []
    assert shared_runs([a, a + 100, np.zeros(0, np.int64)], 1 << 20) == []
    (run,) = shared_runs([a + 100, a, b], 1 << 20)
    assert (run.members.tolist(), run.first, run.last) == ([1, 2], 0, 9)


# == the same results


class Family:
    """Sequences that share prefixes of several lengths, all of which decode another token."""

    def __init__(self, config: PreTrainedConfig, recipe: str, seed: int = 0) -> None:
        self.geometry = Geometry.from_config(config)
        self.cache = PagedCache(self.geometry, Recipe.parse(recipe), dtype=torch.float32, prefix_caching=False)
        self.cache._arena.fill_(255)
        self.generator = torch.Generator().manual_seed(seed)
        root = self.cache.create()
        self.grow(root, 300)
        self.members = [root, *(self.cache.fork(root) for _ in range(2))]
        self.grow(self.members[1], 200)
        self.members += [self.cache.fork(self.members[1]), self.cache.create()]
        for seq, count in zip(self.members, (1, 40, 7, 500, 90), strict=True):
            self.grow(seq, count)
        self.members.append(self.cache.fork(root))
        self.cache.truncate(self.members[-1], 70)

    def grow(self, seq: int, count: int) -> None:
        step = self.cache.begin([SequenceWork(seq, count)])
        for layer in self.geometry.layers:
            k, v = (
                torch.randn(count, layer.kv_heads, dim, generator=self.generator) for dim in (layer.k_dim, layer.v_dim)
            )
            step.write(layer.index, k, v)
        self.cache.commit(step)

    def walks(self, group: int, queries: int) -> tuple[StateWalk, ...]:
        """Of a step in which every sequence has ``queries`` new tokens; what is before them is seen."""
        past = [self.cache._sequence_pages(group, seq).before(self.cache.length(seq)) for seq in self.members]
        positions = np.asarray([self.cache.length(seq) - 1 for seq in self.members])
        return DecodeTables(self.cache._pages[group], past, queries).at(positions)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_walk_for_all_gives_what_each_alone_gives(
    recipe: str, queries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe == "calibrated":
        recipe = f"int4:calibrated({write_white(tmp_path / 'white', 2, 2, 16)}),recent=16"
    family = Family(LLAMA, recipe)
    q = torch.randn(len(family.members) * queries, 4, 16)
    results: list[tuple[Tensor, Tensor]] = []
    pages = family.cache._pages[0]
    block_bytes = pages.layer_bytes(pages.packed or pages.raw)
    for least in (NEVER, 1, 12 * block_bytes):
        always(monkeypatch, least)
        walks = family.walks(0, queries)
        assert any(walk.shared for walk in walks) == (least != NEVER)
        results.append(attend_decode(q, 1, walks, LayerCall(scale=0.3), full_registry()))
    for o, lse in results[1:]:
        assert (lse - results[0][1]).abs().max() <= 1e-5
        # Codes are met by weights of 15 bits, which a walk in other tiles rounds elsewhere.
        assert (o - results[0][0]).abs().max() <= (1e-5 if recipe == "raw" else 1e-3)


def test_layers_with_a_window_walk_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    family = Family(LLAMA, "raw")
    assert any(walk.shared for walk in family.walks(0, 1))
    family.cache._pages[0] = type(family.cache._pages[0])(family.cache._pages[0].raw, None, 2, "sliding", 1000)
    assert not any(walk.shared for walk in family.walks(0, 1))


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["full", "sliding"])
@pytest.mark.parametrize(("recipe", "bound"), [("raw", 1e-5), ("int8,recent=16", 0.05)])
def test_any_schedule_of_forks_agrees_with_the_reference(
    config: PreTrainedConfig, recipe: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    rng = random.Random(7)
    world = World(config, recipe)
    world.step([(world.create(), 130)])
    for _ in range(50):
        live = list(world.history)
        choice = rng.random()
        if choice < 0.3 and len(live) < 8:
            world.fork(rng.choice(live))
        elif choice < 0.4 and len(live) > 1:
            world.free(rng.choice(live))
        elif choice < 0.5 and config is LLAMA:
            seq = rng.choice(live)
            world.truncate(seq, rng.randint(1, world.cache.length(seq)))
        else:
            work = [(seq, rng.choice([1, 1, 1, 1, 4, 4, 20])) for seq in live]
            assert world.step(rng.sample(work, len(work))) <= bound


# == end to end


def decoded(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """What the engine says to prompts, the first of which comes before the others."""
    with engine_of(model, max_batched_tokens=512, max_sequences=16, **options) as engine:
        engine.generate(prompts[:1], SamplingParams(max_tokens=1))
        params = [SamplingParams(max_tokens=12 + 5 * i, ignore_eos=True) for i in range(len(prompts))]
        outputs = engine.generate(prompts, params)
        assert_idle(engine)
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("recipe", ["raw,block=8", "int8,block=8,recent=16,sinks=8"])
def test_prompts_that_begin_alike_decode_as_if_alone(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    start, *ends = prompts_of(200, 1, 9, 30, 64, 3, seed=11)
    prompts = [start, *(start + end for end in ends), start[:120] + ends[3], ends[2]]
    always(monkeypatch, NEVER)
    wanted = decoded(model, prompts, recipe=recipe, prefix_caching=False)
    walked: list[int] = []
    real = DecodeTables.at

    def at(self: DecodeTables, positions: np.ndarray) -> tuple[StateWalk, ...]:
        walks = real(self, positions)
        walked.append(sum(len(walk.shared) for walk in walks))
        return walks

    monkeypatch.setattr(DecodeTables, "at", at)
    always(monkeypatch)
    assert decoded(model, prompts, recipe=recipe) == wanted
    assert max(walked) >= 2
    if recipe.startswith("raw"):
        for prompt, found in zip(prompts, wanted, strict=True):
            stock = expected(model, prompt, 10)
            assert found[: len(stock)] == stock


def test_completions_of_one_prompt_share_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    (prompt,) = prompts_of(150, seed=2)
    params = SamplingParams(n=4, max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    found = []
    for least in (NEVER, 1):
        always(monkeypatch, least)
        with engine_of(model, max_sequences=8) as engine:
            (output,) = engine.generate([prompt], params)
            found.append([completion.token_ids for completion in output.outputs])
            assert_idle(engine)
    assert found[0] == found[1]


def test_latent_layers_share_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tiny_config("deepseek_v3"))
    vocab = model.config.vocab_size
    start, *ends = ([token % (vocab - 3) + 3 for token in prompt] for prompt in prompts_of(90, 5, 11, 2, seed=4))
    prompts = [start, *(start + end for end in ends)]
    always(monkeypatch, NEVER)
    wanted = decoded(model, prompts, prefix_caching=False)
    always(monkeypatch)
    assert decoded(model, prompts) == wanted
