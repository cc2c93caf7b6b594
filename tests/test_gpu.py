"""The same runtime on a GPU: what the CPU tests promise, on CUDA tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvfold import Engine, KVCache, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=199,
        max_position_embeddings=1024,
        eos_token_id=198,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to("cuda")


def prompts(count: int) -> torch.Tensor:
    return torch.randint(3, 190, (count, 150), generator=torch.Generator().manual_seed(0)).to("cuda")


def test_raw_gives_stock_tokens(model: PreTrainedModel) -> None:
    ids = prompts(3)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, past_key_values=KVCache(model)))


@pytest.mark.parametrize("recipe", ["raw", "int8", "int4", "int2"])
def test_the_engine_runs_every_recipe_and_ends_empty(model: PreTrainedModel, recipe: str) -> None:
    with Engine(model, recipe=recipe, kv_memory="64MiB") as engine:
        outputs = engine.generate(prompts(4).tolist(), SamplingParams(max_tokens=40), progress=False)
        assert all(output.finish_reason in ("length", "stop") for output in outputs)
        assert engine.stats()["kv_in_use_bytes"] == 0
