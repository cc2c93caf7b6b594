"""The words of retrieval in recipes, what is refused, latent layers, and generate()."""

from __future__ import annotations

import pytest
import torch

from kvfold import KVCache
from kvfold.cli.options import parse_recipe_list
from kvfold.errors import RecipeError
from kvfold.recipe import Recipe, known_methods
from kvfold.retrieval.build import build_retrieval
from kvfold.retrieval.methods.bounded import Bounded
from kvfold.retrieval.methods.quest import Quest
from tests.conformance.families import build_model, tiny_config


def built(text: str) -> object:
    clause = Recipe.parse(text).retrieval
    assert clause is not None
    return build_retrieval(clause)


def test_words_and_options() -> None:
    assert known_methods("retrieval") == ("bounded", "quest")
    assert built("raw+quest") == Quest(pages=64, dense=2)
    assert built("int4+streaming(keep=0.2)+quest(pages=8,dense=0)") == Quest(pages=8, dense=0)
    assert built("raw+bounded(eps=0.1,delta=0.01,pages=4,base=9)") == Bounded(pages=4, base=9, eps=0.1, delta=0.01)
    for text in ("raw+quest(pages=8)", "int4+streaming(keep=0.2)+bounded(eps=0.1)"):
        assert str(Recipe.parse(text)) == text
        assert Recipe.parse(text).fingerprint() != Recipe.parse(text.rsplit("+", 1)[0]).fingerprint()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raw+quest(pages=0)", "pages must be at least 1"),
        ("raw+quest(pages=0.5)", "pages is a whole number"),
        ("raw+quest(page=8)", "unknown option 'page'"),
        ("raw+quest(dense=-1)", "dense must not be negative"),
        ("raw+quest(snapkv)", "takes nothing but options"),
        ("raw+bounded(eps=0)", "eps must be above 0"),
        ("raw+bounded(delta=1)", "delta between 0 and 1"),
        ("raw+bounded(base=1)", "a variance needs two pages"),
        ("raw+bounded(eps=few)", "eps is a number"),
    ],
)
def test_options_that_make_no_sense(text: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why.replace("(", r"\(")):
        built(text)


def test_lists_of_recipes_with_brackets_in_brackets() -> None:
    lists = {
        "raw,raw+quest(pages=64),int4+quest(pages=64)": ["raw", "raw+quest(pages=64)", "int4+quest(pages=64)"],
        "raw,recent=8+quest(pages=4,dense=1), int4;int8": ["raw,recent=8+quest(pages=4,dense=1)", "int4", "int8"],
        "int4+streaming(keep=0.2)+bounded(eps=0.1,delta=0.1),raw": [
            "int4+streaming(keep=0.2)+bounded(eps=0.1,delta=0.1)",
            "raw",
        ],
    }
    for text, wanted in lists.items():
        assert parse_recipe_list(text) == wanted


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3_text", "gpt_oss", "llama"])
def test_generate_with_all_pages_is_generate_without(name: str) -> None:
    model = build_model(tiny_config(name))
    prompt = torch.randint(3, 60, (2, 90), generator=torch.Generator().manual_seed(0))

    def run(recipe: str) -> tuple[list[list[int]], KVCache]:
        cache = KVCache(model, recipe, check=False)
        tokens = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, past_key_values=cache)
        return tokens.tolist(), cache

    for base in ("raw,block=8,recent=8", "int4,block=8,recent=8"):
        wanted, _ = run(base)
        assert run(f"{base}+quest(pages=99,dense=0)")[0] == wanted
        # Tight enough to read nearly everything, through the sampling: the same tokens, to rounding.
        found, cache = run(f"{base}+bounded(pages=2,base=2,eps=0.001,dense=0)")
        same = sum(a == b for row, other in zip(found, wanted, strict=True) for a, b in zip(row, other, strict=True))
        assert same >= 0.95 * 2 * 102
        audited = cache._pages.retriever
        assert audited is not None
        with audited.audit() as audit:
            model.generate(
                torch.tensor(found), max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache
            )
        assert audit.error.numel() > 0
        assert float(audit.error.median()) < 0.01


def test_latent_layers_select() -> None:
    model = build_model(tiny_config("deepseek_v3"))
    prompt = torch.randint(3, 60, (1, 120), generator=torch.Generator().manual_seed(0))
    errors = []
    for pages in (2, 8):
        cache = KVCache(model, f"raw,block=8,recent=8+quest(pages={pages},dense=0)", check=False)
        assert cache._pages.retriever is not None
        with cache._pages.retriever.audit() as audit:
            model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, past_key_values=cache)
        assert audit.error.numel() > 0
        assert 0 < audit.share_read < 1
        errors.append(float(audit.error.mean()))
    assert errors[1] < errors[0]
