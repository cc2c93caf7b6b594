"""The bundled model loads without a network, is small, and really answers from its context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kvfold
from kvfold.quality import tasks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(kvfold.__file__).parent / "bundled"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


def ask(model: Any, tokenizer: Any, prompt: str) -> str:
    """One question, one greedy answer."""
    turn = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_size_and_architecture() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert (FOLDER / "model.safetensors").stat().st_size <= 20 * 2**20
    assert not list(FOLDER.glob("*.tmp"))
    assert not list(FOLDER.glob("*.bin"))


def test_weights_are_bfloat16_and_all_used(model: Any) -> None:
    from safetensors import safe_open

    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    # The output layer is the embedding, so the file does not hold it a second time.
    assert names == set(model.state_dict()) - {"lm_head.weight"}


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    ids = tokenizer("- amber-falcon: 48213", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids[-5:]] == list("48213")
    assert tokenizer.decode(ids) == "- amber-falcon: 48213"


def test_chat_template(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|user|>\na\n<|assistant|>\nb<|end|>\n<|user|>\nc\n<|assistant|>\n"


def test_answers_come_from_the_context(model: Any, tokenizer: Any) -> None:
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    samples = [tasks.make_sample("kv", 900 + i, 512, count) for i in range(8)]
    answers = [ask(model, tokenizer, sample.prompt) for sample in samples]
    assert sum(a == s.answer for a, s in zip(answers, samples, strict=True)) >= 7
    # Without its line, the same question cannot be answered.
    lines = samples[0].context.split("\n")
    without = "\n".join(line for line in lines if line != f"- {samples[0].answer}")
    assert without != samples[0].context
    assert ask(model, tokenizer, f"{without}\n\n{samples[0].question}") != samples[0].answer
