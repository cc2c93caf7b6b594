"""Calibration files and the recipes that name them: what is read, how bits are spent, what is refused and why."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import DeepseekV3Config, LlamaConfig

from kvfold.calibration import WIDTHS, Bands, Calibration, Side, _fill
from kvfold.errors import ModelError, RecipeError
from kvfold.formats import BandFormat
from kvfold.geometry import Geometry
from kvfold.recipe import CALIBRATION_FILE, Recipe
from tests.calibrations import CONFIGS, SMALL, arrays_of, write

EIGHTHS = [n / 8 for n in range(4, 65)]
SHAPES = [(2, 64, 32)] * 7
MIXED = [(2, 32, 32), (1, 64, 64), (2, 32, 32), (1, 64, 64), (2, 32, 32), (4, 32, 16)]
SIDES: tuple[Side, Side] = ("k", "v")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("calibration") / "seven.safetensors", SHAPES)


@pytest.fixture(scope="module")
def found(file: Path) -> Calibration:
    return Calibration.load(file)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return Calibration.load(write(tmp_path_factory.mktemp("calibration") / "mixed.safetensors", MIXED))


def spent(bands: Bands) -> int:
    """Bits of one head's vector."""
    return sum(bits * dims for bits, dims in bands)


def average(calibration: Calibration, side: Side, bits: float) -> float:
    """Bits a number, over all layers and heads."""
    shapes = {layer: calibration.shape(layer, side) for layer in calibration.layers}
    total = sum(spent(bands) * shapes[layer][0] for layer, bands in calibration.bands(side, bits).items())
    return total / sum(heads * dim for heads, dim in shapes.values())


# == files


def test_a_file_is_what_was_written(found: Calibration, file: Path) -> None:
    assert found.path == str(file)
    assert found.layers == tuple(range(7))
    assert (found.shape(3, "k"), found.shape(3, "v")) == ((2, 64), (2, 32))
    for name, tensor in arrays_of(SHAPES).items():
        assert np.array_equal(found.arrays[name], tensor.numpy())


def test_layers_need_not_begin_at_0_or_follow_each_other(tmp_path: Path) -> None:
    renamed = {f"{int(n[0]) * 5 + 1}{n[1:]}": t for n, t in arrays_of(SHAPES[:3]).items()}
    save_file(renamed, tmp_path / "file")
    assert Calibration.load(tmp_path / "file").layers == (1, 6, 11)


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path: Path) -> None:
    file = write(tmp_path / "file", SHAPES[:1])
    first = Calibration.load(file)
    assert Calibration.load(str(file)) is first
    write(file, SHAPES[:2])
    os.utime(file, ns=(1, 1))
    assert Calibration.load(file).layers == (0, 1)


@pytest.mark.parametrize("what", ["missing", "folder", "text", "empty", "weights", "none", "name", "lacks", "more"])
def test_another_file_is_refused(what: str, tmp_path: Path) -> None:
    file, arrays = tmp_path / "file", arrays_of([(1, 8, 8)])
    if what == "folder":
        file.mkdir()
    elif what in ("text", "empty"):
        file.write_text("a text" * (what == "text"))
    elif what == "weights":
        save_file({"model.embed": torch.zeros(3, dtype=torch.bfloat16)}, file)
    elif what == "none":
        save_file({}, file)
    elif what == "name":
        save_file({n.replace("0.", "layer."): t for n, t in arrays.items()}, file)
    elif what == "lacks":
        save_file({n: t for n, t in arrays.items() if n != "0.v.step"}, file)
    elif what == "more":
        save_file(arrays | {"0.q.encode": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="no calibration") as refused:
        Calibration.load(file)
    assert str(file) in refused.value.what
    assert "kvfold calibrate" in refused.value.hint


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("0.k.encode", torch.zeros(2, 8, 16)),
        ("0.k.encode", torch.zeros(2, 16)),
        ("0.k.decode", torch.zeros(1, 16, 16)),
        ("0.v.step", torch.zeros(2, 4, 16)),
        ("0.v.distortion", torch.zeros(2, 3, 16)),
        ("0.v.step", torch.zeros(2, 3, 16, dtype=torch.float64)),
        ("0.v.encode", torch.zeros(2, 16, 16, dtype=torch.bfloat16)),
        ("0.k.decode", torch.full((2, 16, 16), float("nan"))),
        ("0.k.step", torch.full((2, 3, 16), float("inf"))),
    ],
)
def test_a_damaged_file_is_refused_by_the_name_of_what_is_wrong(name: str, wrong: torch.Tensor, tmp_path: Path) -> None:
    save_file(arrays_of([(2, 16, 16)]) | {name: wrong}, tmp_path / "file")
    side = name.rsplit(".", 1)[0]
    with pytest.raises(ModelError, match=rf"{side}\.\w+ is wrong"):
        Calibration.load(tmp_path / "file")


def test_dims_that_are_no_whole_units_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="wrong"):
        Calibration.load(write(tmp_path / "file", [(1, 12, 12)]))


# == bits


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("which", ["found", "mixed"])
def test_the_budget_is_kept_and_nearly_used(which: str, side: Side, request: pytest.FixtureRequest) -> None:
    calibration: Calibration = request.getfixturevalue(which)
    for bits in EIGHTHS:
        least = 2 * 8 / min(calibration.shape(layer, side)[1] for layer in calibration.layers)
        used = average(calibration, side, bits)
        assert used <= max(bits, least)
        assert used >= bits - 0.5 - 2 * (bits > 4)  # the step from 4 to 8 bits does not always save something


@pytest.mark.parametrize("which", ["found", "mixed"])
def test_widths_fall_in_whole_units(which: str, request: pytest.FixtureRequest) -> None:
    calibration: Calibration = request.getfixturevalue(which)
    for bits in EIGHTHS:
        for side in SIDES:
            bands = calibration.bands(side, bits)
            assert tuple(bands) == tuple(sorted(bands)) or set(bands) == set(calibration.layers)
            for layer, mine in bands.items():
                widths = [width for width, _ in mine]
                assert widths == sorted(set(widths), reverse=True)
                assert set(widths) <= set(WIDTHS)
                assert all(dims > 0 and dims % 8 == 0 for _, dims in mine)
                BandFormat(calibration.shape(layer, side)[1], mine)  # which checks the rest


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("which", ["found", "mixed"])
def test_more_bits_never_cost_more(which: str, side: Side, request: pytest.FixtureRequest) -> None:
    calibration: Calibration = request.getfixturevalue(which)
    costs = [calibration.cost(side, bits) for bits in EIGHTHS]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(costs))
    assert costs[-1] < costs[0] / 100
    assert costs[-1] > 0


def test_the_cost_is_that_of_the_widths_chosen(found: Calibration) -> None:
    bands = found.bands("k", 3)
    total = 0.0
    for layer, mine in bands.items():
        rows = [WIDTHS.index(width) for width, dims in mine for _ in range(dims)]
        rows += [3] * (64 - len(rows))
        total += float(found.arrays[f"{layer}.k.distortion"].sum(0)[rows, np.arange(64)].sum())
    assert found.cost("k", 3) == pytest.approx(total)


def test_layers_that_matter_more_get_no_fewer_bits(found: Calibration) -> None:
    bits = [spent(bands) for _, bands in sorted(found.bands("k", 2.5).items())]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[-1]


def test_layers_share_at_most_four_formats(found: Calibration) -> None:
    for bits in EIGHTHS:
        formats = {(found.bands("k", bits)[layer], found.bands("v", bits)[layer]) for layer in found.layers}
        assert len(formats) <= 4


def test_layers_of_different_shapes_share_no_format(mixed: Calibration) -> None:
    keys, values = mixed.bands("k", 4), mixed.bands("v", 4)
    assert set(keys) == set(values) == set(range(6))
    assert len(mixed._clusters()) <= 4 + 2
    for cluster in mixed._clusters():
        assert len({(mixed.shape(layer, "k"), mixed.shape(layer, "v")) for layer in cluster}) == 1


def test_a_head_of_few_dims_keeps_two_bits_of_the_first_eight(tmp_path: Path) -> None:
    calibration = Calibration.load(write(tmp_path / "file", [(2, 16, 8)] * 2))
    assert set(calibration.bands("k", 0.5).values()) == {((2, 8),)}
    assert set(calibration.bands("v", 0.5).values()) == {((2, 8),)}


costs = st.lists(st.floats(0, 1e3, width=32), min_size=4, max_size=4)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.lists(costs, min_size=1, max_size=6), st.integers(1, 5)), min_size=1, max_size=3),
    st.sampled_from(EIGHTHS),
)
def test_any_costs_are_filled_within_the_budget(layers: list[tuple[list[list[float]], int]], bits: float) -> None:
    table = {i: np.asarray(units, np.float32).T for i, (units, _) in enumerate(layers)}
    sizes = {i: size for i, (_, size) in enumerate(layers)}
    bands = _fill(table, sizes, bits)
    assert set(bands) == set(table)
    total = sum(spent(mine) * sizes[i] for i, mine in bands.items())
    least = sum(2 * 8 * size for size in sizes.values())
    assert total <= max(least, bits * sum(8 * cost.shape[1] * sizes[i] for i, cost in table.items()))
    assert all(mine and sum(dims for _, dims in mine) <= 8 * table[i].shape[1] for i, mine in bands.items())


def test_bits_that_save_nothing_are_not_spent() -> None:
    # At 8, 4, 2 and 0 bits: the second unit costs more with a code than without, the third nothing at all.
    cost = np.asarray([[0.01, 2.0, 0.0], [0.1, 2.0, 0.0], [1.0, 2.0, 0.0], [9.0, 1.0, 0.0]], np.float32)
    assert _fill({0: cost}, {0: 1}, 8) == {0: ((8, 8),)}


def test_what_is_left_buys_a_smaller_step() -> None:
    # The step that saves most for a bit is from nothing to 8 bits; 4 bits are left for it.
    cost = np.asarray([[0.0, 0.0], [0.9, 4.4], [1.0, 7.0], [9.0, 9.0]], np.float32)
    assert _fill({0: cost}, {0: 1}, 3) == {0: ((4, 8), (2, 8))}


# == matrices


@pytest.mark.parametrize("which", ["found", "mixed"])
@pytest.mark.parametrize("bits", [8, 4, 2, 0.5])
def test_the_matrices_invert_each_other_on_the_kept_dims(
    which: str, bits: float, request: pytest.FixtureRequest
) -> None:
    calibration: Calibration = request.getfixturevalue(which)
    for side in SIDES:
        for layer, bands in calibration.bands(side, bits).items():
            heads, dim = calibration.shape(layer, side)
            rank = sum(dims for _, dims in bands)
            encode, decode, mean = calibration.matrices(layer, side, bands)
            assert (encode.shape, decode.shape, mean.shape) == ((heads, dim, rank), (heads, rank, dim), (heads, dim))
            assert encode.dtype == decode.dtype == np.float32
            assert np.abs(decode @ encode - np.eye(rank)).max() < 2e-3
            if rank == dim:
                assert np.abs(encode @ decode - np.eye(dim)).max() < 1e-3


def test_the_matrices_are_in_units_of_steps(found: Calibration) -> None:
    bands: Bands = ((8, 8), (4, 16), (2, 8))
    encode, decode, _ = found.matrices(2, "k", bands)
    step = found.arrays["2.k.step"]
    rows = np.repeat([0, 1, 2], [8, 16, 8])
    steps = step[:, rows, np.arange(32)]
    assert np.allclose(encode * steps[:, None], found.arrays["2.k.encode"][:, :, :32])
    assert np.allclose(decode / steps[:, :, None], found.arrays["2.k.decode"][:, :32])


# == recipes


paths = st.one_of(
    st.sampled_from(["", "calibration.safetensors", "/a/b c/d,e=f.safetensors", "x:y+z", "ä.bin", "a (1)/()"]),
    st.text(alphabet="ab/.,:+=- _0", max_size=12).map(str.strip),
)
eighths = st.sampled_from(EIGHTHS)
calibrated = st.builds(
    Recipe,
    k_bits=eighths,
    v_bits=eighths,
    sinks=st.one_of(st.just(4), st.integers(0, 2**20)),
    recent=st.one_of(st.just(64), st.integers(0, 2**30)),
    block_size=st.one_of(st.just(32), st.integers(1, 1024)),
    calibration=paths,
)


@given(calibrated)
def test_text_and_calibrated_recipe_are_inverse(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe
    assert str(Recipe.parse(str(recipe))) == str(recipe)
    assert not recipe.is_raw


@given(calibrated, calibrated)
def test_fingerprints_tell_calibrated_recipes_apart(one: Recipe, other: Recipe) -> None:
    assert (one.fingerprint() == other.fingerprint()) == (one == other)


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("int2:calibrated", Recipe(2, 2, calibration="")),
        ("int2.5:calibrated(a.b)", Recipe(2.5, 2.5, calibration="a.b")),
        ("k3v1.125:calibrated( a b ),recent=0", Recipe(3, 1.125, recent=0, calibration="a b")),
        ("int8 : calibrated ()", Recipe(8, 8, calibration="")),
        ("int8:calibrated(model (1)/x(2)),block=8", Recipe(8, 8, block_size=8, calibration="model (1)/x(2)")),
    ],
)
def test_known_texts(text: str, recipe: Recipe) -> None:
    assert Recipe.parse(text) == recipe


def test_a_calibration_makes_another_recipe() -> None:
    texts = ["int4", "int4:calibrated", "int4:calibrated(a)", "int4:calibrated(b)", "k4v3:calibrated(a)"]
    assert len({Recipe.parse(text).fingerprint() for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raw:calibrated", "raw keys and values take no calibration"),
        ("int0.25:calibrated", "0.5 to 8"),
        ("int9:calibrated", "0.5 to 8"),
        ("int2.3:calibrated", "eighths"),
        ("k16v4:calibrated", "0.5 to 8"),
        ("int4:calibrated(a),group=64", "leave them out"),
        ("int4:calibrated,rotation=none", "leave them out"),
        ("int4:calibrated:calibrated", "twice"),
        ("int4:calibrated(a(b)", "cannot read it"),
        ("int4:calibrated(a((b)))", "cannot read it"),
        ("int2.5", "int2.5"),
        ("int4:calibratd", "did you mean 'calibrated'"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(text)
    assert says in str(refused.value)


@pytest.mark.parametrize("name", ["a(b", "a((b))", " a", "a ", "\n", ")", Path("a")])
def test_a_name_that_the_text_form_cannot_hold_is_refused(name: Any) -> None:
    with pytest.raises(RecipeError, match="brackets"):
        Recipe(4, 4, calibration=name)


def test_an_unnamed_calibration_lies_beside_the_weights(tmp_path: Path) -> None:
    recipe = Recipe.parse("int2:calibrated,recent=8")
    assert recipe.located(tmp_path) == recipe
    (tmp_path / CALIBRATION_FILE).touch()
    there = Recipe.parse(f"int2:calibrated({tmp_path / CALIBRATION_FILE}),recent=8")
    assert recipe.located(tmp_path) == there == Recipe.of("int2:calibrated,recent=8", str(tmp_path))
    assert there.located("/elsewhere") == there
    for text in ("raw", "int2", "int2:calibrated(other)"):
        assert Recipe.of(text, tmp_path) == Recipe.parse(text)


# == what a model says to it

LLAMA = Geometry.from_config(LlamaConfig(**SMALL))
LATENT = DeepseekV3Config(
    **{**SMALL, "num_key_value_heads": 4, "head_dim": 8}, q_lora_rank=24, kv_lora_rank=32, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
    moe_intermediate_size=32, first_k_dense_replace=1,
)  # fmt: skip


def reasons(recipe: str, geometry: Geometry = LLAMA) -> str:
    """The only reason why a recipe cannot serve."""
    (reason,) = Recipe.parse(recipe).supports(geometry)
    return reason


def test_reasons_why_a_calibration_does_not_serve(tmp_path: Path) -> None:
    good = write(tmp_path / "good", [(2, 16, 16)] * 3)
    assert Recipe.parse(f"int4:calibrated({good})").supports(LLAMA) == []
    assert "kvfold calibrate" in reasons("int4:calibrated")
    assert "no calibration at" in reasons(f"int4:calibrated({tmp_path / 'none'})")
    two = write(tmp_path / "two", [(2, 16, 16)] * 2)
    assert reasons(f"int4:calibrated({two})") == f"the calibration {two} is of a model with other layers"
    heads = write(tmp_path / "heads", [(2, 16, 16)] * 2 + [(4, 16, 16)])
    assert reasons(f"int4:calibrated({heads})") == f"the calibration {heads} is of a model with other heads"
    dims = write(tmp_path / "dims", [(2, 16, 8)] * 3)
    assert "other heads" in reasons(f"int4:calibrated({dims})")
    latent = Geometry.from_config(LATENT)
    for text in ("int4:calibrated", f"int4:calibrated({good})"):
        assert "layers 0, 1, 2 keep latents" in reasons(text, latent)


# == groups


def test_layers_are_grouped_by_their_bits(tmp_path: Path) -> None:
    shapes = [(2, 64, 64)] * 9
    file = write(tmp_path / "file", shapes)
    geometry = Geometry.from_config(LlamaConfig(**{**SMALL, "num_hidden_layers": 9, "head_dim": 64}))
    recipe = Recipe.parse(f"int2.5:calibrated({file})")
    groups = geometry.groups(recipe)
    assert 1 < len(groups) <= 4
    assert sorted(layer for group in groups for layer in group.layers) == list(range(9))
    assert len({group.name for group in groups}) == len(groups)
    assert all(group.name == f"full@{group.layers[0]}" for group in groups)
    keys, values = Calibration.load(file).bands("k", 2.5), Calibration.load(file).bands("v", 2.5)
    for number, group in enumerate(groups):
        for place, layer in enumerate(group.layers):
            assert group.packed is not None
            assert (group.packed.k, group.packed.v) == (BandFormat(64, keys[layer]), BandFormat(64, values[layer]))
            assert geometry.layer_slot(recipe)[layer] == (number, place)
    assert [group.name for group in geometry.groups(Recipe.parse("int4"))] == ["full"]


def test_windows_and_bits_make_names_that_differ(tmp_path: Path) -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    config = type(CONFIGS["gemma3"])(
        **{**SMALL, "num_hidden_layers": 12, "head_dim": 32}, sliding_window=40, layer_types=types * 2
    )
    geometry = Geometry.from_config(config)
    recipe = Recipe.parse(f"int2.5:calibrated({write(tmp_path / 'file', [(2, 32, 32)] * 12)})")
    names = [group.name for group in geometry.groups(recipe)]
    assert len(set(names)) == len(names) > 2
    assert {name.split("@")[0] for name in names} == {"sliding40", "full"}
    assert set(geometry.layer_slot(recipe)) == set(range(12))
