"""Models that are compiled, cast, quantized or wrapped: the right result, or an error that says what to do."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from kvfold import KVCache
from kvfold.errors import KVFoldError, ModelError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.packed import check_model
from tests.hf_models import llama, prompt

IDS = prompt(2, 30)
MASK = torch.ones_like(IDS)
OPTIONS: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def model() -> PreTrainedModel:
    return llama()


@pytest.fixture
def shallow() -> PreTrainedModel:
    """One layer: what is compiled again for every shape takes seconds."""
    return llama(num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: PreTrainedModel, what: str) -> Any:
    """``model`` with a part of it compiled; what to call."""
    if what == "model":
        return torch.compile(model, backend="eager")
    if what == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif what == "in place":
        model.compile(backend="eager")
    elif what == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    else:
        model.model = torch.compile(model.model, backend="eager")
    return model


@pytest.mark.parametrize(
    ("what", "recipe", "before"),
    [
        ("model", "raw", True),
        ("forward", "int8", False),
        ("in place", "raw", True),
        ("layers", "int8", True),
        ("inner", "raw", False),
    ],
)
@torch.no_grad()
def test_a_compiled_model_gives_the_same(shallow: PreTrainedModel, what: str, recipe: str, before: bool) -> None:
    model = shallow
    plain = copy.deepcopy(model)
    cache = KVCache(model, recipe) if before else None
    call = compiled(model, what)
    if cache is None:
        cache = KVCache(model, recipe, check=False)  # the check would have more shapes compiled
    other, wanted = KVCache(plain, recipe), plain(IDS).logits
    assert torch.allclose(call(IDS).logits, wanted, atol=1e-4)  # without a cache, before and after
    for part in (slice(0, 29), slice(29, 30)):
        found = call(IDS[:, part], past_key_values=cache).logits
        assert torch.allclose(found, plain(IDS[:, part], past_key_values=other).logits, atol=1e-4)
    assert cache.get_seq_length() == 30
    assert torch.allclose(call(IDS).logits, wanted, atol=1e-4)


@torch.no_grad()
def test_generate_with_a_compiled_forward(shallow: PreTrainedModel) -> None:
    model = shallow
    wanted = model.generate(IDS, **OPTIONS)
    compiled(model, "in place")
    cache = KVCache(model, check=False)
    assert torch.equal(model.generate(IDS, **OPTIONS, past_key_values=cache), wanted)


@torch.no_grad()
def test_a_compiled_layer_shows_retention_its_hidden_states(shallow: PreTrainedModel) -> None:
    model = shallow
    recipe = "raw,block=4,recent=4,sinks=0+expected_attention(keep=0.4)"
    plain = copy.deepcopy(model)
    compiled(model, "layers")
    model(IDS)
    cache, other = KVCache(model, recipe), KVCache(plain, recipe)
    for ids in (IDS, IDS[:, :4]):
        found = model(ids, past_key_values=cache).logits
        assert torch.allclose(found, plain(ids, past_key_values=other).logits, atol=1e-4)


@torch.no_grad()
def test_a_cache_of_a_compiled_model_is_that_of_the_model(shallow: PreTrainedModel) -> None:
    model = shallow
    wrapped = torch.compile(model, backend="eager")
    wanted = model.generate(IDS, **OPTIONS)
    assert torch.equal(wrapped.generate(IDS, **OPTIONS, past_key_values=KVCache(wrapped)), wanted)
    assert torch.allclose(wrapped(IDS, past_key_values=KVCache(wrapped)).logits, model(IDS).logits, atol=1e-4)


@torch.no_grad()
def test_a_whole_graph_is_refused_with_a_cache_and_served_without(shallow: PreTrainedModel) -> None:
    model = shallow
    cache = KVCache(model)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(whole(IDS).logits, model(IDS).logits, atol=1e-4)
    with pytest.raises(Exception, match=r"(?s)kvfold.*fullgraph"):
        whole(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["raw", "int8"])
def test_autocast_gives_what_stock_gives_under_it(model: PreTrainedModel, recipe: str, dtype: torch.dtype) -> None:
    cache, exact = KVCache(model, recipe), model(IDS).logits
    with torch.autocast("cpu", dtype):
        wanted = model(IDS).logits
        found = [model(IDS[:, :25], past_key_values=cache).logits]
        found += [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(25, 30)]
    own = (wanted - exact).abs().max()
    assert (torch.cat(found, 1) - exact).abs().max() < 3 * own + 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_empty_cache_takes_the_dtype_that_the_model_has_now(model: PreTrainedModel, dtype: torch.dtype) -> None:
    cache, made_after = KVCache(model), copy.deepcopy(model).to(dtype)
    model.to(dtype)
    other = KVCache(made_after)
    for part in (slice(0, 20), slice(20, 30)):
        found = model(IDS[:, part], past_key_values=cache).logits
        assert torch.equal(found, made_after(IDS[:, part], past_key_values=other).logits)
    assert cache.kv_bytes == other.kv_bytes


@torch.no_grad()
@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")])
def test_a_used_cache_refuses_a_model_that_was_cast_or_moved(model: PreTrainedModel, change: Any) -> None:
    cache = KVCache(model)
    model(IDS, past_key_values=cache)
    ids = IDS[:, :1]
    change(model)
    with pytest.raises(UnsupportedError, match="float32") as error:
        model(ids.to(model.device), past_key_values=cache)
    assert error.value.hint
    assert cache.get_seq_length() == 30


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_dynamically_quantized_weights_are_served(seed: int) -> None:
    model = quantized(llama(num_hidden_layers=2 + 2 * seed))
    cache = KVCache(model)
    found = model(IDS[:1], past_key_values=cache).logits
    assert (found - model(IDS[:1]).logits).std() < 0.1 * found.std()


@pytest.mark.parametrize("window", [2, 4, 8])
def test_a_wrong_mask_is_seen_under_the_noise_of_quantized_weights(window: int) -> None:
    model = quantized(llama())
    geometry = Geometry.from_config(model.config)
    layers = tuple(dataclasses.replace(layer, window=window, kind="sliding") for layer in geometry.layers)
    with pytest.raises(UnsupportedError, match="keys or masks of its own"):
        check_model(model, dataclasses.replace(geometry, layers=layers))


def test_a_model_too_noisy_to_tell_is_said_to_be_that(model: PreTrainedModel) -> None:
    noise = torch.Generator().manual_seed(0)

    def shake(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.randn(output.shape, generator=noise) * output.std()

    model.model.layers[0].mlp.register_forward_hook(shake)
    with pytest.raises(UnsupportedError, match="its own logits differ") as error:
        KVCache(model)
    assert "check=False" in error.value.hint
    KVCache(model, check=False)


@torch.no_grad()
def test_adapters_run_on_the_cache_of_their_base_model(model: PreTrainedModel) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.raises(ModelError, match="PeftModel") as error:
        KVCache(adapted)
    assert "get_base_model()" in error.value.hint
    wanted = adapted.generate(input_ids=IDS, **OPTIONS)
    cache = KVCache(adapted.get_base_model())
    assert torch.equal(adapted.generate(input_ids=IDS, **OPTIONS, past_key_values=cache), wanted)
    assert cache.get_seq_length() == 32


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@torch.no_grad()
def test_virtual_tokens_that_are_embeddings_run_on_the_cache_of_the_base_model(model: PreTrainedModel) -> None:
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    wanted = adapted.generate(input_ids=IDS, **OPTIONS)
    cache = KVCache(adapted.get_base_model())
    assert torch.equal(adapted.generate(input_ids=IDS, **OPTIONS, past_key_values=cache), wanted)
    assert cache.get_seq_length() == 36


def test_virtual_tokens_that_are_keys_and_values_are_refused(model: PreTrainedModel) -> None:
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(UnsupportedError, match="virtual tokens") as error:
        KVCache(adapted)
    assert error.value.hint
    with pytest.raises(UnsupportedError, match="virtual tokens") as error:
        adapted.generate(input_ids=IDS, **OPTIONS, past_key_values=KVCache(adapted.get_base_model()))
    assert error.value.hint


def test_a_model_without_a_head_is_refused_and_left_alone(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="no logits") as error:
        KVCache(model.model)
    assert error.value.hint
    assert "forward" not in vars(model.model)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.DataParallel(llama()), "a path", None])
def test_what_is_no_model_is_refused_by_its_kind(other: Any) -> None:
    with pytest.raises(KVFoldError, match=type(other).__name__) as error:
        KVCache(other)
    assert error.value.why
