"""The drop-in cache under generate(): raw gives the same tokens in every mode and for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from kvfold import KVCache
from kvfold.errors import BudgetError, CacheFullError, ModelError, RecipeError, UnsupportedError

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 98,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=12, layer_types=ALTERNATING),
    "gemma2": Gemma2Config(**SMALL, sliding_window=12, attn_logit_softcapping=5.0, layer_types=ALTERNATING),
    "gpt_oss": GptOssConfig(
        **SMALL, sliding_window=12, layer_types=ALTERNATING, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4, "head_dim": 8},
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # large enough for attention to matter
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make("llama")


def prompt(batch: int, length: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    inputs = prompt(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        inputs["input_ids"][row, : max(lengths) - length] = 0
        inputs["attention_mask"][row, : max(lengths) - length] = 0
    return inputs


MODES = {
    "greedy": (prompt(1, 40), {"max_new_tokens": 40}),
    "batch": (prompt(3, 33), {"max_new_tokens": 12}),
    "left padded": (padded([7, 40, 33]), {"max_new_tokens": 12}),
    "sample": (prompt(2, 20), {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 2}),
    "beams": (prompt(2, 31), {"max_new_tokens": 12, "num_beams": 3}),
    "prompt lookup": (prompt(1, 40), {"max_new_tokens": 30, "prompt_lookup_num_tokens": 4}),
}


@pytest.mark.parametrize("mode", MODES)
def test_raw_gives_stock_tokens(model: PreTrainedModel, mode: str) -> None:
    inputs, options = MODES[mode]
    torch.manual_seed(1)
    wanted = model.generate(**inputs, **options)
    torch.manual_seed(1)
    found = model.generate(**inputs, **options, past_key_values=KVCache(model))
    assert torch.equal(wanted, found)


def test_an_assistant_model_and_rollback(llama: PreTrainedModel) -> None:
    assistant = make("llama")
    inputs = prompt(1, 40)
    wanted = llama.generate(**inputs, max_new_tokens=24)
    cache = KVCache(llama)
    found = llama.generate(**inputs, max_new_tokens=24, assistant_model=assistant, past_key_values=cache)
    assert torch.equal(wanted, found)


def test_a_second_turn_on_the_same_cache(model: PreTrainedModel) -> None:
    cache = KVCache(model)
    first = model.generate(**prompt(1, 40), max_new_tokens=10, past_key_values=cache)
    longer = torch.cat((first, prompt(1, 9, seed=5)["input_ids"]), dim=1)
    found = model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=10, past_key_values=cache)
    wanted = model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=10)
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("recipe", ["int8", "int4", "k8v4", "int2", "int4,scales=channel,block=64"])
def test_packed_recipes_run_in_every_mode_and_are_smaller(llama: PreTrainedModel, recipe: str) -> None:
    for inputs, options in MODES.values():
        llama.generate(**inputs, **options, past_key_values=KVCache(llama, recipe))
    raw, packed = KVCache(llama), KVCache(llama, recipe)
    for cache in (raw, packed):
        llama.generate(**prompt(1, 400), max_new_tokens=4, past_key_values=cache)
    assert packed.kv_bytes < raw.kv_bytes * 0.7
    packed.reset()
    assert packed.kv_bytes == 0


@torch.no_grad()
def test_every_kind_of_layer_attends_over_packed_pages(model: PreTrainedModel) -> None:
    ids = prompt(1, 150)["input_ids"]
    wanted = model(ids).logits
    errors = []
    for recipe in ("int8,recent=0,sinks=0", "int2,recent=0,sinks=0"):
        cache = KVCache(model, recipe)
        model(ids[:, :128], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(128, 150)]
        errors.append(float((torch.cat(steps, 1) - wanted[:, 128:]).abs().max() / wanted.std()))
    assert errors[0] < 0.5
    assert errors[0] < errors[1] / 4 or errors[1] < 1e-3  # coarser codes are really what is read


def test_padding_takes_no_memory(llama: PreTrainedModel) -> None:
    cache, alone = KVCache(llama), KVCache(llama)
    llama.generate(**padded([5, 200]), max_new_tokens=2, past_key_values=cache)
    llama.generate(**prompt(1, 200), max_new_tokens=2, past_key_values=alone)
    assert cache.kv_bytes < alone.kv_bytes * 1.3


def test_the_model_is_what_it_was_outside_of_a_cached_forward(llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    wanted = llama(**prompt(2, 9)).logits
    llama.generate(**prompt(1, 9), max_new_tokens=3, past_key_values=KVCache(llama))
    assert llama.config._attn_implementation == before
    assert torch.equal(llama(**prompt(2, 9)).logits, wanted)


def test_a_budget_is_hard_and_the_cache_survives_it(llama: PreTrainedModel) -> None:
    cache = KVCache(llama, kv_memory="256KiB")
    with pytest.raises(CacheFullError):
        llama.generate(**prompt(1, 500), max_new_tokens=1, past_key_values=cache)
    assert llama.config._attn_implementation == "sdpa"
    llama.generate(**prompt(1, 40), max_new_tokens=2, past_key_values=cache)


def test_what_cannot_work_is_refused_before_the_first_token(llama: PreTrainedModel) -> None:
    with pytest.raises(RecipeError, match="int5"):
        KVCache(llama, "int5")
    with pytest.raises(BudgetError):
        KVCache(llama, kv_memory="1KiB")
    with pytest.raises(ModelError, match="not a transformers model"):
        KVCache(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    recurrent = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50))
    with pytest.raises(UnsupportedError):
        KVCache(recurrent)
    with pytest.raises(ModelError, match="not in a forward"):
        KVCache(make("llama")).update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)


def test_a_changed_mask_or_batch_is_refused(llama: PreTrainedModel) -> None:
    cache = KVCache(llama)
    inputs = prompt(2, 10)
    llama(**inputs, past_key_values=cache)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(UnsupportedError, match="mask"):
        llama(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="batch"):
        llama(inputs["input_ids"][:1, :1], past_key_values=cache)


def test_an_error_in_a_forward_leaves_model_and_cache_as_they_were(llama: PreTrainedModel) -> None:
    cache, inputs = KVCache(llama), prompt(1, 40)
    llama(**inputs, past_key_values=cache)
    before = cache.kv_bytes
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_: object, error: type[BaseException] = error) -> None:
            raise error

        hook = llama.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(error):
            llama(inputs["input_ids"][:, :9], past_key_values=cache)
        hook.remove()
        wanted = llama(**prompt(1, 5)).logits  # a forward without a cache
        assert torch.isfinite(wanted).all()
        assert llama.config._attn_implementation == "sdpa"
        assert (cache.kv_bytes, cache.get_seq_length()) == (before, 40)
    longer = torch.cat((inputs["input_ids"], prompt(1, 9, seed=5)["input_ids"]), dim=1)
    found = llama(longer[:, 40:], past_key_values=cache).logits
    assert torch.allclose(found, llama(longer).logits[:, 40:], atol=1e-4)


def test_a_failed_seal_leaves_the_cache_as_it_was(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, inputs = KVCache(llama, "int4,recent=0"), prompt(1, 100)
    llama(**inputs, past_key_values=cache)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("kvfold.cache.seal", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            llama(prompt(1, 40)["input_ids"], past_key_values=cache)
    assert cache.get_seq_length() == 100
    llama(prompt(1, 40)["input_ids"], past_key_values=cache)
    cache._pages.manager.check()
    assert cache.get_seq_length() == 140


def test_a_mask_counts_wherever_it_stands_in_the_call(llama: PreTrainedModel) -> None:
    inputs = padded([5, 12])
    wanted = llama(**inputs, past_key_values=KVCache(llama)).logits[:, -1]
    found = llama(inputs["input_ids"], inputs["attention_mask"], past_key_values=KVCache(llama)).logits[:, -1]
    assert torch.equal(wanted, found)


def test_turns_in_and_out_of_inference_mode(llama: PreTrainedModel) -> None:
    cache, inputs = KVCache(llama), prompt(1, 300)
    with torch.inference_mode():
        llama(**inputs, past_key_values=cache)
    with torch.no_grad():
        llama(prompt(1, 90)["input_ids"], past_key_values=cache)
    assert cache.get_seq_length() == 390
    assert cache.allocated_bytes >= cache.kv_bytes - 8 * 390


def test_another_batch_size_may_follow_a_first_forward_that_failed(llama: PreTrainedModel) -> None:
    cache = KVCache(llama, kv_memory="256KiB")
    with pytest.raises(CacheFullError):
        llama(**prompt(4, 400), past_key_values=cache)
    llama(**prompt(1, 40), past_key_values=cache)
    assert cache.batch_size == 1


def test_the_smallest_blocks_work(llama: PreTrainedModel) -> None:
    options = {"max_new_tokens": 6, "do_sample": False}
    found = llama.generate(**prompt(2, 9), **options, past_key_values=KVCache(llama, "int8,block=1,sinks=0,recent=0"))
    assert found.shape == (2, 15)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_rollback_reaches_behind_a_window(name: str) -> None:
    model, inputs = make(name), prompt(1, 20)
    inputs["input_ids"] = inputs["input_ids"].repeat(1, 12)  # repetition makes drafts, and many of them are wrong
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 60, "prompt_lookup_num_tokens": 8}
    wanted = model.generate(**inputs, **options)
    cache = KVCache(model)
    assert torch.equal(wanted, model.generate(**inputs, **options, past_key_values=cache))
    used = KVCache(model)
    model.generate(**inputs, max_new_tokens=2, past_key_values=used)
    with pytest.raises(UnsupportedError, match="rolling back"):
        used.activate_past_recording()
