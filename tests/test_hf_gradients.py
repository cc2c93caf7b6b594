"""What the drop-in cache cannot give is refused: attention weights, and gradients that would be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfold import KVCache
from kvfold.errors import UnsupportedError
from tests.hf_models import llama, prompt
from tests.test_hf import CONFIGS, make

IDS = prompt(1, 24)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


@pytest.mark.parametrize("how", ["argument", "generate", "model", "text config"])
def test_attention_weights_are_refused_before_the_first_token(model: PreTrainedModel, how: str) -> None:
    options: dict[str, Any] = {}
    if how in ("model", "text config"):
        model = llama(attn_implementation="eager")
        (model.config if how == "model" else model.model.config).output_attentions = True
    elif how == "generate":
        options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    else:
        options = {"output_attentions": True}
    cache, call = KVCache(model), model.generate if how == "generate" else model
    with pytest.raises(UnsupportedError, match="output_attentions") as error:
        call(IDS, past_key_values=cache, **options)
    assert error.value.why
    assert error.value.hint
    assert cache.get_seq_length() == 0


def test_no_attention_weights_and_hidden_states_are_served(model: PreTrainedModel) -> None:
    found = model(IDS, past_key_values=KVCache(model), output_attentions=False, output_hidden_states=True)
    wanted = model(IDS, output_hidden_states=True)
    for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def gradients(model: PreTrainedModel, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits.log_softmax(-1) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["raw", "int4,recent=0,sinks=0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_one_forward_are_those_of_stock_or_refused(name: str, recipe: str) -> None:
    model = make(name)
    wanted = gradients(model, model(prompt(2, 24)).logits)
    logits = model(prompt(2, 24), past_key_values=KVCache(model, recipe)).logits
    try:
        found = gradients(model, logits)
    except UnsupportedError:
        assert name in ("gemma2", "gpt_oss")  # soft caps and sinks go outside of autograd
        return
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, atol=1e-3 * float(value.abs().max() + 1e-3)), key


@pytest.mark.parametrize("counts", [(20, 1), (20, 4), (2, 22), (1,)])
def test_backward_through_a_past_is_refused(model: PreTrainedModel, counts: tuple[int, ...]) -> None:
    cache, start = KVCache(model), 0
    for count in counts:
        logits = model(IDS[:, start : start + count], past_key_values=cache).logits
        start += count
    assert torch.allclose(logits, model(IDS[:, :start]).logits[:, start - counts[-1] :], atol=1e-4)
    assert logits.requires_grad
    with pytest.raises(UnsupportedError, match="gradient") as error:
        logits.sum().backward()
    assert error.value.why
    assert error.value.hint


def test_a_row_without_gradient_beside_one_with_it_is_refused(model: PreTrainedModel) -> None:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :23] = 0  # one token of the first row: it goes through a kernel
    logits = model(prompt(2, 24), attention_mask=mask, past_key_values=KVCache(model)).logits
    with pytest.raises(UnsupportedError, match="gradient"):
        logits.sum().backward()


def test_gradients_in_half_precision_are_those_of_stock() -> None:
    model = llama(num_hidden_layers=1).to(torch.bfloat16)
    wanted = gradients(model, model(IDS).logits.float())
    found = gradients(model, model(IDS, past_key_values=KVCache(model)).logits.float())
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert float((found[key] - value).norm()) < 0.05 * float(value.norm()) + 1e-3, key


def test_without_gradients_nothing_is_in_the_way(model: PreTrainedModel) -> None:
    cache = KVCache(model)
    with torch.no_grad():
        model(IDS[:, :20], past_key_values=cache)
        assert not model(IDS[:, 20:], past_key_values=cache).logits.requires_grad
    frozen = llama().requires_grad_(False)
    cache = KVCache(frozen)
    frozen(IDS[:, :20], past_key_values=cache)
    assert not frozen(IDS[:, 20:], past_key_values=cache).logits.requires_grad
