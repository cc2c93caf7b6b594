"""The workload: passages, questions and prompts of the right length, and the same ones every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvfold.errors import RequestError
from kvfold.quality.settings import EvalSettings
from kvfold.quality.workload import build_workload
from tests.engine.tiny_engine import byte_tokenizer

SETTINGS = EvalSettings(
    tasks=("kv", "niah_single"),
    context=768,
    samples=3,
    text_windows=3,
    scored_tokens=64,
    generation_tokens=32,
    generation_passages=2,
    decode_steps=4,
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {i} of a text, äöü\n" for i in range(200)), encoding="utf-8")
    return file


def test_lengths(text: Path) -> None:
    tokenizer = byte_tokenizer()
    work = build_workload(tokenizer, replace(SETTINGS, text=text), stop=frozenset({2}))
    assert [len(passage) for passage in work.passages] == [764] * 3
    assert work.score_from == 700
    assert [len(prompt) for prompt in work.prompts] == [192] * 2
    assert all(passage[0] == tokenizer.bos_token_id for passage in (*work.passages, *work.prompts))
    assert all(work.decode(passage[1:]).startswith("line ") for passage in work.passages)
    assert len({*work.passages}) == 3
    assert [question.sample.task for question in work.questions] == ["kv"] * 3 + ["niah_single"] * 3
    for question in work.questions:
        assert 600 < len(question.prompt) + question.max_tokens <= 768
        assert work.decode(question.prompt).startswith("user:")
        assert question.max_tokens > 2 * len(question.sample.answer)


def test_the_same_for_a_seed_and_other_for_another(text: Path) -> None:
    settings = replace(SETTINGS, text=text)
    digest = build_workload(byte_tokenizer(), settings).digest
    assert build_workload(byte_tokenizer(), settings).digest == digest
    text.write_text(text.read_text(encoding="utf-8").replace("a text", "a test"), encoding="utf-8")
    others = [replace(settings, seed=1), replace(settings, samples=4), replace(settings, depths=(0.0, 1.0)), settings]
    assert digest not in {build_workload(byte_tokenizer(), other).digest for other in others}


def test_depths_are_taken_in_turns(text: Path) -> None:
    settings = replace(SETTINGS, text=text, tasks=("kv",), depths=(0.0, 1.0))
    questions = build_workload(byte_tokenizer(), settings).questions
    places = [q.sample.context.index(q.sample.answer) / len(q.sample.context) for q in questions]
    assert [round(place) for place in places] == [0, 1, 0]


def test_a_base_model_is_given_plain_text(text: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    work = build_workload(tokenizer, replace(SETTINGS, text=text))
    sample = work.questions[0].sample
    assert work.decode(work.questions[0].prompt) == f"{sample.context}\n\n{sample.question}\nAnswer:"


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    for content in ("", "too short\n" * 20):
        file.write_text(content)
        with pytest.raises(RequestError, match=r"a text of \d+ tokens: passages of 763") as refused:
            build_workload(byte_tokenizer(), replace(SETTINGS, text=file))
        assert "--text" in refused.value.hint


def test_a_text_that_just_suffices(tmp_path: Path) -> None:
    file = tmp_path / "just.txt"
    file.write_text("x" * 763)
    work = build_workload(byte_tokenizer(), replace(SETTINGS, text=file))
    assert len({*work.passages}) == 1
    assert len(work.passages[0]) == 764


@pytest.mark.parametrize(("content", "says"), [(b"Gr\xfc\xdfe", "not UTF-8"), (None, "No such file")])
def test_a_text_that_cannot_be_read(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=says):
        build_workload(byte_tokenizer(), replace(SETTINGS, text=file))


def test_a_task_that_does_not_fit_is_refused(text: Path) -> None:
    settings = replace(SETTINGS, text=text, tasks=("niah_multiquery",), context=256)
    with pytest.raises(RequestError, match="niah_multiquery in a context of 256") as refused:
        build_workload(byte_tokenizer(), settings)
    assert "--context" in refused.value.hint
