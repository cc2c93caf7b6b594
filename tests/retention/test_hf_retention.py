"""Retention in the drop-in cache: prompts are compressed when they have been read, whatever decodes after them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvfold import KVCache, SamplingParams
from kvfold.errors import UnsupportedError
from tests.engine.tiny_engine import engine_of, prompts_of, tiny_model

MODEL = tiny_model(context=1024)
RECIPE = "raw,block=8,recent=16+snapkv(keep=0.4)"


def generate(prompts, recipe, tokens=12, **options):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor([len(p) for p in prompts])[:, None]).long()
    cache = KVCache(MODEL, recipe, check=False)
    out = MODEL.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        **options,
    )
    cache._pages.manager.check()
    return out[:, longest:].tolist(), cache


@pytest.mark.parametrize("recipe", [RECIPE, "raw,block=8,recent=16+keydiff(budget=64,every=4)"])
def test_it_says_what_the_engine_says(recipe):
    prompts = prompts_of(150, 90)
    params = SamplingParams(max_tokens=12, min_tokens=12)
    with engine_of(MODEL, recipe=recipe) as engine:
        wanted = [output.token_ids for output in engine.generate(prompts, params, progress=False)]
    found, cache = generate(prompts, recipe)
    assert found == wanted
    assert cache._pages.retainer.stats.runs >= 2


def test_memory_goes_back_and_keeping_all_changes_nothing():
    prompts = prompts_of(200)
    full, cache = generate(prompts, "raw,block=8,recent=16")
    _, compressed = generate(prompts, "raw,block=8,recent=16+keydiff(keep=0.25)")
    same, _ = generate(prompts, "raw,block=8,recent=16+keydiff(keep=1.0)")
    assert same == full
    assert compressed.kv_bytes < 0.36 * cache.kv_bytes


def test_beams_prompt_lookup_and_further_turns():
    prompts = prompts_of(120)
    beams, _ = generate(prompts, RECIPE, num_beams=3)
    assert len(beams[0]) == 12
    plain, _ = generate(prompts, RECIPE)
    looked_up, _ = generate(prompts, RECIPE, prompt_lookup_num_tokens=3)
    assert looked_up == plain
    cache = KVCache(MODEL, RECIPE, check=False)
    ids = torch.tensor(prompts)
    for turn in range(3):
        ids = MODEL.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert cache._pages.retainer.stats.runs == turn + 1
        ids = torch.cat((ids, torch.tensor(prompts_of(40, seed=turn))), dim=1)
    cache._pages.manager.check()
    cache.reset()
    assert cache.kv_bytes == 0


METHODS = [
    "random(keep={})",
    "streaming(keep={})",
    "tova(keep={})",
    "snapkv(keep={})",
    "adakv(snapkv,keep={})",
    "pyramidkv(snapkv,keep={})",
    "criticalkv(snapkv,keep={})",
    "h2o(keep={})",
    "keydiff(keep={})",
    "expected_attention(keep={})",
    "kvzip(keep={})",
    "keepkv(snapkv,keep={})",
    "attention_matching(keep={})",
]


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    base=st.sampled_from(["raw", "int4", "int2"]),
    protected=st.sampled_from(["sinks=0,recent=0", "sinks=4,recent=0", "sinks=0,recent=8", "sinks=8,recent=24"]),
    keep=st.sampled_from([0.05, 0.3, 0.6]),
    counts=st.lists(st.sampled_from([1, 2, 3, 7, 8, 17, 40]), min_size=1, max_size=6),
)
@example(method=METHODS[1], base="raw", protected="sinks=0,recent=0", keep=0.3, counts=[40, 2, 2])
@example(method=METHODS[3], base="raw", protected="sinks=0,recent=8", keep=0.3, counts=[40, 40, 3, 3])
@example(method=METHODS[12], base="raw", protected="sinks=0,recent=8", keep=0.05, counts=[40])
def test_further_turns_go_on_however_little_was_kept(method, base, protected, keep, counts):
    cache = KVCache(MODEL, f"{base},block=8,{protected}+{method.format(keep)}", check=False)
    for seed, count in enumerate([24, *counts]):
        with torch.no_grad():
            logits = MODEL(torch.tensor(prompts_of(count, seed=seed)), past_key_values=cache).logits
        assert logits.isfinite().all()
        cache._pages.manager.check()
    assert cache.get_seq_length() == 24 + sum(counts)
    cache.reset()
    assert cache.kv_bytes == 0


def test_what_was_dropped_cannot_be_rolled_back_into():
    cache = KVCache(MODEL, RECIPE, check=False)
    MODEL(torch.tensor(prompts_of(120)), past_key_values=cache)
    with pytest.raises(UnsupportedError, match="retention has dropped"):
        cache.crop(-90)


def test_a_method_that_has_the_context_repeated_says_what_the_engine_says():
    recipe = "raw,block=8,recent=16+kvzip(keep=0.4)"
    prompts = prompts_of(150, 90)
    with engine_of(MODEL, recipe=recipe) as engine:
        params = SamplingParams(max_tokens=12, min_tokens=12)
        wanted = [output.token_ids for output in engine.generate(prompts, params, progress=False)]
    found, cache = generate(prompts, recipe)
    assert found == wanted
    assert cache._pages.retainer.stats.runs == 2
    embeddings = MODEL.get_input_embeddings()(torch.tensor(prompts_of(120)))
    unwatched = KVCache(MODEL, recipe, check=False)
    with pytest.raises(UnsupportedError, match="embeddings"):
        MODEL(inputs_embeds=embeddings, past_key_values=unwatched)
