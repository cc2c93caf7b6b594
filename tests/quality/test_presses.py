"""kvpress's methods as rivals, where benchmarks/rivals/setup.sh put them; and contexts, which all rivals are given."""

from __future__ import annotations

import zlib

import pytest
import torch
from benchmarks.rivals.catalog import make_rival
from benchmarks.rivals.pressed import HEADWISE, PRESSES, _kvpress, _restore
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.engine.loading import load
from kvfold.quality.metrics import divergence
from tests.quality.rival_samples import PROMPT, TOKENS, bytes_per_token, float_model, needs, source_tokens

QUESTION = 30  # tokens


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return float_model()


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return source_tokens()


@pytest.mark.parametrize("press", sorted(PRESSES))
def test_presses_hold_what_they_keep(press, model, tokens):
    needs(f"kvpress-{press}-0.75")
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    reference = make_rival("transformers-full", model).force(tokens, score_from=PROMPT)
    rival = make_rival(f"kvpress-{press}-0.75", model)
    forced = rival.force(tokens, score_from=PROMPT, decode_steps=1)
    kept = PROMPT if press in HEADWISE else PROMPT // 4
    # Layers that keep different shares keep the whole's share together, but for its window of 64.
    slack = 64 * bytes_per_token(model) if press == "pyramidkv" else 0
    assert abs(forced.kv_bytes - (kept + TOKENS - PROMPT) * bytes_per_token(model)) <= slack
    kl, _ = divergence(reference.logits, forced.logits)
    if press == "duo":  # its sinks and recent tokens are more than so short a prompt
        assert float(kl.max()) == 0
    else:
        assert 1e-4 < float(kl.mean()) < 3
    for contexts in (None, [180]):
        said = rival.generate([tokens[:200]], max_tokens=5, stop=frozenset(), contexts=contexts)
        assert len(said[0]) == 5
    # The model and transformers are as they were: nobody else is measured under a press.
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before
    again = make_rival("transformers-full", model).force(tokens, score_from=PROMPT)
    assert torch.equal(again.logits, reference.logits)


def test_a_press_that_drops_nothing_changes_nothing(model, tokens):
    needs("kvpress-snapkv-0.0")
    reference = make_rival("transformers-full", model).force(tokens, score_from=PROMPT)
    forced = make_rival("kvpress-snapkv-0.0", model).force(tokens, score_from=PROMPT)
    assert torch.equal(forced.logits, reference.logits)


@pytest.mark.parametrize("press", sorted(set(PRESSES) - {"pyramidkv", "duo"}))
def test_a_context_is_compressed_as_kvpress_does_it(press, model, tokens):
    """kvpress's own pipeline: the context under the press, the question behind it, then greedy steps."""
    needs(f"kvpress-{press}-0.5")
    rival, context, rest = make_rival(f"kvpress-{press}-0.5", model), tokens[: PROMPT - QUESTION], tokens[-QUESTION:]
    said = rival.generate([context + rest], max_tokens=8, stop=frozenset(), contexts=[len(context)])[0]
    kvpress, wrapped = _kvpress()
    pipeline = kvpress.KVPressTextGenerationPipeline(model=model, tokenizer=load("bundled")[1])
    inputs = {"context_ids": torch.tensor([context]), "questions_ids": [torch.tensor([rest])]}
    stop, model.generation_config.eos_token_id = model.generation_config.eos_token_id, -1
    stock = {"sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"]}
    forward = model.model.forward

    def given_positions(*, input_ids, **options):
        return forward(input_ids=input_ids, cache_position=torch.arange(input_ids.shape[1]), **options)

    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = wrapped["sdpa"]
        model.config._attn_implementation = "eager" if press == "observed-attention" else "sdpa"
        model.model.forward = given_positions
        torch.manual_seed(zlib.crc32(repr(context).encode()))
        with torch.inference_mode():
            answer = pipeline._forward(inputs, max_new_tokens=8, press=PRESSES[press](kvpress, 0.5))[0]
    finally:
        del model.model.forward
        model.config._attn_implementation, model.generation_config.eos_token_id = "sdpa", stop
        _restore(stock)
        rival.end()
    assert load("bundled")[1].decode(said, skip_special_tokens=True) == answer


@pytest.mark.parametrize(
    "name", ["kvpress-snapkv-0.75", "kvpress-pyramidkv-0.5", "truncation-0.5", "transformers-full"]
)
def test_a_context_has_not_seen_what_follows_it(name, model, tokens):
    """Whatever is asked, the same is kept of the context; as a whole prompt, not so."""
    needs(name)
    rival, size = make_rival(name, model), PROMPT - QUESTION
    with torch.inference_mode():
        kept = []
        for question in (tokens[-QUESTION:], tokens[:QUESTION]):
            reader, _ = rival.begin(tokens[:size] + question, size)
            rival.end()
            assert reader.position == PROMPT
            kept.append(reader.cache.layers[0].keys[:, :, :-QUESTION])
    assert torch.equal(*kept)


def test_what_follows_a_context_is_read_at_its_own_place(model, tokens):
    """With nothing dropped, the logits of one forward over all of it, whatever the layers' lengths."""
    for name in ("transformers-full", "kvpress-pyramidkv-0.0", "truncation-0.0"):
        needs(name)
        rival = make_rival(name, model)
        with torch.inference_mode():
            _, whole = rival.begin(tokens[:PROMPT])
            _, split = rival.begin(tokens[:PROMPT], PROMPT - QUESTION)
            rival.end()
        torch.testing.assert_close(split, whole, atol=2e-4, rtol=0)


def test_random_is_drawn_anew_for_each_prompt_and_alike_for_the_same(model, tokens):
    needs("kvpress-random-0.5")
    rival = make_rival("kvpress-random-0.5", model)
    state = torch.random.get_rng_state()
    one, two = (rival.force(tokens, score_from=PROMPT) for _ in range(2))
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_adakv_masks_so_much_of_a_head(model, tokens):
    """What it masks weighs nothing, on every layer, while the cache keeps its length."""
    needs("kvpress-adakv-snapkv-0.75")
    rival = make_rival("kvpress-adakv-snapkv-0.75", model)
    try:
        with torch.inference_mode():
            rival.begin(tokens[:PROMPT])
        heads = model.config.num_key_value_heads
        for layer in model.model.layers:
            _, _, places = layer.self_attn.masked_key_indices
            assert len(places) == heads * (PROMPT - PROMPT // 4)
    finally:
        rival.end()


def test_duo_masks_all_but_sinks_and_recent_tokens_in_that_share_of_heads(model, tokens):
    """Its heads are found on texts of this machine: kvpress would ask the network for a data set."""
    needs("kvpress-duo-0.75")
    rival = make_rival("kvpress-duo-0.75", model)
    try:
        with torch.inference_mode():
            rival.begin(tokens[:400])
        places = [layer.self_attn.masked_key_indices for layer in model.model.layers]
        heads = sum(len(set(head.tolist())) for _, head, _ in places)
        assert heads == 0.75 * len(places) * model.config.num_key_value_heads
        for _, head, place in places:
            assert place.tolist() == list(range(128, 400 - 256)) * len(set(head.tolist()))
    finally:
        rival.end()
