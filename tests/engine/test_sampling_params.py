"""Sampling parameters: defaults, what is normalised, and that each bad value is refused by name."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from kvfold.engine import SamplingParams
from kvfold.errors import RequestError


def test_the_default_is_greedy_and_frozen() -> None:
    params = SamplingParams()
    assert params.greedy
    assert not SamplingParams(temperature=0.7).greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_stops_are_normalised() -> None:
    params = SamplingParams(stop=typing.cast(typing.Any, "END"), stop_token_ids=typing.cast(typing.Any, [3, 4]))
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 4)
    assert SamplingParams(stop=typing.cast(typing.Any, ["a", "b"])).stop == ("a", "b")
    assert SamplingParams(stop=typing.cast(typing.Any, None)).stop == ()


BAD = [
    ("n", 0),
    ("n", True),
    ("n", 1.5),
    ("max_tokens", 0),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_k", -2),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("stop", ("",)),
    ("stop", (3,)),
    ("stop_token_ids", ("3",)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", 7),
    ("min_tokens", -1),
    ("min_tokens", 500),
    ("seed", 1.0),
    ("logprobs", -1),
    ("ignore_eos", 1),
    ("context_tokens", 0),
    ("context_tokens", 1.5),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert field in str(error.value)
    assert error.value.why


def test_every_field_is_checked() -> None:
    lenient = {"include_stop_str_in_output", "skip_special_tokens"}  # checked together with ignore_eos
    assert {field.name for field in dataclasses.fields(SamplingParams)} == {field for field, _ in BAD} | lenient
