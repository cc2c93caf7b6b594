"""What an evaluation is asked for, refused where it makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvfold.errors import RequestError
from kvfold.quality.settings import EvalSettings, parse_depths, parse_tasks
from kvfold.quality.tasks import TASKS


def test_tasks() -> None:
    assert parse_tasks("all") == TASKS
    assert parse_tasks("none") == ()
    assert parse_tasks(" kv, vt,kv ") == ("kv", "vt")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("niah", "did you mean 'niah_"),
        ("kw", "did you mean 'kv'"),
        ("xyz", "known: niah_single"),
        ("", "none is named"),
    ],
)
def test_unknown_tasks(text: str, says: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_tasks(text)
    assert says in str(refused.value)
    assert refused.value.hint


def test_depths() -> None:
    assert parse_depths("") == ()
    assert parse_depths("0, 0.25,1") == (0.0, 0.25, 1.0)
    with pytest.raises(RequestError, match="bad depths"):
        parse_depths("0,deep")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 0}, "bad samples 0"),
        ({"context": 64}, "bad context 64"),
        ({"context": 512, "scored_tokens": 256}, "more than half"),
        ({"scored_tokens": 1}, "bad scored tokens 1"),
        ({"text_windows": 0}, "bad text windows 0"),
        ({"generation_tokens": -1}, "bad generation tokens -1"),
        ({"depths": (0.5, 1.5)}, "bad depth 1.5"),
        ({"depths": (float("nan"),)}, "bad depth nan"),
        ({"tasks": ("kv", "kvv")}, "unknown task 'kvv'"),
        ({"compress": "question"}, "bad compress 'question'"),
    ],
)
def test_senseless_settings(changes: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        EvalSettings(**changes)  # type: ignore[arg-type]
    assert refused.value.hint


def test_as_json_names_no_folder() -> None:
    data = EvalSettings(text=Path("/somewhere/private/notes.txt")).as_json()
    assert json.loads(json.dumps(data)) == data
    assert data["text"] == "notes.txt"


def test_what_is_compressed_is_told_only_where_it_is_the_context() -> None:
    """Results from before it was a setting have the same settings as those of today that compress whole prompts."""
    assert "compress" not in EvalSettings().as_json()
    assert EvalSettings(compress="context").as_json()["compress"] == "context"


def test_longest() -> None:
    assert EvalSettings(context=2048).longest == 2048
    assert EvalSettings(context=600).longest == 150 + 512
    assert EvalSettings(context=600, generation_tokens=0).longest == 600
