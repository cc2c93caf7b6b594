"""An interrupt in the middle of a forward, whatever it is and wherever it happens, leaves no state behind."""

from __future__ import annotations

import asyncio
import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvfold import KVCache
from kvfold.cache import PagedCache, SequenceWork
from kvfold.errors import ModelError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.packed import PackedModel
from kvfold.recipe import Recipe
from tests.hf_models import llama, prompt

ERRORS = [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError, asyncio.CancelledError]
RECIPES = ["raw", "int4,recent=0,sinks=0,block=8", "raw+snapkv(keep=1)", "int8+expected_attention(keep=1)"]
IDS = prompt(2, 24)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


@pytest.fixture(scope="module")
def packed_model() -> PreTrainedModel:
    return llama()


def configs_of(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return list(found.values())


def state_of(model: PreTrainedModel) -> list[Any]:
    """Everything that a forward may have switched: the configs, and the number of hooks on every module."""
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return [*(copy.deepcopy(config.__dict__) for config in configs_of(model)), hooks]


@contextmanager
def interrupted(module: nn.Module, error: type[BaseException], *, after: bool) -> Iterator[None]:
    """``module`` raises ``error`` before or after its work."""

    def fail(*_: object) -> None:
        raise error

    hook = module.register_forward_hook(fail) if after else module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def failing_write(calls: int, error: type[BaseException]) -> Iterator[None]:
    """The cache raises ``error`` at its ``calls``-th write of a layer."""
    from kvfold.step import Step

    plain, count = Step.write, 0

    def write(self: Step, layer: int, k: Tensor, v: Tensor) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise error
        plain(self, layer, k, v)

    Step.write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        Step.write = plain  # type: ignore[method-assign]


def places(model: PreTrainedModel) -> list[nn.Module]:
    """Modules inside of a forward: everything but the model itself, whose own hooks run around the forward."""
    return [module for module in model.modules() if module is not model and not isinstance(module, nn.ModuleList)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_an_interrupt_of_a_drop_in_forward_leaves_nothing(model: PreTrainedModel, data: st.DataObject) -> None:
    recipe = data.draw(st.sampled_from(RECIPES))
    before = data.draw(st.integers(0, 16))
    count = data.draw(st.integers(1, 24 - before))
    error = data.draw(st.sampled_from(ERRORS))
    stock = model(IDS[:, : before + count]).logits if recipe == "raw" else None
    model_state, cache, alone = state_of(model), KVCache(model, recipe), KVCache(model, recipe)
    with torch.no_grad():
        for each in (cache, alone):
            if before:
                model(IDS[:, :before], past_key_values=each)
        used = cache.kv_bytes
        if data.draw(st.booleans()):
            module = data.draw(st.sampled_from(places(model)))
            context = interrupted(module, error, after=data.draw(st.booleans()))
        else:
            context = failing_write(data.draw(st.integers(1, 2)), error)
        with context, pytest.raises(error):
            model(IDS[:, before : before + count], past_key_values=cache)
        assert state_of(model) == model_state
        assert (cache.get_seq_length(), cache.kv_bytes) == (before, used)
        cache._pages.manager.check()
        found = model(IDS[:, before : before + count], past_key_values=cache).logits
        wanted = model(IDS[:, before : before + count], past_key_values=alone).logits
        assert torch.equal(found, wanted)
        assert cache.kv_bytes == alone.kv_bytes
        if stock is not None:
            assert torch.allclose(found, stock[:, before:], atol=1e-4)
            assert torch.equal(model(IDS[:, : before + count]).logits, stock)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_an_interrupt_of_a_packed_forward_leaves_nothing(packed_model: PreTrainedModel, data: st.DataObject) -> None:
    model, error = packed_model, data.draw(st.sampled_from(ERRORS))
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=2))
    cache = PagedCache(Geometry.from_config(model.config), Recipe(), dtype=torch.float32, prefix_caching=False)
    sequences = [cache.create() for _ in counts]
    model_state, used, packed = state_of(model), cache.bytes_in_use(), PackedModel(model)

    def run() -> Tensor:
        step = cache.begin([SequenceWork(seq, n) for seq, n in zip(sequences, counts, strict=True)])
        ids = torch.cat([IDS[i, :n] for i, n in enumerate(counts)])
        positions = torch.cat([torch.arange(n) for n in counts])
        try:
            logits = packed.forward(step, ids, positions, torch.arange(ids.numel()), counts)
            cache.commit(step)
        except BaseException:
            cache.abandon(step)
            raise
        return logits

    if data.draw(st.booleans()):
        module = data.draw(st.sampled_from(places(model)))
        context = interrupted(module, error, after=data.draw(st.booleans()))
    else:
        context = failing_write(data.draw(st.integers(1, 2)), error)
    with context, pytest.raises(error):
        run()
    assert state_of(model) == model_state
    assert cache.bytes_in_use() == used
    cache.manager.check()
    found = run().split(counts)
    packed.release()
    for i, n in enumerate(counts):
        assert torch.allclose(found[i], model(IDS[i : i + 1, :n]).logits[0], atol=1e-4)


USES: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "model": lambda model, _: model(IDS).logits,
    "inner decoder": lambda model, _: model.model(IDS).last_hidden_state,
    "generate": lambda model, _: model.generate(IDS, max_new_tokens=3, do_sample=False),
    "other cache": lambda model, _: model(IDS, past_key_values=DynamicCache(config=model.config)).logits,
    "copy of the config": lambda model, _: copy.deepcopy(model.config).to_dict(),
    "copy of the model": lambda model, _: copy.deepcopy(model)(IDS).logits,
    "pickle of the config": lambda model, _: pickle.loads(pickle.dumps(model.config)).to_dict(),
    "save_pretrained": lambda model, path: (
        model.save_pretrained(path),
        AutoModelForCausalLM.from_pretrained(path)(IDS).logits,
    )[1],
}


@pytest.mark.parametrize("use", USES)
def test_every_later_use_is_that_of_an_untouched_model(use: str, tmp_path: Path) -> None:
    wanted = USES[use](llama(), tmp_path / "untouched")
    model = llama()
    cache = KVCache(model)
    with interrupted(model.model.layers[1].mlp, KeyboardInterrupt, after=False), pytest.raises(KeyboardInterrupt):
        model(IDS, past_key_values=cache)
    found = USES[use](model, tmp_path / "interrupted")
    assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted


@pytest.mark.parametrize("where", ["enter", "leave"])
def test_an_interrupt_while_the_model_is_switched(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A method that wants hidden states puts hooks on every layer: the second of them is where the interrupt comes."""
    cache, before, calls = KVCache(model, "raw+expected_attention(keep=0.5)"), state_of(model), 0
    owner, name = (nn.Module, "register_forward_pre_hook")
    if where == "leave":
        owner, name = torch.utils.hooks.RemovableHandle, "remove"
    plain = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(KeyboardInterrupt):
            model(IDS, past_key_values=cache)
    assert state_of(model) == before
    assert cache.get_seq_length() == 0


def test_the_inner_decoder_refuses_the_cache_of_the_whole_model() -> None:
    model = llama()
    cache, before = KVCache(model), state_of(model)
    with pytest.raises(ModelError, match="KVCache"):
        model.model(IDS, past_key_values=cache)
    assert state_of(model) == before
    assert cache.get_seq_length() == 0
    assert torch.allclose(model(IDS, past_key_values=cache).logits, model(IDS).logits, atol=1e-4)


def test_a_model_with_a_cache_can_be_copied_saved_and_inspected() -> None:
    model = llama()
    signature, wanted = inspect.signature(model.forward), model(IDS).logits
    first, second = KVCache(model), KVCache(model, "int8")
    model(IDS, past_key_values=first)
    model(IDS, past_key_values=second)
    assert inspect.signature(model.forward) == signature
    model_copy = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    nn.init.zeros_(model.lm_head.weight)
    for other in (model_copy, loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(model_copy))):
        assert torch.equal(other(IDS).logits, wanted)
        assert inspect.signature(other.forward) == signature
        assert torch.allclose(other(IDS, past_key_values=KVCache(other)).logits, wanted, atol=1e-4)
        with pytest.raises(ModelError, match="KVCache"):
            other(IDS, past_key_values=KVCache(model))
    assert not model(IDS, past_key_values=KVCache(model)).logits.any()


def test_other_hooks_and_wrappers_of_a_forward_stay() -> None:
    model, calls = llama(), []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("forward")
        return plain(*args, **kwargs)

    model.forward = forward
    cache = KVCache(model)
    calls.clear()
    model(IDS, past_key_values=cache)
    assert calls == ["before", "forward"]
    assert cache.get_seq_length() == IDS.shape[1]
    outer = model.forward
    model.forward = lambda *args, **kwargs: outer(*args, **kwargs)  # as accelerate does
    again = KVCache(model)
    found = model(IDS, past_key_values=again).logits
    assert torch.allclose(found, model(IDS).logits, atol=1e-4)
    assert again.get_seq_length() == IDS.shape[1]


REPEATED = "raw,block=4,recent=4,sinks=0+kvzip(keep=0.5)"


def failing_at(module: nn.Module, calls: int) -> Any:
    """A hook by which ``module`` raises KeyboardInterrupt at its call number ``calls``."""
    count = 0

    def fail(*_: object) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt

    return module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_an_interrupt_while_a_context_is_repeated_takes_the_forward_back(batch: int) -> None:
    model, ids = llama(), prompt(batch, 40)
    cache, alone, before = KVCache(model, REPEATED), KVCache(model, REPEATED), state_of(model)
    hook = failing_at(model.model.layers[1].mlp, 2)
    with pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    hook.remove()
    assert state_of(model) == before
    assert cache.get_seq_length() == 0
    for part in (ids, ids[:, :1]):
        found, wanted = (model(part, past_key_values=each).logits for each in (cache, alone))
        assert torch.equal(found, wanted)
    assert cache.kv_bytes == alone.kv_bytes


@torch.no_grad()
def test_an_interrupt_between_two_rows_retention_ends_the_cache() -> None:
    """The first row has lost tokens already: that cannot be taken back, and is not hidden."""
    model, ids = llama(), prompt(2, 40)
    cache = KVCache(model, REPEATED)
    hook = failing_at(model.model.layers[1].mlp, 3)
    with pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    hook.remove()
    with pytest.raises(UnsupportedError, match="interrupted") as error:
        model(ids, past_key_values=cache)
    assert "reset()" in error.value.hint
    cache.reset()
    wanted = model(ids, past_key_values=KVCache(model, REPEATED)).logits
    assert torch.equal(model(ids, past_key_values=cache).logits, wanted)
