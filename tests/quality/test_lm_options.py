"""The harness' generation options: every one is heeded or refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvfold.engine import SamplingParams
from kvfold.errors import RequestError
from kvfold.quality.lm_options import sampling_params

SPECIALS = {"<|end|>": 2}


def made(**options: Any) -> SamplingParams:
    return sampling_params(options, SPECIALS, max_gen_toks=256)


def test_a_task_that_says_nothing_is_greedy_with_the_default_length() -> None:
    assert made() == SamplingParams(max_tokens=256)


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_for_the_length_is_known(name: str) -> None:
    assert made(**{name: 7}).max_tokens == 7


def test_the_harness_name_for_the_length_goes_first() -> None:
    assert made(max_tokens=9, max_gen_toks=7).max_tokens == 7


@pytest.mark.parametrize(
    ("until", "stop", "ids"),
    [
        ("\n", ("\n",), ()),
        (["\n", "Q:", "\n", ""], ("\n", "Q:"), ()),
        (["<|end|>", "</s>"], ("</s>",), (2,)),
        ([], (), ()),
        (None, (), ()),
    ],
)
def test_stop_strings_and_stop_tokens(until: Any, stop: tuple[str, ...], ids: tuple[int, ...]) -> None:
    params = made(until=until)
    assert (params.stop, params.stop_token_ids) == (stop, ids)


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0}, 0.0),
    ],
)
def test_temperature_and_do_sample(options: dict[str, Any], temperature: float) -> None:
    assert made(**options).temperature == temperature


def test_what_has_the_same_name_goes_through() -> None:
    params = made(top_p=0.9, top_k=40, repetition_penalty=1.1, seed=3, min_new_tokens=2, do_sample=True, num_beams=1)
    assert (params.top_p, params.top_k, params.repetition_penalty, params.seed) == (0.9, 40, 1.1, 3)
    assert params.min_tokens == 2


@pytest.mark.parametrize("options", [{"num_beams": 10}, {"guidance_scale": 2.0}, {"top_p": 7.0}, {"max_gen_toks": 0}])
def test_what_cannot_be_done_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options)).replace("max_gen_toks", "max_tokens")):
        made(**options)
