"""What was computed with other weights is not found any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kvfold.engine import Engine, SamplingParams
from kvfold.errors import RequestError
from tests.engine.tiny_engine import assert_idle, engine_of, expected, prompts_of, tiny_model

PROMPT = prompts_of(70)[0]
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _said(engine: Engine, **options: Any) -> tuple[list[int], int]:
    output = engine.generate(PROMPT, PARAMS, **options)[0]
    return output.token_ids, output.num_cached_tokens


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1.5)


def _replaced(model: Any) -> None:
    old = model.model.layers[1].self_attn.v_proj.weight
    model.model.layers[1].self_attn.v_proj.weight = torch.nn.Parameter(-old.detach())


def _new_data(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = -weight.data


def _loaded(model: Any) -> None:
    model.load_state_dict(tiny_model(seed=5).state_dict())


def _trained(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _new_module(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)


CHANGES: list[Callable[[Any], None]] = [_in_place, _replaced, _new_data, _loaded, _trained, _new_module]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_a_change_of_weights_is_noticed(change: Callable[[Any], None]) -> None:
    model = tiny_model()
    with engine_of(model) as engine:
        before = _said(engine)
        assert _said(engine) == (before[0], 64)
        change(model)
        assert _said(engine) == (wanted := expected(model, PROMPT, 12), 0)
        assert wanted != before[0]
        assert _said(engine) == (wanted, 64)
        assert_idle(engine)


class _InBuffers(torch.nn.Module):
    """A linear layer with its weight in a buffer, as quantized layers have theirs."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scratch += 1
        return x @ self.qweight.mT


def test_weights_in_buffers_are_watched_and_scratch_is_not() -> None:
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    attention.k_proj = _InBuffers(attention.k_proj)
    with engine_of(model) as engine:
        _said(engine)
        assert _said(engine)[1] == 64
        attention.k_proj.qweight.mul_(-1.5)
        assert _said(engine) == (expected(model, PROMPT, 12), 0)


def _adapted() -> tuple[Any, Any]:
    base = tiny_model()
    torch.manual_seed(3)
    names = ["q_proj", "k_proj", "v_proj"]
    peft = get_peft_model(base, LoraConfig(r=4, target_modules=names, init_lora_weights=False), adapter_name="one")
    peft.add_adapter("two", LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    return base, peft.eval()


@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted")
def test_adapters_that_are_switched_off_or_merged_are_noticed() -> None:
    base, peft = _adapted()
    with engine_of(base) as engine:
        seen = []
        for name in ("one", "two", "one"):
            peft.set_adapter(name)
            assert _said(engine) == (expected(base, PROMPT, 12), 0)
            assert _said(engine)[1] == 64
            seen.append(_said(engine)[0])
        assert seen[0] == seen[2] != seen[1]
        with peft.disable_adapter():
            assert _said(engine) == (expected(base, PROMPT, 12), 0)
        assert _said(engine) == (seen[0], 0)
        peft.merge_adapter()
        assert _said(engine)[1] == 0
        peft.unmerge_adapter()
        assert _said(engine)[1] == 0
        for layer in peft.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(5.0)
        assert _said(engine) == (expected(base, PROMPT, 12), 0)
        peft.delete_adapter("one")
        assert _said(engine) == (expected(base, PROMPT, 12), 0)


def test_what_cannot_be_noticed_is_told_by_hand() -> None:
    model = tiny_model()
    with engine_of(model) as engine:
        _said(engine)
        model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1.5)  # `.data` counts no versions
        engine.reset_prefix_cache()
        assert _said(engine) == (expected(model, PROMPT, 12), 0)


def test_a_request_under_way_offers_nothing_of_the_old_weights() -> None:
    model = tiny_model()
    with engine_of(model, max_batched_tokens=16, max_sequences=4) as engine:
        engine.add_request(PROMPT, SamplingParams(max_tokens=90, ignore_eos=True), request_id="old")
        for _ in range(3):
            engine.step()
        _in_place(model)
        assert _said(engine) == (wanted := expected(model, PROMPT, 12), 0)
        while engine.has_unfinished():
            (done,) = engine.step() or [None]
            if done is not None:
                assert (done.request_id, len(done.token_ids)) == ("old", 90)
        assert _said(engine)[0] == wanted
        assert_idle(engine)


def test_a_context_of_the_old_weights_is_refused_and_requests_that_wait_for_it_read_it_themselves() -> None:
    model = tiny_model()
    with engine_of(model) as engine:
        context = engine.add_context(PROMPT[:40])
        engine.add_request(PROMPT[40:], PARAMS, context=context)
        _in_place(model)
        (output,) = [done for _ in range(40) for done in engine.step()]
        assert output.token_ids == expected(model, PROMPT, 12)
        with pytest.raises(RequestError, match="weights") as error:
            engine.generate(PROMPT[40:], PARAMS, context=context)
        assert "add_context" in (error.value.hint or "")
        engine.remove_context(context)
        assert_idle(engine)
