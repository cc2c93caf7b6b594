"""What a prompt may be, and what is said of everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvfold.engine import Engine, SamplingParams
from kvfold.errors import RequestError
from tests.engine.tiny_engine import byte_tokenizer, engine_of, tiny_model

ONE = SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def engine() -> Any:
    with engine_of(tiny_model(), tokenizer=byte_tokenizer()) as made:
        yield made


def _prompts(engine: Engine, prompts: Any) -> list[list[int]]:
    return [output.prompt_token_ids for output in engine.generate(prompts, ONE)]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.array([5, 6, 7]), [[5, 6, 7]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        (torch.tensor([[5, 6]]), [[5, 6]]),
        ([np.array([5, 6]), np.array([7])], [[5, 6], [7]]),
        ([torch.tensor([5, 6]), [7, 8], (9,), range(5, 7)], [[5, 6], [7, 8], [9], [5, 6]]),
        ([np.int64(5), np.uint8(6)], [[5, 6]]),
        ([torch.tensor(5), 6], [[5, 6]]),
        ([[5, np.int32(6)], "a"], [[5, 6], [67]]),
        ((5, 6), [[5, 6]]),
        (["a", [{"role": "user", "content": "b"}]], None),
        ([], []),
    ],
)
def test_what_is_clear_is_taken(engine: Engine, given: Any, wanted: list[list[int]] | None) -> None:
    found = _prompts(engine, given)
    if wanted is not None:
        assert [[int(token) for token in prompt] for prompt in found] == wanted
        assert all(type(token) is int for prompt in found for token in prompt)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([[5, np.array([6])]], "prompt 0.*token 1.*array"),
        ([[5, 6], [7, torch.tensor([8, 9])]], "prompt 1.*token 1"),
        ([[5, 6], [[7]]], "prompt 1.*token 0.*list"),
        ([torch.tensor([[5, 6]])], "prompt 0.*2 dimensions"),
        (np.zeros((2, 2, 2), dtype=int), "3 dimensions"),
        (np.array([1.5]), "float64"),
        ([np.array([1.5])], "prompt 0.*float64"),
        (torch.tensor([1.0]), "float32"),
        ([5, 6.5], "token 1.*6.5"),
        ([[5, 6.0]], "prompt 0.*token 1"),
        ([[5, None]], "prompt 0.*token 1.*None"),
        ([[5, True]], "prompt 0.*token 1.*True"),
        ([True, False], "token 0.*True"),
        ([5, "a"], "token 1.*str"),
        (["a", 5], "prompt 1.*int"),
        (["a", None], "prompt 1.*None"),
        (None, "None"),
        (5, "int"),
        (b"abc", "bytes"),
        ([b"abc"], "prompt 0.*bytes"),
        ({"input_ids": [5]}, "input_ids"),
        ([{"content": "no role"}], "message 0.*role"),
        (["a", [{"role": "user", "content": "b"}, {}]], "prompt 1.*message 1.*role"),
        (["a", [{"role": "user", "content": "b"}, 5]], "prompt 1.*message 1"),
        ("a\ud800", "Unicode"),
        (["fine", "a\ud800"], "prompt 1.*Unicode"),
        ({5, 6}, "set"),
        (iter([5, 6]), "iterator"),
        ([[]], "prompt 0.*empty"),
        ("", "empty"),
        ([[5, 6], [5, -1]], "prompt 1.*-1.*vocabulary"),
        ([[5, 10**30]], "prompt 0.*vocabulary"),
    ],
)
def test_what_is_not_is_refused_by_its_place(engine: Engine, given: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate(given, ONE)
    assert all(part in str(caught.value) for part in said.split(".*")), str(caught.value)
    assert caught.value.why
    assert not engine.has_unfinished()


def test_a_single_request_takes_the_same(engine: Engine) -> None:
    engine.add_request(np.array([5, 6]), ONE)
    engine.add_request(torch.tensor([5, 6]), ONE)
    while engine.has_unfinished():
        assert all(output.prompt_token_ids == [5, 6] for output in engine.step())
    with pytest.raises(RequestError, match=r"token 1.*array"):
        engine.add_request([5, np.array([6])], ONE)
