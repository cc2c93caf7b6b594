"""Finding a model: what is there loads, what is not is named with a hint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kvfold import available
from kvfold.available import available_memory
from kvfold.engine import Engine, SamplingParams, loading, source
from kvfold.engine.loading import end_tokens, load
from kvfold.errors import ModelError
from tests.engine.tiny_engine import assert_idle, byte_tokenizer, tiny_model


def test_a_saved_model_loads_as_it_was_saved_and_is_ready(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path, device="cpu")
    assert (model.dtype, model.training, tokenizer.eos_token_id) == (torch.bfloat16, False, 2)
    assert load(str(tmp_path), dtype=torch.float32, device="cpu")[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/dir", "a/b/c", Path("nowhere"), ""])
def test_a_missing_directory_is_named(name: str | Path) -> None:
    with pytest.raises(ModelError, match="no such directory") as error:
        load(name)
    assert error.value.hint


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("others", [(), ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")])
def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path, family: str, others: tuple[str, ...]) -> None:
    """Some classes make an empty tokenizer of nothing, under which every text is an empty prompt; others fail oddly."""
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    (tiny_model() if family == "llama" else gpt2).save_pretrained(tmp_path)
    for name in others:
        (tmp_path / name).write_text("{}")
    for start in (load, Engine):
        with pytest.raises(ModelError, match="no tokenizer") as error:
            start(tmp_path)
        assert error.value.why is not None
        assert "tokenizer.json" in error.value.why
        assert error.value.hint is not None
        assert "tokenizer=" in error.value.hint
    if family == "llama":
        with Engine(tmp_path, tokenizer=byte_tokenizer()) as engine:
            assert engine.generate("ab", SamplingParams(max_tokens=1))[0].prompt_token_ids == [67, 68]


def test_what_the_hub_does_not_have_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("nobody/nothing is not a repository\nlong explanation")

    monkeypatch.setattr(loading, "find_source", source.Source)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(ModelError) as error:
        load("nobody/nothing")
    assert "not a repository" in str(error.value)
    assert "long explanation" not in str(error.value)


def test_end_tokens_are_those_of_model_and_tokenizer() -> None:
    def model(ids: object) -> Any:
        return cast(Any, SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ids)))

    assert end_tokens(model([5, 6]), byte_tokenizer()) == {2, 5, 6}
    assert end_tokens(model(None), None) == set()
    assert end_tokens(model(7), None) == {7}


def test_memory_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = torch.device("cpu")
    assert available_memory(device) > 0
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    monkeypatch.setattr(available, "_CGROUP", tmp_path)
    assert available_memory(device) == 600
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 250\nactive_file 50\n")
    assert available_memory(device) == 850  # files that were read, such as weights, are let go when room is needed
    monkeypatch.setattr(available, "_MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(device) > 2**20


def test_the_bundled_model_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine("bundled", kv_memory="8MiB", recipe="int4") as engine:
        output = engine.generate("A list is", SamplingParams(max_tokens=8))[0]
        assert output.text == engine.tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert_idle(engine)
    monkeypatch.setattr(source, "BUNDLED", "nothing")
    with pytest.raises(ModelError, match="bundled model is missing"):
        load("nothing")
