"""The recall tasks: reproducible, of the asked length, answerable, and with held-out keys held out."""

from __future__ import annotations

import random
import re

import pytest

from kvfold.quality.tasks import (
    ADJECTIVES,
    NOUNS,
    TASKS,
    demo_document,
    draw_keys,
    kv_document,
    make_sample,
    multi_question,
    needle_document,
    real_text,
    trace_document,
)


def count(text: str) -> int:
    """A stand-in for a tokenizer: words, single digits, and every other visible character."""
    return len(re.findall(r"[A-Za-z]+|\S|\n", text))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 2048])
def test_sample_has_the_asked_length(task: str, length: int) -> None:
    sample = make_sample(task, 3, length, count)
    assert length * 0.75 < count(sample.prompt) <= length


@pytest.mark.parametrize("task", TASKS)
def test_sample_depends_on_the_seed_alone(task: str) -> None:
    assert make_sample(task, 5, 512, count) == make_sample(task, 5, 512, count)
    assert make_sample(task, 5, 512, count).context != make_sample(task, 6, 512, count).context


def test_splits_share_no_key() -> None:
    rng = random.Random(0)
    train, heldout = set(draw_keys(rng, 5000, "train")), set(draw_keys(rng, 1000, "heldout"))
    assert not train & heldout
    assert {a for a, _ in train} == set(ADJECTIVES)
    assert {n for _, n in heldout} == set(NOUNS)


def test_single_answer_stands_on_the_line_of_its_key() -> None:
    document = kv_document(1, 1024, count)
    assert len(document.facts) > 40
    for question, answer in document.facts:
        key = question.removeprefix("What is the value of ").removesuffix("?")
        assert re.fullmatch(rf"{key}: \d{{4}}", answer)
        assert document.text.split("\n").count(f"- {answer}") == 1


def test_multi_asks_four_keys_and_lists_their_values() -> None:
    sample = make_sample("multi", 9, 1024, count)
    keys = sample.question.removeprefix("What are the values of ").removesuffix("?").split(", ")
    assert len(keys) == len(sample.answers) == 4
    assert sample.answer == ", ".join(sample.answers)
    assert [answer.split(": ")[0] for answer in sample.answers] == keys
    assert all(f"- {answer}" in sample.context.split("\n") for answer in sample.answers)


def test_multi_question_keeps_the_order_asked() -> None:
    document = kv_document(1, 256, count)
    question, answer = multi_question(document, [3, 0])
    first, second = document.facts[3][1], document.facts[0][1]
    assert answer == f"{first}, {second}"
    assert question == f"What are the values of {first.split(':')[0]}, {second.split(':')[0]}?"


def test_trace_answers_follow_the_assignments() -> None:
    document = trace_document(4, 512, count)
    value: dict[str, str] = {}
    for line in document.text.split("\n"):
        name, source = line.removeprefix("- ").split(" = ")
        value[name] = value.get(source, source)
    assert document.facts
    for question, answer in document.facts:
        name = question.removeprefix("What does ").removesuffix(" come to?")
        assert answer == f"{name} = {value[name]}"


def test_needles_stand_in_the_text_once() -> None:
    document = needle_document(2, 1800, count, facts=8)
    assert len(document.facts) == 8
    for question, answer in document.facts:
        subject = question.removeprefix("What is ").removeprefix("Who is ").removesuffix("?")
        assert re.fullmatch(rf"T{subject[1:]} is (\d{{4}}|[A-Z][a-z]+)\.", answer)
        assert document.text.split("\n").count(answer) == 1


def test_demo_document_is_real_text_with_facts() -> None:
    document = demo_document(0, 1800, count)
    lines = [line for line in document.text.split("\n") if line.strip()]
    planted = [line for line in lines if re.fullmatch(r"The [\w ]+ of the \w+ \w+ is \w+\.", line)]
    text = real_text()
    assert len(document.facts) == 8 <= len(planted)
    assert sum(line in text for line in lines) >= len(lines) - 8


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task"):
        make_sample("riddle", 0, 100, count)
