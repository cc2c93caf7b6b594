"""Rotary factors that depend on the length, in the drop-in cache: read again at the limit, still under the recipe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvfold import KVCache
from kvfold.errors import UnsupportedError
from tests.rotary_models import CONFIGS, LIMIT, READ_AGAIN, right_logits, rotary_model, stock_greedy, tokens_of

MODELS = {name: rotary_model(name) for name in CONFIGS}
NEAR = 2e-3


def generate(model: PreTrainedModel, ids: Tensor, cache: KVCache | None, count: int, **more: Any) -> Any:
    """Greedy unless ``more`` says otherwise, with the logits of every step."""
    settled = {"max_new_tokens": count, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mask = more.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **(settled | more))


def check(model: PreTrainedModel, row: Tensor, prompt: int, logits: Any, *, tolerance: float = NEAR) -> None:
    """The ``logits`` of every step behind the first ``prompt`` tokens of a ``row`` are the right ones."""
    wanted = right_logits(model, row.tolist(), prompt).log_softmax(-1)
    found = torch.cat(list(logits)).float().log_softmax(-1)
    chosen = row[prompt:, None]
    assert torch.allclose(found.gather(1, chosen), wanted.gather(1, chosen), atol=tolerance)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("length", [LIMIT - 5, LIMIT, LIMIT + 1, LIMIT + 20])
def test_greedy_over_the_limit(name: str, length: int) -> None:
    model, ids = copy.deepcopy(MODELS[name]), torch.tensor([tokens_of(length)])
    cache = KVCache(model, "raw", check=False)
    out = generate(model, ids, cache, 12)
    check(MODELS[name], out.sequences[0], length, out.logits)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == length + 11
    if name != "dynamic":
        assert out.sequences[0, length:].tolist() == stock_greedy(model, ids[0].tolist(), 12)


@pytest.mark.parametrize("name", READ_AGAIN)
@pytest.mark.parametrize("length", [LIMIT - 3, LIMIT + 20])
def test_the_recipe_keeps_applying(name: str, length: int) -> None:
    model, ids = MODELS[name], torch.tensor([tokens_of(length)])
    cache = KVCache(model, "int8,block=8,recent=8", check=False)
    raw = KVCache(model, "raw,block=8", check=False)
    out = generate(model, ids, cache, 40)
    generate(model, ids, raw, 40)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == raw.get_seq_length() == length + 39
    assert 0 < cache.kv_bytes < 0.8 * raw.kv_bytes
    if name != "phimoe":  # rounding may send a token to another expert
        check(model, out.sequences[0], length, out.logits, tolerance=0.15)


@pytest.mark.parametrize("name", READ_AGAIN)
def test_a_padded_batch(name: str) -> None:
    """Factors are those of the longest row, as in a forward of stock."""
    model = MODELS[name]
    short, long = tokens_of(20, 1), tokens_of(LIMIT - 4, 2)
    ids = torch.tensor([[0] * (len(long) - len(short)) + short, long])
    cache = KVCache(model, "raw", check=False)
    out = generate(model, ids, cache, 10, attention_mask=(ids != 0).long())
    assert out.past_key_values is cache
    tokens = torch.cat(((ids != 0).long(), torch.ones(2, 10, dtype=torch.long)), dim=1)
    for step, logits in enumerate(out.logits):
        seen = len(long) + step
        mask = tokens[:, :seen]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.inference_mode():
            wanted = model(
                out.sequences[:, :seen], attention_mask=mask, position_ids=positions, use_cache=False
            ).logits[:, -1]
        assert torch.allclose(logits.log_softmax(-1), wanted.log_softmax(-1), atol=NEAR)


@pytest.mark.parametrize("name", READ_AGAIN)
def test_padding_that_every_row_has_does_not_count(name: str) -> None:
    model, text = MODELS[name], tokens_of(LIMIT - 8)
    ids = torch.tensor([[0] * 6 + text])
    cache = KVCache(model, "raw", check=False)
    out = generate(model, ids, cache, 14, attention_mask=(ids != 0).long())
    assert out.sequences[0, ids.shape[1] :].tolist() == stock_greedy(model, text, 14)


@pytest.mark.parametrize("name", READ_AGAIN)
def test_beams(name: str) -> None:
    model, ids = MODELS[name], torch.tensor([tokens_of(LIMIT - 4, 5)])
    cache = KVCache(model, "raw", check=False)
    found = generate(model, ids, cache, 10, num_beams=3, num_return_sequences=3, output_scores=True)
    wanted = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        use_cache=False,
    )
    assert torch.equal(found.sequences, wanted)
    assert found.past_key_values is cache


@pytest.mark.parametrize("name", READ_AGAIN)
@pytest.mark.parametrize("length", [LIMIT - 6, LIMIT - 1, LIMIT + 9])
def test_candidates_that_are_rolled_back(name: str, length: int) -> None:
    """A step of prompt lookup may go over the limit and come back: what it keeps has the factors of the next one."""
    model, text = MODELS[name], tokens_of(5, 3) * 20
    ids = torch.tensor([text[:length]])
    cache = KVCache(model, "raw", check=False)
    out = generate(model, ids, cache, 14, prompt_lookup_num_tokens=4, output_logits=False)
    assert out.past_key_values is cache
    cut = min(LIMIT - 4, length + 13)  # up to here no candidate is beyond the limit
    rows = out.sequences[0].tolist()
    wanted = text[:length] + stock_greedy(model, text[:length], max(0, cut - length))
    assert rows[:cut] == wanted[:cut]
    after = max(length, LIMIT + 5)  # from here on all of them are
    assert rows[after:] == stock_greedy(model, rows[:after], length + 14 - after)


@pytest.mark.parametrize("name", READ_AGAIN)
def test_a_second_turn_goes_over_the_limit(name: str) -> None:
    model, cache = MODELS[name], KVCache(MODELS[name], "raw", check=False)
    first = generate(model, torch.tensor([tokens_of(20)]), cache, 6).sequences
    ids = torch.cat((first, torch.tensor([tokens_of(LIMIT, 4)])), dim=1)
    out = generate(model, ids, cache, 8)
    check(model, out.sequences[0], ids.shape[1], out.logits)
    assert out.past_key_values is cache


@pytest.mark.parametrize("name", READ_AGAIN)
def test_a_loop_by_hand_that_crosses_the_limit_is_refused(name: str) -> None:
    model, text = MODELS[name], torch.tensor([tokens_of(LIMIT + 10)])
    cache = KVCache(model, "raw", check=False)
    with torch.inference_mode():
        model(text[:, :30], past_key_values=cache)
        with pytest.raises(UnsupportedError, match=r"rotary factors change at.*\n?.*reset"):
            model(text[:, 30:], past_key_values=cache)
        assert cache.get_seq_length() == 30
        model(text[:, 30:LIMIT], past_key_values=cache)  # up to the limit it goes on
        cache.reset()
        found = model(text, past_key_values=cache).logits[0, -1]
        assert torch.allclose(found, model(text, use_cache=False).logits[0, -1], atol=1e-3)


def test_what_generate_cannot_read_again_is_refused() -> None:
    """A prompt of embeddings, or in chunks: the ids of the whole are not at hand at the switch."""
    model, ids = MODELS["llama"], torch.tensor([tokens_of(LIMIT - 3)])
    embeds = model.get_input_embeddings()(ids).detach()
    with pytest.raises(UnsupportedError, match="again under other rotary factors"):
        model.generate(inputs_embeds=embeds, past_key_values=KVCache(model, check=False), max_new_tokens=8)
    long = torch.tensor([tokens_of(LIMIT + 20)])
    with pytest.raises(UnsupportedError, match="again under other rotary factors"):
        generate(model, long, KVCache(model, check=False), 4, prefill_chunk_size=32)


def test_other_caches_and_copies_of_the_model_are_left_alone() -> None:
    model = rotary_model("phi3")
    KVCache(model, check=False)
    ids = torch.tensor([tokens_of(LIMIT - 4)])
    wanted = stock_greedy(model, ids[0].tolist(), 10)
    assert generate(model, ids, None, 10).sequences[0, ids.shape[1] :].tolist() == wanted
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # what the copy calls is its own
    cache = KVCache(other, "int8", check=False)
    out = generate(other, ids, cache, 10)
    assert out.past_key_values is cache
    check(other, out.sequences[0], ids.shape[1], out.logits, tolerance=0.15)


@pytest.mark.parametrize("name", READ_AGAIN)
def test_repeated_tokens_have_the_factors_of_the_cache(name: str) -> None:
    """A method that has a short context repeated goes over the limit with its positions, and not with its factors."""
    found = []
    for limit in (LIMIT, 1000):
        model = rotary_model(name, limit=limit)
        cache = KVCache(model, "raw,block=4,sinks=4,recent=4+kvzip(keep=0.5)", check=False)
        out = generate(model, torch.tensor([tokens_of(LIMIT - 8)]), cache, 6)
        found.append(torch.cat(list(out.logits)))
    assert torch.allclose(found[0], found[1], atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_right_whatever_the_way(data: st.DataObject) -> None:
    """Random models, lengths, turns and ways to draw, on one cache."""
    name = data.draw(st.sampled_from(READ_AGAIN), "model")
    model = MODELS[name]
    cache = KVCache(model, "raw,block=8", check=False)
    back = data.draw(st.booleans(), "rolled back")
    if back:
        cache.activate_past_recording()
    ids = torch.zeros(1, 0, dtype=torch.long)
    for turn in range(data.draw(st.integers(1, 3), "turns")):
        more = data.draw(st.integers(1, LIMIT), "prompt")
        ids = torch.cat((ids, torch.tensor([tokens_of(more, turn)])), dim=1)
        torch.manual_seed(turn)
        sampled = {"do_sample": True, "top_k": 0} if data.draw(st.booleans(), "sampled") else {}
        out = generate(model, ids, cache, data.draw(st.integers(1, 10), "tokens"), **sampled)
        check(model, out.sequences[0], ids.shape[1], out.logits)
        assert out.past_key_values is cache
        ids = out.sequences
        if back and cache.get_seq_length() > 4:
            cache.crop(-3)
            ids = ids[:, :-3]
