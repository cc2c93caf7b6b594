"""Masks that are more than causal, and models with images: applied as stock does, or refused, never left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    create_causal_mask,
    or_masks,
    sliding_window_overlay,
)

from kvfold import Engine, KVCache, SamplingParams
from kvfold.errors import UnsupportedError
from tests import hf_models
from tests.hf_models import IMAGE_TOKEN, image_inputs, llama, prompt

MODELS = {"llava": hf_models.llava, "qwen2_vl": hf_models.qwen2_vl, "gemma3": hf_models.gemma3}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def text_model() -> PreTrainedModel:
    return llama()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_images_without_an_overlay_are_served(models: dict[str, PreTrainedModel], name: str) -> None:
    model, inputs = models[name], image_inputs(name)
    wanted = model(**inputs).logits
    found = model(**inputs, past_key_values=KVCache(model)).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False}
    tokens = model.generate(**inputs, **options, past_key_values=KVCache(model))
    assert torch.equal(tokens, model.generate(**inputs, **options))


@torch.no_grad()
def test_an_overlay_for_images_is_refused_before_the_first_token(models: dict[str, PreTrainedModel]) -> None:
    model, inputs = models["gemma3"], image_inputs("gemma3")
    cache = KVCache(model)
    with pytest.raises(UnsupportedError, match="causal"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="causal"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"


@torch.no_grad()
def test_an_overlay_over_embeddings_is_refused(models: dict[str, PreTrainedModel]) -> None:
    model, ids = models["gemma3"], prompt(1, 12)
    embeddings = model.get_input_embeddings()(ids)
    types = torch.zeros_like(ids)
    types[:, 3:7] = 1
    with pytest.raises(UnsupportedError, match="causal"):
        model(inputs_embeds=embeddings, token_type_ids=types, past_key_values=KVCache(model))


@torch.no_grad()
@pytest.mark.parametrize("given", ["image", "embeddings"])
def test_what_cannot_be_repeated_is_refused_before_the_first_token(
    models: dict[str, PreTrainedModel], given: str
) -> None:
    model, inputs = models["llava"], image_inputs("llava")
    cache = KVCache(model, "raw,block=4,recent=4,sinks=0+kvzip(keep=0.5)")
    if given == "embeddings":
        inputs = {"inputs_embeds": model.get_input_embeddings()(prompt(1, 16))}
    with pytest.raises(UnsupportedError, match="repeat") as error:
        model(**inputs, past_key_values=cache)
    assert error.value.hint
    assert (cache.get_seq_length(), cache.kv_bytes) == (0, 0)
    model(prompt(1, 16), past_key_values=cache)


@torch.no_grad()
def test_token_types_that_mark_nothing_change_nothing(models: dict[str, PreTrainedModel]) -> None:
    model, ids = models["gemma3"], prompt(2, 40)
    types, mask = torch.zeros_like(ids), torch.ones_like(ids)
    mask[0, :7] = 0
    wanted = model(ids, attention_mask=mask, token_type_ids=types).logits
    found = model(ids, attention_mask=mask, token_type_ids=types, past_key_values=KVCache(model)).logits
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "token_type_ids": types}
    tokens = model.generate(ids, **options, past_key_values=KVCache(model))
    assert torch.equal(tokens, model.generate(ids, **options))


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_serves_their_text(models: dict[str, PreTrainedModel], name: str) -> None:
    ids = prompt(1, 40)
    wanted = models[name].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with Engine(models[name], kv_memory="16MiB") as engine:
        found = engine.generate([ids[0].tolist()], SamplingParams(max_tokens=8, ignore_eos=True), progress=False)
    assert found[0].token_ids == wanted[0, 40:].tolist()


class Overlay:
    """``create_causal_mask`` of the Llama module with an overlay added, for the length of a ``with``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **overlay: Any) -> None:
        def mask(*args: Any, **given: Any) -> Any:
            return create_causal_mask(*args, **given, **overlay)

        monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", mask)


SPANS = torch.full((2, 64), -1)
SPANS[:, 10:14] = 0
OVERLAYS = {
    "blocks": {"block_sequence_ids": SPANS},
    "or": {"or_mask_function": lambda b, h, q, kv: (q < 6) & (kv < 6)},
    "or all": {"or_mask_function": lambda *_: torch.tensor(True)},
    "and": {"and_mask_function": lambda b, h, q, kv: (kv < 3) | (kv > 5)},
    "and window": {"and_mask_function": sliding_window_overlay(7)},
}
NOTHING = {
    "blocks": {"block_sequence_ids": torch.full((2, 64), -1)},
    "blocks of one": {"block_sequence_ids": torch.arange(64).expand(2, -1)},
    "or": {"or_mask_function": lambda b, h, q, kv: (q == 6) & (kv == 4)},
    "or never": {"or_mask_function": lambda *_: torch.tensor(False)},
    "and": {"and_mask_function": lambda b, h, q, kv: (kv < 3) | (q >= 0)},
}


@pytest.mark.parametrize("name", OVERLAYS)
@torch.no_grad()
def test_an_overlay_that_matters_is_refused(
    text_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cache, ids = KVCache(text_model), prompt(2, 30)
    Overlay(monkeypatch, **OVERLAYS[name])
    with pytest.raises(UnsupportedError, match="causal"):
        text_model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert text_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NOTHING)
@torch.no_grad()
def test_an_overlay_that_changes_nothing_is_served(
    text_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cache, ids, mask = KVCache(text_model), prompt(2, 31), torch.ones(2, 31, dtype=torch.long)
    mask[1, :9] = 0
    Overlay(monkeypatch, **NOTHING[name])
    for part in (slice(0, 20), slice(20, 30), slice(30, 31)):
        found = text_model(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache).logits
        wanted = text_model(ids[:, : part.stop], attention_mask=mask[:, : part.stop]).logits[:, part]
        assert torch.allclose(found[mask[:, part].bool()], wanted[mask[:, part].bool()], atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_mask_is_refused_exactly_where_it_deviates(data: st.DataObject) -> None:
    """Random compositions of transformers' own mask functions, against their value on every pair of positions."""
    from kvfold.masks import deviation

    past, count = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 12))
    window = data.draw(st.sampled_from([None, 5]))
    total = past + count
    ids = torch.tensor(data.draw(st.lists(st.integers(-1, 2), min_size=total, max_size=total)))[None]
    parts = {
        "causal": causal_mask_function,
        "window": sliding_window_overlay(5),
        "blocks": blockwise_overlay(ids),
        "late": lambda b, h, q, kv: q >= data_from,
        "early": lambda b, h, q, kv: kv < data_from,
    }
    data_from = data.draw(st.integers(0, total))
    names = data.draw(st.lists(st.sampled_from(sorted(parts)), max_size=3))
    given_ = causal_mask_function if window is None else and_masks(sliding_window_overlay(5), causal_mask_function)
    function = given_
    for name in names:
        join = data.draw(st.sampled_from([and_masks, or_masks]))
        function = join(function, parts[name])
    q, kv = torch.arange(past, total)[:, None], torch.arange(total)[None]
    b = torch.zeros(1, 1, dtype=torch.long)
    value = torch.as_tensor(function(b, b, q, kv)).expand(count, total)
    plain = [causal_mask_function(b, b, q, kv), (kv <= q) & (kv > q - 5)]
    found = deviation(
        function,
        batch_size=1,
        q_length=count,
        kv_length=total,
        q_offset=past,
        kv_offset=0,
        windows=frozenset({5}),
        padding=None,
        device=torch.device("cpu"),
    )
    if found is None:
        assert any(np.array_equal(value.numpy(), each.numpy()) for each in plain)
    elif "window" not in names:
        wanted = plain[1] if window else plain[0]
        assert not torch.equal(value, wanted)


BAD_MASKS = {
    "dict": ({"full_attention": None}, "dict"),
    "four dims": (torch.ones(2, 1, 9, 9, dtype=torch.bool), "2-D"),
    "three dims": (torch.ones(2, 9, 9), "2-D"),
    "too wide": (torch.ones(2, 10), "columns"),
    "additive": (torch.zeros(2, 9).index_fill(1, torch.tensor([0]), float("-inf")), "0 and 1"),
    "token types": (torch.full((2, 9), 2), "0 and 1"),
    "list": ([[1] * 9] * 2, "list"),
    "other batch": (torch.ones(3, 9), "rows"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_mask_of_another_kind_is_refused_by_name(text_model: PreTrainedModel, name: str) -> None:
    mask, text = BAD_MASKS[name]
    cache = KVCache(text_model)
    with pytest.raises(UnsupportedError, match=text) as error:
        text_model(prompt(2, 9), attention_mask=mask, past_key_values=cache)
    assert error.value.why
    assert error.value.hint
    assert cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
def test_masks_of_ones_and_zeros_are_read_in_every_dtype(text_model: PreTrainedModel, dtype: torch.dtype) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    wanted = text_model(prompt(2, 9), attention_mask=mask).logits
    found = text_model(prompt(2, 9), attention_mask=mask.to(dtype), past_key_values=KVCache(text_model)).logits
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-4)


def test_the_prompt_has_an_image() -> None:
    assert all((image_inputs(name)["input_ids"] == IMAGE_TOKEN).sum() == 4 for name in MODELS)
