"""The text form and the dataclass are two sides of one thing, and what is not understood is refused by name."""

import hashlib
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.clause import Clause
from kvfold.errors import KVFoldError, RecipeError
from kvfold.formats import VectorFormat
from kvfold.recipe import Recipe, known_methods

bits = st.sampled_from([None, 8, 4, 2])
recipes = st.builds(
    lambda scales="token", **fields: Recipe(**fields, scales=scales if fields["k_bits"] else "token"),
    k_bits=bits,
    v_bits=bits,
    scales=st.sampled_from(["token", "channel"]),
    rotation=st.sampled_from(["hadamard", "none"]),
    sinks=st.one_of(st.just(4), st.integers(0, 2**20)),
    recent=st.one_of(st.just(64), st.integers(0, 2**30)),
    block_size=st.one_of(st.just(32), st.integers(1, 1024)),
    group=st.one_of(st.just(128), st.integers(1, 2**16)),
)


@given(recipes)
def test_text_and_recipe_are_inverse(recipe):
    text = str(recipe)
    assert Recipe.parse(text) == recipe
    assert str(Recipe.parse(text)) == text
    assert " " not in text


clauses = st.recursive(
    st.builds(Clause, st.sampled_from(["random", "keydiff", "snapkv", "streaming"])),
    lambda inner: st.builds(lambda name, part: Clause(name, (part,)), st.sampled_from(["random", "snapkv"]), inner),
    max_leaves=3,
)
rules = st.one_of(
    st.fixed_dictionaries({"keep": st.floats(0.001, 1)}), st.fixed_dictionaries({"budget": st.integers(1, 2**20)})
)


@given(recipes, clauses, rules, st.dictionaries(st.sampled_from(["every", "chunk", "window"]), st.integers(0, 999)))
def test_a_retention_clause_is_part_of_the_text(recipe, clause, rule, options):
    recipe = replace(recipe, retention=Clause(clause.name, clause.inner, tuple(sorted({**options, **rule}.items()))))
    text = str(recipe)
    assert Recipe.parse(text) == recipe
    assert str(Recipe.parse(text)) == text
    assert recipe.fingerprint() != replace(recipe, retention=None).fingerprint()
    assert recipe.rule is not None
    assert (recipe.rule.keep, recipe.rule.budget) == (rule.get("keep"), rule.get("budget"))
    assert recipe.rule.chunk == options.get("chunk", 0)
    assert recipe.method == replace_options(clause, options)


def replace_options(clause, options):
    return Clause(clause.name, clause.inner, tuple(item for item in options.items() if item[0] == "window"))


def test_spaces_in_a_clause_do_not_matter():
    assert str(Recipe.parse("int4 , recent=32 + snapkv( random , keep = .25 ,window=16 )")) == (
        "int4,recent=32+snapkv(random,keep=0.25,window=16)"
    )


def test_words_of_methods_are_their_files():
    assert {"random", "streaming", "keydiff", "snapkv"} <= set(known_methods("retention"))


@given(recipes, st.randoms(use_true_random=False))
def test_order_spaces_and_defaults_do_not_matter(recipe, random):
    word = str(recipe).split(",")[0]
    options = [
        f"sinks={recipe.sinks}",
        f"recent = {recipe.recent}",
        f" block={recipe.block_size}",
        f"group={recipe.group} ",
        f"rotation={recipe.rotation}",
        f"scales={recipe.scales}",
    ]
    random.shuffle(options)
    assert Recipe.parse(" , ".join([f" {word}", *options])) == recipe


@given(recipes, recipes)
def test_fingerprints_tell_recipes_apart(one, other):
    assert len(one.fingerprint()) == 32
    assert (one.fingerprint() == other.fingerprint()) == (one == other)


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("raw", Recipe()),
        ("int8", Recipe(8, 8)),
        ("int4", Recipe(4, 4)),
        ("int2", Recipe(2, 2)),
        ("k8v4,sinks=4,recent=128", Recipe(8, 4, recent=128)),
        ("k16v2", Recipe(None, 2)),
        ("int4,scales=channel,block=64", Recipe(4, 4, block_size=64, scales="channel")),
        ("k16v16", Recipe()),
        ("k4v4,rotation=none,group=64,block=16,sinks=0,recent=0", Recipe(4, 4, "none", 0, 0, 16, 64)),
    ],
)
def test_known_texts(text, recipe):
    assert Recipe.parse(text) == recipe


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("k4v4", "int4"),
        ("k16v16,sinks=4", "raw"),
        ("int8,recent=0", "int8,recent=0"),
        ("k16v8,rotation=hadamard", "k16v8"),
        ("int4,scales=token", "int4"),
        ("k4v2,scales=channel,block=64", "k4v2,block=64,scales=channel"),
    ],
)
def test_str_is_the_short_form(text, canonical):
    assert str(Recipe.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "named", "hint"),
    [
        ("int3", "'int3'", "int"),
        ("Int4", "'Int4'", "did you mean 'int4'"),
        ("k3v4", "'k3v4'", "16, 8, 4, 2"),
        ("k04v4,", "'k04v4,'", ""),
        ("int4,sink=4", "'sink'", "did you mean 'sinks'"),
        ("int4,blocks=4", "'blocks'", "did you mean 'block'"),
        ("int4,rotation=hadamar", "'hadamar'", "did you mean 'hadamard'"),
        ("int4,scales=channels", "'channels'", "did you mean 'channel'"),
        ("k16v4,scales=channel", "scales", "keys"),
        ("raw,scales=channel", "scales", "keys"),
        ("int4:calibrated,scales=channel", "scales", "calibrat"),
        ("int4+snipkv(keep=0.25)", "'snipkv'", "did you mean 'snapkv'"),
        ("int4+exact", "'exact'", "known: "),
        ("int4+snapkv", "snapkv", "keep=0.25"),
        ("int4+snapkv(keep=0.25,budget=9)", "one of keep and budget", ""),
        ("int4+snapkv(keep=0)", "keep", ""),
        ("int4+snapkv(keep=1.5)", "keep", ""),
        ("int4+snapkv(budget=0)", "budget", ""),
        ("int4+snapkv(budget=12.5)", "budget", "12.5"),
        ("int4+snapkv(keep=0.5,every=x)", "every", "'x'"),
        ("int4+snapkv(keep=0.5,keep=0.5)", "'keep'", "twice"),
        ("int4+snapkv(keep=0.5)+keydiff(keep=0.5)", "retention", "brackets"),
        ("int4+snapkv(keep=0.5", "snapkv(keep=0.5", ""),
        ("int4+", "''", ""),
        ("int2:calibrate(file.bin)", "'calibrate'", "calibrated"),
        ("int4,sinks=4,sinks=4", "'sinks'", ""),
        ("int4,sinks", "'sinks'", "sinks="),
        ("int4,sinks=-1", "'-1'", ""),
        ("int4,sinks=4.5", "'4.5'", ""),
        ("int4,sinks=٣", "'٣'", ""),
        ("int4,block=0", "block_size=0", "1"),
        ("int4,block=4096", "block_size=4096", ""),
        ("int4(2)", "'int4'", ""),
        ("int4,sinks=4(2)", "arguments", ""),
        ("int4,,sinks=4", "',,sinks=4'", ""),
        ("int4 int8", "'int4 int8'", ""),
        ("+int4", "'+int4'", ""),
        ("int4,sinks=4)(", "',sinks=4)('", ""),
        ("", "''", "raw"),
        ("  ", "'  '", "raw"),
    ],
)
def test_what_is_not_understood_is_named(text, named, hint):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert named in str(caught.value)
    assert hint in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, KVFoldError)


@given(st.text(alphabet="rawintkv0248,=+:() sinkblocegup", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        recipe = Recipe.parse(text)
    except RecipeError:
        return
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    "field",
    [
        {"k_bits": 3},
        {"v_bits": 16},
        {"k_bits": True},
        {"rotation": "fourier"},
        {"scales": "page", "k_bits": 4},
        {"scales": "channel"},
        {"sinks": -1},
        {"recent": 1.5},
        {"block_size": 0},
        {"group": 0},
        {"sinks": True},
    ],
)
def test_bad_fields_are_refused(field):
    with pytest.raises(RecipeError, match=next(iter(field))):
        Recipe(**field)


def test_a_recipe_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Recipe().sinks = 3


def test_raw_means_that_nothing_is_packed():
    assert Recipe().is_raw
    assert not Recipe(v_bits=8).is_raw
    assert replace(Recipe(), sinks=0).is_raw


def test_fingerprint_is_that_of_the_text():
    assert Recipe(4, 4).fingerprint() == hashlib.sha256(b"int4").digest()


def test_packed_formats():
    recipe = Recipe.parse("k16v4,group=64,rotation=none")
    assert recipe.packed_format(96, recipe.k_bits, 2) == VectorFormat.raw(96, 2)
    assert recipe.packed_format(96, recipe.v_bits, 2) == VectorFormat(96, 4, True, 64, "none")
    assert recipe.packed_format(96, 2, 2, "channel") == VectorFormat(96, 2, True, 64, "none", "channel")


def test_supports_hands_on_what_the_model_cannot():
    class Geometry:
        def __init__(self, *reasons):
            self.reasons = reasons

        def unsupported(self, recipe=None):
            return list(self.reasons)

    assert Recipe().supports(Geometry()) == []
    assert Recipe(4, 4).supports(Geometry("it has a recurrent layer")) == ["it has a recurrent layer"]
