"""Calibrated recipes in the cache, under generate() and in the engine: as close as their bits, whatever is done."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvfold import KVCache
from kvfold.cache import PagedCache, SequenceWork
from kvfold.engine import Engine, SamplingParams
from kvfold.engine.loading import check_recipe
from kvfold.errors import UnsupportedError
from kvfold.formats import BandFormat
from kvfold.geometry import Geometry
from kvfold.quality.recipes import bits_per_value
from kvfold.recipe import CALIBRATION_FILE, Recipe
from tests.calibrations import calibrated, tiny, tokens, write_white
from tests.engine.tiny_engine import assert_idle
from tests.test_cache import GEMMA, LLAMA, World

MODELS = ("llama", "gemma3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrations")


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[PreTrainedModel, Path]:
    """A model and its calibration."""
    model = tiny(request.param)
    return model, calibrated(model, folder / request.param)


@pytest.fixture(scope="module")
def llama(folder: Path) -> tuple[PreTrainedModel, Path]:
    model = tiny("llama")
    return model, calibrated(model, folder / "llama-alone")


@pytest.fixture(scope="module")
def white(folder: Path) -> Path:
    return write_white(folder / "white", 2, 2, 16)


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.tensor([tokens(count, seed)])


@torch.no_grad()
def logits(model: PreTrainedModel, cache: KVCache, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits ``[T, V]`` of ``ids [1, T]`` in forwards of these sizes; the last one repeats."""
    parts, start = [], 0
    while start < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        parts.append(model(ids[:, start : start + size], past_key_values=cache).logits[0])
        start += size
    return torch.cat(parts)


def divergence(found: Tensor, wanted: Tensor) -> float:
    """Mean KL divergence of rows of logits, in nats."""
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# == how close


def test_eight_bits_stay_close_to_raw_and_fewer_bits_less(pair: tuple[PreTrainedModel, Path]) -> None:
    model, file = pair
    ids = ids_of(220)
    with torch.no_grad():
        wanted = model(ids).logits[0, 200:]
    found = {}
    for bits in ("8", "4", "2"):
        cache = KVCache(model, f"int{bits}:calibrated({file}),recent=0,sinks=0,block=8")
        found[bits] = divergence(logits(model, cache, ids, [200, 1])[200:], wanted)
    assert 0 <= found["8"] < 2e-3
    assert found["8"] < found["4"] < found["2"]


def test_calibrated_bits_do_better_than_plain_ones(llama: tuple[PreTrainedModel, Path]) -> None:
    model, file = llama
    ids = ids_of(400, seed=3)
    with torch.no_grad():
        wanted = model(ids).logits[0, 320:]
    found = {}
    for recipe in ("int2,group=16", f"int2:calibrated({file})"):
        cache = KVCache(model, f"{recipe},recent=0,sinks=0")
        found[recipe] = divergence(logits(model, cache, ids, [320, 16])[320:], wanted)
    assert found[f"int2:calibrated({file})"] < found["int2,group=16"]


def test_chunks_of_any_size_agree(pair: tuple[PreTrainedModel, Path]) -> None:
    model, file = pair
    ids = ids_of(230)
    whole = logits(model, KVCache(model), ids, [230])
    for sizes in ([230], [64], [37, 1, 90], [200, 1]):
        cache = KVCache(model, f"int8:calibrated({file}),recent=16,block=16")
        assert divergence(logits(model, cache, ids, sizes), whole) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama: tuple[PreTrainedModel, Path], dtype: torch.dtype) -> None:
    _, file = llama
    model = tiny("llama").to(dtype)
    ids = ids_of(200)
    cache = KVCache(model, f"int8:calibrated({file}),recent=0,sinks=0", check=False)
    found = logits(model, cache, ids, [160, 1]).float()
    with torch.no_grad():
        wanted = tiny("llama")(ids).logits[0]
        own = model(ids).logits[0].float()
    assert found.isfinite().all()
    assert divergence(found, wanted) < 5 * divergence(own, wanted) + 2e-3


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["full", "sliding"])
@pytest.mark.parametrize(("bits", "bound"), [("8", 0.1), ("4", 0.8), ("k8v4", 0.8)])
def test_any_schedule_agrees_with_the_reference(config: PreTrainedConfig, bits: str, bound: float, white: Path) -> None:
    """Prefill, decode, forks, rollbacks and ends in any order, in memory full of NaN."""
    word = bits if bits.startswith("k") else f"int{bits}"
    rng = random.Random(2)
    world = World(config, f"{word}:calibrated({white}),recent=16,block=8")
    worst = 0.0
    for _ in range(35):
        choice = rng.random()
        live = list(world.history)
        if not live or (choice < 0.15 and len(live) < 5):
            worst = max(worst, world.step([(world.create(), rng.randint(1, 90))]))
        elif choice < 0.25:
            world.fork(rng.choice(live))
        elif choice < 0.32:
            world.free(rng.choice(live))
        elif choice < 0.40 and config is LLAMA:
            seq = rng.choice(live)
            world.truncate(seq, rng.randint(1, world.cache.length(seq)))
        else:
            worst = max(worst, world.step([(seq, 1 if rng.random() < 0.8 else rng.randint(2, 50)) for seq in live]))
    assert 1e-4 < worst <= bound  # something was packed
    for seq in list(world.history):
        world.free(seq)
    assert world.cache.bytes_in_use() == 0


# == what is done with a cache


def test_rollback_into_packed_blocks(llama: tuple[PreTrainedModel, Path]) -> None:
    model, file = llama
    ids, other = ids_of(200), ids_of(60, seed=8)
    cache = KVCache(model, f"int8:calibrated({file}),recent=0,sinks=0")
    logits(model, cache, ids, [200])
    before = cache.kv_bytes
    cache.crop(-90)  # within a packed block of 32
    assert cache.get_seq_length() == 110
    assert cache.kv_bytes < before
    found = logits(model, cache, other, [60])
    with torch.no_grad():
        wanted = model(torch.cat((ids[:, :110], other), dim=1)).logits[0, 110:]
    assert divergence(found, wanted) < 2e-3
    cache._pages.manager.check()


def test_rollback_reaches_behind_a_window(folder: Path) -> None:
    model = tiny("gemma3")
    cache = KVCache(model, f"int8:calibrated({calibrated(model, folder / 'gemma')}),recent=0,sinks=0,block=8")
    cache.activate_past_recording()
    ids, other = ids_of(150), ids_of(30, seed=8)
    logits(model, cache, ids, [150])
    cache.crop(-21)
    found = logits(model, cache, other, [30])
    with torch.no_grad():
        wanted = model(torch.cat((ids[:, :129], other), dim=1)).logits[0, 129:]
    assert divergence(found, wanted) < 2e-3


def test_forks_share_and_go_their_own_ways(pair: tuple[PreTrainedModel, Path]) -> None:
    model, file = pair
    recipe = f"int4:calibrated({file}),recent=8,block=8"
    ids = ids_of(100)
    cache = KVCache(model, recipe)
    logits(model, cache, ids, [100])
    alone = cache.kv_bytes
    cache.batch_repeat_interleave(3)
    assert cache.kv_bytes < 1.2 * alone
    tails = torch.cat([ids_of(20, seed) for seed in (1, 2, 3)])
    with torch.no_grad():
        together = torch.cat([model(tails[:, i : i + 1], past_key_values=cache).logits for i in range(20)], dim=1)
    for row in range(3):
        single = KVCache(model, recipe)
        logits(model, single, ids, [100])
        assert torch.allclose(together[row], logits(model, single, tails[row : row + 1], [1]), atol=2e-3)


def test_an_arena_that_grows_changes_nothing(llama: tuple[PreTrainedModel, Path]) -> None:
    model, file = llama
    recipe = f"int4:calibrated({file}),block=8,recent=8"
    ids = ids_of(500)
    growing, fixed = KVCache(model, recipe), KVCache(model, recipe, kv_memory="8MiB")
    start = growing.allocated_bytes
    found = logits(model, growing, ids, [400, 7])
    assert growing.allocated_bytes > start
    assert torch.equal(found, logits(model, fixed, ids, [400, 7]))
    assert growing.kv_bytes == fixed.kv_bytes


def test_generate_runs_in_every_mode(pair: tuple[PreTrainedModel, Path]) -> None:
    model, file = pair
    ids = ids_of(90).expand(2, 90)
    mask = torch.ones_like(ids).clone()
    mask[0, :20] = 0
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {}):
        cache = KVCache(model, f"int4:calibrated({file}),recent=0,block=16")
        out = model.generate(ids, attention_mask=mask, max_new_tokens=9, past_key_values=cache, **options)
        assert out.shape[1] <= 99
        cache._pages.manager.check()
    cache = KVCache(model, f"int8:calibrated({file}),recent=0,block=16")
    options = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 4}
    model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), past_key_values=cache, **options)


# == in the engine


def test_the_engine_runs_repeats_and_shares(pair: tuple[PreTrainedModel, Path]) -> None:
    model, file = pair
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    start = tokens(96)
    prompts = [start + tokens(5 + i, seed=i) for i in range(3)]
    for bits in ("int4", "int8"):
        recipe = f"{bits}:calibrated({file}),block=8,recent=16"
        with Engine(model, recipe=recipe, kv_memory="4MiB", max_batched_tokens=64) as engine:
            first = engine.generate(prompts, params)
            again = engine.generate(prompts, params)
            assert engine.stats()["sealed_blocks"] > 0
            assert engine.stats()["prefix_hit_tokens"] > 0
            assert all(output.num_cached_tokens >= 64 for output in again)
            assert_idle(engine)
        assert [len(output.token_ids) for output in first] == [25] * 3
    with Engine(model, recipe="raw,block=8", kv_memory="4MiB") as engine:
        raw = engine.generate(prompts, params)
    # The eight bits of the last round: their first tokens, over a prompt that is packed, are those of raw.
    assert [output.token_ids[0] for output in first] == [output.token_ids[0] for output in raw]


def test_an_engine_repeats_itself(llama: tuple[PreTrainedModel, Path]) -> None:
    model, file = llama
    options = {"recipe": f"int2.5:calibrated({file}),block=8,recent=8", "kv_memory": "4MiB", "prefix_caching": False}
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    with Engine(model, **options) as engine:
        runs = [engine.generate([tokens(70), tokens(33, 2)], params) for _ in range(2)]
    assert [o.token_ids for o in runs[0]] == [o.token_ids for o in runs[1]]


def test_preemption_and_n_completions(llama: tuple[PreTrainedModel, Path]) -> None:
    model, file = llama
    recipe = f"int8:calibrated({file}),block=8,recent=8"
    with Engine(model, recipe=recipe, kv_memory="150KiB", max_sequences=6, max_length=200) as engine:
        outputs = engine.generate(
            [tokens(60, seed) for seed in range(6)], SamplingParams(max_tokens=60, ignore_eos=True)
        )
        assert engine.stats()["preemptions"] > 0
        many = engine.generate(tokens(45), SamplingParams(n=3, seed=1, temperature=1.2, max_tokens=10))[0]
        assert_idle(engine)
    assert all(len(output.token_ids) == 60 for output in outputs)
    assert len(many.outputs) == 3


# == bytes


RECIPES = ("int8:calibrated({})", "int2.5:calibrated({}),recent=0,sinks=0,block=7", "k4v2:calibrated({}),block=16")


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_in_use_are_what_geometry_predicts(pair: tuple[PreTrainedModel, Path], recipe: str) -> None:
    model, file = pair
    geometry = Geometry.from_config(model.config)
    parsed = Recipe.parse(recipe.format(file))
    lengths = [1, 33, 150, 200]
    cache = PagedCache(geometry, parsed, dtype=torch.float32, prefix_caching=False)
    assert {group.packed is not None for group in cache.groups} == {True}
    for length in lengths:
        seq = cache.create()
        for start in range(0, length, 64):
            step = cache.begin([SequenceWork(seq, min(64, length - start))])
            for layer in geometry.layers:
                rows = torch.zeros(min(64, length - start), layer.kv_heads, layer.k_dim)
                step.write(layer.index, rows, rows)
            cache.commit(step)
    cache.manager.check()
    assert cache.bytes_in_use() == geometry.cache_bytes(parsed, 4, lengths)


def test_bits_per_value_count_everything_of_a_packed_page(llama: tuple[PreTrainedModel, Path]) -> None:
    model, file = llama
    geometry = Geometry.from_config(model.config)
    for bits in (8, 4, 2, 1):
        recipe = Recipe.parse(f"int{bits}:calibrated({file})")
        found = bits_per_value(geometry, recipe, 4)
        pages = [group.packed for group in geometry.groups(recipe, 4) for _ in range(group.pages_per_block)]
        assert found == pytest.approx(8 * sum(p.page_bytes for p in pages if p) / (len(pages) * 32 * 32))
        codes = [side for page in pages if page for side in (page.k, page.v)]
        assert all(isinstance(side, BandFormat) for side in codes)
        spent = 8 * sum(side.code_bytes for side in codes) / (16 * len(codes))
        assert spent <= bits
        assert found >= spent + 8 / 16  # the byte of the stretch


# == what is refused


def test_a_model_without_a_calibration_is_refused_before_the_first_token(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    for make in (KVCache, lambda model, recipe: Engine(model, recipe=recipe), lambda m, r: check_recipe(r, m)):
        with pytest.raises(UnsupportedError, match=CALIBRATION_FILE):
            make(model, "int2:calibrated")
    with pytest.raises(UnsupportedError, match="no such file"):
        KVCache(model, "int2:calibrated(nothing-there)")


def test_the_calibration_beside_the_weights_is_found(tmp_path: Path, llama: tuple[PreTrainedModel, Path]) -> None:
    model, file = llama
    model.save_pretrained(tmp_path)
    (tmp_path / CALIBRATION_FILE).write_bytes(file.read_bytes())
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedModel)
    named = f"int4:calibrated({tmp_path / CALIBRATION_FILE})"
    assert str(check_recipe("int4:calibrated", loaded)) == named
    assert str(KVCache(loaded, "int4:calibrated").recipe) == named
    ids = ids_of(100)
    assert torch.equal(
        logits(loaded, KVCache(loaded, "int4:calibrated,recent=0"), ids, [100, 1]),
        logits(model, KVCache(model, f"int4:calibrated({file}),recent=0"), ids, [100, 1]),
    )


def test_the_calibration_of_another_model_is_refused(white: Path, llama: tuple[PreTrainedModel, Path]) -> None:
    with pytest.raises(UnsupportedError, match="other layers"):
        KVCache(llama[0], f"int4:calibrated({white})")
