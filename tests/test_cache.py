"""One step of the cache against the float32 reference: random schedules, every kind of layer, NaN-filled memory."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from kvfold.attention.pieces import LayerCall
from kvfold.cache import PagedCache, SequenceWork
from kvfold.errors import CacheFullError
from kvfold.geometry import Geometry
from kvfold.kernels.reference import attend
from kvfold.recipe import Recipe

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    max_position_embeddings=512,
)
GEMMA = Gemma3TextConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    max_position_embeddings=512,
    sliding_window=24,
    layer_types=["sliding_attention", "full_attention"],
)


class World:
    """A cache, and beside it every sequence's whole history in plain tensors."""

    def __init__(self, config: PreTrainedConfig, recipe: str, *, budget: int | None = None, seed: int = 0) -> None:
        self.geometry = Geometry.from_config(config)
        self.cache = PagedCache(
            self.geometry, Recipe.parse(recipe), dtype=torch.float32, kv_memory=budget, prefix_caching=False
        )
        self.cache._arena.fill_(255)  # NaN in every float format
        self.generator = torch.Generator().manual_seed(seed)
        self.history: dict[int, list[list[torch.Tensor]]] = {}

    def create(self) -> int:
        seq = self.cache.create()
        self.history[seq] = [[torch.zeros(0, 2, 16), torch.zeros(0, 2, 16)] for _ in self.geometry.layers]
        return seq

    def fork(self, seq: int) -> int:
        child = self.cache.fork(seq)
        self.history[child] = [list(pair) for pair in self.history[seq]]
        return child

    def free(self, seq: int) -> None:
        self.cache.free(seq)
        del self.history[seq]

    def truncate(self, seq: int, length: int) -> None:
        self.cache.truncate(seq, length)
        self.history[seq] = [[x[:length] for x in pair] for pair in self.history[seq]]

    def step(self, work: list[tuple[int, int]]) -> float:
        """Runs one step; the largest difference from the reference."""
        step = self.cache.begin([SequenceWork(seq, count) for seq, count in work])
        total = sum(count for _, count in work)
        worst = 0.0
        for index, layer in enumerate(self.geometry.layers):
            q = torch.randn(total, 4, 16, generator=self.generator)
            k, v = (torch.randn(total, 2, 16, generator=self.generator) for _ in range(2))
            step.write(index, k, v)
            call = LayerCall(scale=0.25, kind=layer.kind, window=layer.window)
            out = step.attend(index, q, k, v, call)
            first = 0
            for seq, count in work:
                rows = slice(first, first + count)
                pair = self.history[seq][index]
                pair[0], pair[1] = torch.cat((pair[0], k[rows])), torch.cat((pair[1], v[rows]))
                length = pair[0].shape[0]
                wanted, _ = attend(
                    q[rows],
                    pair[0],
                    pair[1],
                    q_pos=torch.arange(length - count, length),
                    k_pos=torch.arange(length),
                    scale=0.25,
                    window=layer.window if layer.kind == "sliding" else None,
                )
                worst = max(worst, float((out[rows] - wanted).abs().max()))
                first += count
        self.cache.commit(step)
        self.cache.manager.check()
        return worst


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["full", "sliding"])
@pytest.mark.parametrize(
    ("recipe", "bound"),
    [
        ("raw", 1e-5),
        ("int8,recent=16", 0.05),
        ("int4,recent=16", 0.6),
        ("int8,recent=16,scales=channel", 0.05),
        ("int4,recent=16,block=64,scales=channel", 0.7),
    ],
)
def test_any_schedule_agrees_with_the_reference(config: PreTrainedConfig, recipe: str, bound: float) -> None:
    rng = random.Random(1)
    world = World(config, recipe)
    for _ in range(60):
        choice = rng.random()
        live = list(world.history)
        if not live or (choice < 0.15 and len(live) < 6):
            world.step([(world.create(), rng.randint(1, 90))])
        elif choice < 0.25:
            world.fork(rng.choice(live))
        elif choice < 0.32:
            world.free(rng.choice(live))
        elif choice < 0.40 and config is LLAMA:
            seq = rng.choice(live)
            world.truncate(seq, rng.randint(1, world.cache.length(seq)))
        else:
            work = [(seq, 1 if rng.random() < 0.8 else rng.randint(2, 50)) for seq in live]
            assert world.step(work) <= bound
    for seq in list(world.history):
        world.free(seq)
    assert world.cache.bytes_in_use() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["full", "sliding"])
def test_a_long_prefill_writes_what_sealing_would(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Blocks with scales of channels, packed at once and token after token: the same stored bits, fork included."""
    recipe = Recipe.parse("int4,recent=8,block=16,scales=channel,rotation=none")
    generator = torch.Generator().manual_seed(6)
    layers, total = range(config.num_hidden_layers), 77
    k, v = torch.randn(2, len(layers), total, 2, 16, generator=generator).to(dtype)
    held = []
    for chunk in (total, 24, 1):
        cache = PagedCache(Geometry.from_config(config), recipe, dtype=dtype, prefix_caching=False)
        cache._arena.fill_(255)
        other = cache.create()
        seq = cache.create()
        for start in range(0, total, chunk):
            rows = slice(start, min(start + chunk, total))
            # A neighbour in the same step, so that rows are not in order.
            step = cache.begin([SequenceWork(other, 3), SequenceWork(seq, rows.stop - rows.start)])
            for layer in layers:
                new = (torch.cat((x[layer, :3] * 2, x[layer, rows])) for x in (k, v))
                step.write(layer, *new)
            cache.commit(step)
        pages = []
        for each in (seq, cache.fork(seq)):
            for g in range(len(cache.groups)):
                packed, offset = cache._pages[g].packed, cache._sequence_pages(g, each).packed.offset
                assert packed is not None
                assert offset.size
                size = cache.groups[g].packed_block_bytes
                pages.append(torch.stack([cache._arena[int(at) : int(at) + size] for at in offset]))
        assert all(torch.equal(a, b) for a, b in zip(pages, pages[len(cache.groups) :], strict=False))
        held.append(pages)
    for pages in held[1:]:
        assert all(torch.equal(a, b) for a, b in zip(held[0], pages, strict=True))


@pytest.mark.parametrize(
    "recipe",
    [
        "raw",
        "int8",
        "int4",
        "k4v2",
        "k16v4",
        "int4,recent=0,sinks=0",
        "int4,block=16",
        "int4,scales=channel,block=64",
        "k2v16,scales=channel",
    ],
)
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["full", "sliding"])
def test_bytes_in_use_are_what_geometry_predicts(config: PreTrainedConfig, recipe: str) -> None:
    world = World(config, recipe)
    lengths = [1, 33, 150, 200]
    for length in lengths:
        seq = world.create()
        for start in range(0, length, 64):
            world.step([(seq, min(64, length - start))])
    wanted = world.geometry.cache_bytes(Recipe.parse(recipe), 4, lengths)
    assert world.cache.bytes_in_use() == wanted


@pytest.mark.parametrize(("length", "at_least"), [(1800, 2.9), (16_384, 3.4)])
def test_int4_is_as_small_as_promised_with_everything_counted(length: int, at_least: float) -> None:
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=64
    )
    geometry = Geometry.from_config(config)
    used = {}
    for recipe in (Recipe(), Recipe.parse("int4")):
        cache = PagedCache(geometry, recipe, dtype=torch.bfloat16)
        seq = cache.create()
        for start in range(0, length, 1024):
            count = min(1024, length - start)
            step = cache.begin([SequenceWork(seq, count)])
            rows = torch.zeros(count, 2, 64, dtype=torch.bfloat16)
            for layer in range(4):
                step.write(layer, rows, rows)
            cache.commit(step)
        used[str(recipe)] = cache.bytes_in_use()
        assert used[str(recipe)] == geometry.cache_bytes(recipe, 2, [length])
    assert used["raw"] / used["int4"] >= at_least


def test_the_order_of_a_step_may_change_from_one_to_the_next() -> None:
    world = World(LLAMA, "int4,recent=16")
    a, b, c = world.create(), world.create(), world.create()
    world.step([(a, 100), (b, 3), (c, 70)])
    for work in (
        [(a, 1), (b, 2), (c, 1)],
        [(b, 2), (a, 1), (c, 1)],
        [(c, 1), (a, 1), (b, 2)],
        [(b, 1), (c, 2), (a, 1)],
    ):
        assert world.step(work) <= 0.6
    raw = World(LLAMA, "raw")
    a, b = raw.create(), raw.create()
    raw.step([(a, 3), (b, 9)])
    for work in ([(a, 1), (b, 2)], [(b, 2), (a, 1)], [(a, 2), (b, 1)], [(b, 1), (a, 2)]):
        assert raw.step(work) <= 1e-5


def test_a_step_that_does_not_fit_leaves_everything_as_it_was() -> None:
    world = World(LLAMA, "raw", budget=64 << 10)
    seq = world.create()
    world.step([(seq, 40)])
    before = world.cache.bytes_in_use()
    with pytest.raises(CacheFullError):
        world.cache.begin([SequenceWork(seq, 10), SequenceWork(world.create(), 5000)])
    assert world.cache.bytes_in_use() == before
    assert world.step([(seq, 1)]) <= 1e-5


def test_an_abandoned_step_leaks_nothing() -> None:
    world = World(LLAMA, "int4,recent=16")
    seq = world.create()
    world.step([(seq, 100)])
    before = world.cache.bytes_in_use()
    world.cache.abandon(world.cache.begin([SequenceWork(seq, 77)]))
    world.cache.manager.check()
    assert world.cache.bytes_in_use() == before
    assert world.cache.length(seq) == 100


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    alone, together = World(LLAMA, "int4,recent=16", seed=3), World(LLAMA, "int4,recent=16", seed=3)
    a, b = alone.create(), together.create()
    q = torch.randn(1, 4, 16)
    for world, seq, others in ((alone, a, []), (together, b, [7, 150])):
        world.generator.manual_seed(3)
        world.step([(seq, 120)])
        for length in others:
            world.step([(world.create(), length)])
    outs = []
    for world, work in ((alone, [(a, 1)]), (together, [(seq, 1) for seq in together.history])):
        step = world.cache.begin([SequenceWork(seq, count) for seq, count in work])
        k = torch.full((len(work), 2, 16), 0.5)
        step.write(0, k, k)
        outs.append(step.attend(0, q.expand(len(work), 4, 16), k, k, LayerCall(scale=0.25))[0])
        world.cache.abandon(step)
    assert torch.allclose(outs[0], outs[1], atol=1e-5)
