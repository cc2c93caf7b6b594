"""Geometry against the caches and calls of transformers' own models, and its bytes against a cache stepped by hand."""

from itertools import zip_longest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from kvfold.errors import ModelError
from kvfold.formats import PageFormat, VectorFormat
from kvfold.geometry import UNBOUNDED, Geometry, LayerGeometry
from kvfold.recipe import Recipe
from tests.geometry_families import FAMILIES, tiny_config
from tests.test_formats import step_by_step
from tests.test_recipe import recipes

LETTERS = {"F": "full", "S": "sliding", "C": "chunked", "M": "latent"}


@pytest.fixture
def calls():
    """What each layer's attention is called with: layer -> (query heads, window, softcap, has sink logits)."""
    seen = {}

    def attention(
        module, query, key, value, attention_mask=None, *, sliding_window=None, softcap=None, s_aux=None, **_
    ):
        seen[module.layer_idx] = (query.shape[1], sliding_window, softcap, s_aux is not None)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("geometry_test", attention)
    yield seen
    AttentionInterface._global_mapping.pop("geometry_test")


@pytest.mark.parametrize("name", FAMILIES)
def test_geometry_is_what_the_stock_cache_holds(name, calls):
    config = tiny_config(name)
    geometry = Geometry.from_config(config)
    assert geometry.unsupported() == []
    assert (geometry.vocab, geometry.hidden, geometry.max_positions) == (96, 32, 128)
    falcon = config.model_type == "falcon"  # does not know attention functions
    config._attn_implementation = "eager" if falcon else "geometry_test"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(input_ids=torch.arange(10, 15)[None], past_key_values=cache, use_cache=True)
    assert len(cache.layers) <= len(geometry.layers)
    for layer, stock in zip_longest(geometry.layers, cache.layers):
        if not layer.stores:  # by release, such a layer is a dummy in the stock cache or is not there
            assert stock is None or type(stock).__name__ == "DummyLayer"
            continue
        batch, kv_heads, tokens, k_dim = stock.keys.shape
        assert (kv_heads, k_dim) == (layer.kv_heads, layer.k_dim)
        assert stock.values.shape == (batch, kv_heads, tokens, layer.v_dim)
        assert getattr(stock, "sliding_window", None) == layer.window
    assert bool(calls) is not falcon
    for index, call in calls.items():
        layer = geometry.layers[index]
        window = layer.window if layer.kind == "sliding" else None
        assert call == (layer.q_heads, window, layer.softcap, layer.sinks)


@pytest.mark.parametrize("name", [name for name, (_, letters, _) in FAMILIES.items() if letters])
def test_layer_kinds_and_sources(name):
    letters = FAMILIES[name][1]
    layers = Geometry.from_config(tiny_config(name)).layers
    assert [layer.kind for layer in layers] == [LETTERS[letter.upper()] for letter in letters]
    for layer, letter in zip(layers, letters, strict=True):
        own = layer.source == layer.index
        assert own == letter.isupper()
        if not own:  # the last layer of its kind that has pages
            stored = [i for i in range(layer.index) if letters[i] == letter.upper()]
            assert layer.source == stored[-1]


def test_gemma4_full_layers_have_their_own_shape():
    full, slide = Geometry.from_config(tiny_config("gemma4")).layers[1::-1]
    assert (slide.kv_heads, slide.k_dim, slide.window) == (2, 16, 8)
    assert (full.kv_heads, full.k_dim, full.window) == (1, 24, None)


def test_heterogeneous_layers():
    config = CONFIG_MAPPING["llama"](
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, hidden_size=32, vocab_size=9
    )
    config.per_layer_config = {1: {"num_key_value_heads": 2}, 2: {"num_key_value_heads": 1}}
    geometry = Geometry.from_config(config)
    assert [layer.kv_heads for layer in geometry.layers] == [4, 2, 1]
    assert [group.name for group in geometry.groups(Recipe())] == ["full-4x8+8", "full-2x8+8", "full-1x8+8"]


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("qwen3_next", {"num_hidden_layers": 4}, "layers 0, 1, 2 keep a recurrent state"),
        ("mamba", {"num_hidden_layers": 2}, "layers 0, 1 keep a recurrent state"),
        ("falcon_h1", {"num_hidden_layers": 1}, "layers 0 keep a recurrent state"),
        ("deepseek_v32", {"num_hidden_layers": 2}, "keeps more than keys and values"),
        ("bart", {}, "encoder-decoder"),
        ("t5", {}, "encoder-decoder"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("rwkv", {}, "keeps no cache of keys and values"),
        ("openai-gpt", {}, "keeps no cache of keys and values"),
    ],
)
def test_what_cannot_be_served_is_said(model_type, options, reason):
    geometry = Geometry.from_config(CONFIG_MAPPING[model_type](**options))
    assert any(reason in text for text in geometry.unsupported())
    assert Recipe(4, 4).supports(geometry) == geometry.unsupported()


@pytest.mark.parametrize("model_type", ["vit", "resnet", "lxmert", "rt_detr"])
def test_a_config_that_does_not_say_enough(model_type):
    with pytest.raises(ModelError, match=model_type):
        Geometry.from_config(CONFIG_MAPPING[model_type]())


def test_a_layer_type_of_the_future_is_refused_by_name():
    config = tiny_config("llama")
    config.layer_types = ["full_attention", "wormhole_attention"] * 2
    assert Geometry.from_config(config).unsupported() == [
        "layers 1, 3 are of type 'wormhole_attention', which keeps more than keys and values"
    ]


def test_the_text_decoder_of_a_multimodal_config():
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 77, "head_dim": 8}
    geometry = Geometry.from_config(CONFIG_MAPPING["gemma3"](text_config=text))
    assert (geometry.model_type, geometry.vocab, len(geometry.layers)) == ("gemma3", 77, 2)


def test_an_unknown_config_class_caches_expanded_keys():
    class Remote(PreTrainedConfig):
        model_type = "remote"

    sizes = {"hidden_size": 32, "vocab_size": 9, "num_hidden_layers": 1, "num_attention_heads": 4}
    latent = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}
    geometry = Geometry.from_config(Remote(**sizes, **latent))
    layer = geometry.layers[0]
    assert (layer.kind, layer.kv_heads, layer.k_dim, layer.v_dim) == ("full", 4, 20, 20)
    assert geometry.max_positions == UNBOUNDED


@st.composite
def geometries(draw):
    """Random stacks of layers over few shapes, so that groups form; some share, some keep nothing."""
    layers = []
    for index in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["full", "sliding", "chunked", "latent", "none", "share"]))
        if kind == "share":
            sources = [layer for layer in layers if layer.stores]
            if not sources:
                kind = "none"
            else:
                source = draw(st.sampled_from(sources))
                fields = {
                    name: getattr(source, name) for name in ("kind", "kv_heads", "q_heads", "k_dim", "v_dim", "window")
                }
                layers.append(LayerGeometry(index=index, source=source.index, **fields))
                continue
        shapes = {"latent": [(1, 12, 4)], "none": [(0, 0, 0)]}.get(kind, [(2, 16, 16), (1, 20, 8)])
        kv_heads, k_dim, v_dim = draw(st.sampled_from(shapes))
        window = draw(st.sampled_from([1, 7, 24])) if kind in ("sliding", "chunked") else None
        layers.append(LayerGeometry(index, kind, kv_heads, 2 * kv_heads, k_dim, v_dim, window))
    return Geometry("random", tuple(layers), hidden=32, vocab=9, max_positions=128)


small_recipes = st.builds(
    lambda recipe, block, sinks, recent: Recipe(
        recipe.k_bits, recipe.v_bits, recipe.rotation, sinks, recent, block, recipe.group
    ),
    recipes,
    st.integers(1, 9),
    st.integers(0, 20),
    st.integers(0, 40),
)


def page_bytes(recipe, layer, dtype_bytes, packed):
    """Bytes of a page of this layer, from the recipe's words alone."""

    def vector(dim, bits):
        if packed and bits is not None:
            return VectorFormat(dim, bits, True, recipe.group, recipe.rotation)
        return VectorFormat(dim, 8 * dtype_bytes, False, dim, "none")

    return PageFormat(
        recipe.block_size, vector(layer.k_dim, recipe.k_bits), vector(layer.v_dim, recipe.v_bits)
    ).page_bytes


@settings(deadline=None, max_examples=60)
@given(geometries(), small_recipes, st.sampled_from([2, 4]), st.lists(st.integers(0, 60), max_size=3))
def test_cache_bytes_equal_sequences_stepped_token_by_token(geometry, recipe, dtype_bytes, lengths):
    expected = 0
    alike = {(x.kind, x.kv_heads, x.k_dim, x.v_dim, x.window) for x in geometry.layers if x.stores}
    for length in lengths:
        for key in alike:
            members = [
                x for x in geometry.layers if x.stores and (x.kind, x.kv_heads, x.k_dim, x.v_dim, x.window) == key
            ]
            life = {"kind": key[0], "window": key[4], "sinks": recipe.sinks, "recent": recipe.recent}
            steps = step_by_step(length, block_size=recipe.block_size, packs=not recipe.is_raw, **life)
            *_, (_, states) = [(0, {}), *steps]
            for state in states.values():
                pages = len(members) * key[1]
                expected += 8 + pages * page_bytes(recipe, members[0], dtype_bytes, state == "packed")
    assert geometry.cache_bytes(recipe, dtype_bytes, lengths) == expected
    if recipe.is_raw:
        assert geometry.cache_bytes(recipe, dtype_bytes, lengths) == sum(
            geometry.cache_bytes(recipe, dtype_bytes, [length]) for length in lengths
        )


@settings(deadline=None, max_examples=60)
@given(geometries(), small_recipes, st.integers(1, 20))
def test_bytes_per_token_is_the_slope(geometry, recipe, blocks):
    recipe_size = recipe.block_size
    start = 1000 * recipe_size * 24 * 7  # past all sinks and windows, and where every chunk begins anew
    step = blocks * recipe_size * 24 * 7
    grown = geometry.cache_bytes(recipe, 2, [start + step]) - geometry.cache_bytes(recipe, 2, [start])
    assert geometry.bytes_per_token(recipe, 2) * step == pytest.approx(grown, rel=1e-12)


def test_bytes_per_token_of_a_llama():
    layers = tuple(LayerGeometry(i, "full", 8, 32, 64, 64) for i in range(16))
    geometry = Geometry("llama", layers, hidden=2048, vocab=128256, max_positions=131072)
    assert geometry.bytes_per_token() == 16 * 8 * 2 * 64 * 2 + 8 / 32
    assert geometry.bytes_per_token(Recipe.parse("int4")) == 16 * 8 * 2 * (32 + 4) + 8 / 32
    assert geometry.bytes_per_token(Recipe.parse("k16v8")) == 16 * 8 * (128 + 64 + 4) + 8 / 32


@settings(deadline=None)
@given(geometries(), small_recipes)
def test_groups_and_slots(geometry, recipe):
    groups, slots = geometry.groups(recipe, 2), geometry.layer_slot(recipe)
    assert len({group.name for group in groups}) == len(groups)
    placed = [layer for group in groups for layer in group.layers]
    assert sorted(placed) == [layer.index for layer in geometry.layers if layer.stores]
    for layer in geometry.layers:
        if layer.kind == "none":
            assert layer.index not in slots
            continue
        number, place = slots[layer.index]
        group = groups[number]
        assert group.layers[place] == layer.source
        assert (group.kind, group.kv_heads, group.k_dim, group.v_dim, group.window) == (
            (layer.kind, layer.kv_heads, layer.k_dim, layer.v_dim, layer.window)
        )
        assert (group.packed is None) == recipe.is_raw
        assert group.raw_block_bytes == len(group.layers) * group.kv_heads * group.raw.page_bytes
        assert (group.packed_block_bytes == 0) == recipe.is_raw
