"""What a step reads under quest is the best pages, whatever has happened to them; all pages are no retrieval at all."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from kvfold.cache import PagedCache
from kvfold.engine import Engine, SamplingParams
from kvfold.errors import UnsupportedError
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe
from kvfold.retention.method import Merged, Notes, RetentionMethod
from kvfold.retention.view import LayerView
from tests.calibrations import write_white
from tests.engine.tiny_engine import prompts_of, tiny_model
from tests.retrieval.worlds import GEMMA, LLAMA, World

RECIPES = [
    "raw,block=8,recent=12",
    "int8,block=8,recent=12",
    "int4,block=16,recent=20,sinks=0",
    "int4,block=8,recent=12,scales=channel",
    "k16v4,block=8,recent=12",
    "int4,block=8,recent=12+streaming(keep=0.6)",
    "raw,block=8,recent=12+random(keep=0.5)",
]


@pytest.fixture(scope="module")
def white(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_white(tmp_path_factory.mktemp("calibration") / "white", 3, 2, 16)


def retained(world: World, sequences: list[int]) -> None:
    if world.cache.retainer is not None:
        for seq in sequences:
            world.cache.retain(seq)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["full", "sliding"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_pages_change_nothing(recipe: str, config: PreTrainedConfig) -> None:
    outputs = []
    for text in (recipe, recipe + "+quest(pages=1000,dense=0)", recipe + "+bounded(pages=1000,dense=0)"):
        world = World(text, config)
        sequences = world.fill(9, 150, 260)
        retained(world, sequences)
        outputs.append([world.step([(seq, 1) for seq in sequences]) for _ in range(12)])
    for mine, *others in zip(*outputs, strict=True):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["full", "sliding"])
@pytest.mark.parametrize("recipe", [*RECIPES, "int4,block=8,recent=0,sinks=1"])
def test_a_step_reads_the_best_pages(recipe: str, config: PreTrainedConfig) -> None:
    count, dense = 3, 1
    world = World(f"{recipe}+quest(pages={count},dense={dense})", config)
    sequences = world.fill(9, 130, 75, 200)
    retained(world, sequences)
    for _ in range(9):
        if world.cache.retainer is not None and world.cache.length(sequences[1]) % 5 == 0:
            world.cache.retain(sequences[1])
        world.step([(seq, 1) for seq in sequences], commit=False)
        world.check_selection(sequences, count, dense=dense)


def test_a_calibrated_cache_reads_the_best_pages(white: Path) -> None:
    world = World(f"int4:calibrated({white}),block=8,recent=12+quest(pages=3,dense=0)")
    (seq,) = world.fill(150)
    for _ in range(4):
        world.check_selection([seq], 3)
    assert world.check_bounds() > 0


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["full", "sliding"])
@pytest.mark.parametrize("recipe", ["raw,block=8,recent=12", "int8,block=8,recent=12", "int4,block=8,recent=9,sinks=9"])
def test_bounds_follow_their_pages_through_any_schedule(recipe: str, config: PreTrainedConfig) -> None:
    rng = random.Random(3)
    world = World(recipe + "+quest(pages=2,dense=0)", config)
    looked = 0
    for turn in range(40):
        live = list(world.cache.manager.sequences())
        choice = rng.random()
        if not live or (choice < 0.15 and len(live) < 5):
            world.fill(rng.randint(1, 120))
        elif choice < 0.3:
            world.cache.fork(rng.choice(live))
        elif choice < 0.37:
            world.cache.free(rng.choice(live))
        elif choice < 0.5 and config is LLAMA:
            seq = rng.choice(live)
            world.cache.truncate(seq, rng.randint(1, world.cache.length(seq)))
        elif choice < 0.6:
            world.step([(seq, 1) for seq in live], commit=False)
        else:
            world.step([(seq, 1 if rng.random() < 0.8 else rng.randint(2, 40)) for seq in live])
        if turn % 3 == 0:
            looked += world.check_bounds()
    assert looked > 300


def test_sequences_do_not_depend_on_their_neighbours() -> None:
    text = "int4,block=8,recent=12+quest(pages=3,dense=0)"
    together = World(text)
    sequences = together.fill(60, 190, 90)
    alone = World(text)
    mirror = alone.fill(60, 190, 90)
    for _ in range(10):
        tensors = together.draw(3)
        outputs = together.step([(seq, 1) for seq in sequences], tensors)
        for row, seq in enumerate(mirror):
            own = [tuple(x[row : row + 1] for x in layer) for layer in tensors]
            for mine, other in zip(alone.step([(seq, 1)], own), outputs, strict=True):  # type: ignore[arg-type]
                assert torch.allclose(mine[0], other[row], rtol=1e-4, atol=1e-5)


def test_chunks_and_short_sequences_read_all() -> None:
    world, plain = (World(f"raw,block=8,recent=12{more}") for more in ("+quest(pages=2,dense=0)", ""))
    both = [(each, *each.fill(200, 30)) for each in (world, plain)]
    for count in (2, 5, 40):
        tensors = world.draw(count)
        one, other = (each.step([(long, count)], tensors) for each, long, _ in both)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    tensors = world.draw(1)
    one, other = (each.step([(short, 1)], tensors) for each, _, short in both)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    one, other = (each.step([(long, 1)], tensors) for each, long, _ in both)
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_bytes_are_those_of_wider_pages_and_are_predicted() -> None:
    geometry = Geometry.from_config(GEMMA)
    for text in ("raw,block=8", "int4,block=8"):
        plain, wide = (Recipe.parse(text + more) for more in ("", "+quest(pages=2)"))
        for old, new in zip(geometry.groups(plain, 4), geometry.groups(wide, 4), strict=True):
            pages = [(old.raw, new.raw), (old.packed, new.packed)]
            carries = [b.summary_dims for _, b in pages if b is not None]
            if old.window is not None:
                assert new == old  # a window has nothing to choose from
            else:
                assert carries == ([16] if text.startswith("raw") else [0, 16])
                a, b = pages[-1] if new.packed else pages[0]
                assert a is not None
                assert b is not None
                assert a.page_bytes < b.page_bytes <= a.page_bytes + 64
    for recipe in ("raw,block=8+quest(pages=2)", "int4,block=8+quest(pages=2)"):
        world = World(recipe, GEMMA)
        world.fill(33, 190)
        assert world.cache.bytes_in_use() == world.geometry.cache_bytes(world.cache.recipe, 4, [33, 190])


class Biased(RetentionMethod):
    """Keeps random tokens and makes some of them matter much more."""

    merges = True

    def score(self, view: LayerView, notes: Notes) -> torch.Tensor:
        generator = torch.Generator().manual_seed(view.layer)
        return torch.rand(2, view.candidates.stop - view.candidates.start, generator=generator)

    def merge(self, view: LayerView, notes: Notes, scores: torch.Tensor, kept: torch.Tensor) -> Merged:
        generator = torch.Generator().manual_seed(view.layer + 10)
        pick = kept.clamp_min(0)[..., None].expand(-1, -1, 16)
        k, v = (x[:, view.candidates].gather(1, pick) for x in (view.keys(), view.values()))
        bias = 6 * torch.rand(kept.shape, generator=generator) ** 4
        return Merged(k + 1, v, bias, torch.rand(kept.shape, generator=generator) < 0.3)


def test_biases_of_merged_tokens_count_in_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("raw,block=8,recent=12", "int8,block=8,recent=12"):
        world = World(f"{text}+random(keep=0.6)+quest(pages=3,dense=0)")
        assert world.cache.retainer is not None
        monkeypatch.setattr(world.cache.retainer, "method", Biased())
        groups = [replace(spec, page_entries=8) for spec in world.cache.manager.groups]
        monkeypatch.setattr(world.cache.manager._books, "specs", tuple(groups))
        sequences = world.fill(180, 90)
        for seq in sequences:
            assert world.cache.retain(seq)
        assert world.cache.retainer.kept(0, sequences[0]).bias is not None  # type: ignore[union-attr]
        world.check_bounds()
        for _ in range(6):
            world.check_selection(sequences, 3)


@pytest.mark.parametrize("recipe", ["raw,block=8,recent=12", "int4,block=8,recent=12"])
def test_a_fork_reads_what_a_sequence_of_its_own_would(recipe: str) -> None:
    outputs = []
    for forks in (True, False):
        world = World(f"{recipe}+quest(pages=3,dense=0)")
        (first,) = world.fill(149)
        prefix = world.generator.get_state()
        if forks:
            second = world.cache.fork(first)
        else:
            world.generator.manual_seed(0)
            (second,) = world.fill(149)
            assert torch.equal(world.generator.get_state(), prefix)
        outputs.append([world.step([(first, 1), (second, 1)]) for _ in range(30)])
    for mine, others in zip(*outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def test_a_shared_prefix_gives_what_a_private_one_gives() -> None:
    model = tiny_model(layers=3)
    prefix = prompts_of(120)[0]
    prompts = [prefix + tail for tail in prompts_of(9, 14, 5, seed=5)]
    tokens = []
    for sharing in (True, False):
        engine = Engine(
            model, recipe="raw,block=8,recent=8+quest(pages=3,dense=1)", kv_memory="16MiB", prefix_caching=sharing,
            check=False,
        )  # fmt: skip
        found = []
        for prompt in prompts:  # one after the other: the later ones find what the first has left
            outputs = engine.generate([prompt], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
            found.append(outputs[0].token_ids)
        assert (engine.stats()["prefix_hit_tokens"] > 0) == sharing
        tokens.append(found)
    assert tokens[0] == tokens[1]


def test_what_cannot_be_is_refused() -> None:
    def reasons(text: str, config: PreTrainedConfig) -> str:
        with pytest.raises(UnsupportedError) as caught:
            PagedCache(Geometry.from_config(config), Recipe.parse(text), dtype=torch.float32)
        return str(caught.value)

    all_sliding = type(GEMMA)(**{**GEMMA.to_dict(), "layer_types": ["sliding_attention"] * 3})
    assert "every layer has a window" in reasons("raw+quest(pages=4)", all_sliding)
    assert "no layer behind them" in reasons("raw+quest(pages=4,dense=3)", LLAMA)
    assert "no layer behind them" in reasons("raw+bounded(dense=9)", GEMMA)
