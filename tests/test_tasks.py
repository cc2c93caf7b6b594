"""The tasks: reproducible, of the asked length, answerable from the text alone, and with held-out keys held out."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from kvfold.quality.tasks import (
    TASKS,
    Document,
    Fact,
    Sample,
    demo_document,
    heldout_text,
    make_sample,
    real_text,
    score,
)
from kvfold.quality.tasks.counting import common_words_document, frequent_words_document
from kvfold.quality.tasks.documents import (
    chain_document,
    copy_document,
    fit,
    kv_document,
    multivalue_document,
    needle_document,
    plant,
)
from kvfold.quality.tasks.samples import join_facts
from kvfold.quality.tasks.text import is_heldout_file, library_files, passages_of
from kvfold.quality.tasks.words import ADJECTIVES, NOUNS, Split, draw_keys, is_heldout

STATEMENT = re.compile(r"T(he [\w ]+ of the \w+ \w+) is (\d{4}|[A-Z][a-z]+)\.")


def count(text: str) -> int:
    """A stand-in for a tokenizer: words, single digits, and every other visible character."""
    return len(re.findall(r"[A-Za-z]+|\S|\n", text))


# == samples


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 512, 2048])
def test_a_sample_has_the_asked_length(task: str, length: int) -> None:
    for seed in range(5):
        sample = make_sample(task, seed, length, count)
        assert sample.task == task
        assert length * (0.5 if length < 1024 else 0.75) < count(sample.prompt) <= length


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_the_seed_alone(task: str) -> None:
    assert make_sample(task, 5, 512, count) == make_sample(task, 5, 512, count)
    assert make_sample(task, 5, 512, count).context != make_sample(task, 6, 512, count).context


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_answered_by_its_own_answer_and_by_nothing_else(task: str) -> None:
    sample = make_sample(task, 1, 768, count)
    assert sample.prompt == f"{sample.context}\n\n{sample.question}"
    assert sample.question.endswith(("?", "."))
    assert score(sample, sample.answer) == 1
    assert score(sample, "") == 0
    assert all(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", sample.context) for value in sample.references)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("target", [0, 16])
def test_a_length_without_room_still_gives_a_question(task: str, target: int) -> None:
    sample = make_sample(task, 2, target, count)
    assert score(sample, sample.answer) == 1


def test_tasks_have_the_names_that_are_documented() -> None:
    niah = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")
    assert (*niah, "vt", "cwe", "fwe", "kv", "copy") == TASKS


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'riddle'; known: niah_single"):
        make_sample("riddle", 0, 100, count)


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey", "vt", "kv", "copy"])
def test_depth_says_where_the_fact_stands(task: str) -> None:
    places = []
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample(task, 3, 2048, count, depth=depth)
        value = sample.references[-1]
        name = sample.answer.split(" = ", maxsplit=1)[0] if task == "vt" else value
        places.append(sample.context.rindex(name) / len(sample.context))
    assert places == sorted(places)
    assert len(set(places)) == 3
    if task == "niah_single":
        assert places[0] < 0.03
        assert 0.4 < places[1] < 0.6
        assert places[2] > 0.97


def test_multiquery_asks_for_four_of_eight_facts_at_once() -> None:
    sample = make_sample("niah_multiquery", 9, 1024, count)
    assert sample.question.count("?") == len(sample.references) == 4
    planted = STATEMENT.findall(sample.context)
    assert len(planted) == 8
    asked = [
        part.removeprefix("What is ").removeprefix("Who is ") for part in sample.question.removesuffix("?").split("? ")
    ]
    values = {f"t{subject}": value for subject, value in planted}
    assert [values[subject] for subject in asked] == list(sample.references)


def test_facts_are_joined_in_the_order_asked() -> None:
    one, two = Fact("A?", "A is 1.", ("1",)), Fact("B?", "B is 2 and 3.", ("2", "3"))
    assert join_facts([two, one]) == Fact("B? A?", "B is 2 and 3. A is 1.", ("2", "3", "1"))


# == scores


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("4821 and Alice", 1.0),
        ("ALICE.", 0.5),
        ("(4821)", 0.5),
        ("14821, 48210, Alices", 0.0),
        ("4 8 2 1", 0.0),
        ("", 0.0),
    ],
)
def test_a_score_is_the_share_of_whole_words_found(said: str, wanted: float) -> None:
    assert score(Sample("kv", "", "", "", ("4821", "Alice")), said) == wanted


def test_a_score_reads_values_literally() -> None:
    assert score(Sample("copy", "", "", "", ("a.b",)), "axb") == 0
    assert score(Sample("copy", "", "", "", ("a.b",)), "so: a.b!") == 1


# == the documents


def test_kv_lines_are_the_answers() -> None:
    document = kv_document(1, 1024, count)
    assert len(document.facts) > 40
    lines = document.text.split("\n")
    for line, fact in zip(lines, document.facts, strict=True):
        key, value = re.fullmatch(r"- ([a-z]+-[a-z]+): (\d{4})", line).groups()  # type: ignore[union-attr]
        assert fact == Fact(f"What is the value of {key}?", f"{key}: {value}", (value,))
    assert len({fact.question for fact in document.facts}) == len(lines)


@pytest.mark.parametrize("hops", [(1,), (2,), (3,), (1, 4)])
@pytest.mark.parametrize("target", [10, 512])
def test_chains_lead_to_their_values_in_as_many_hops_as_asked(hops: tuple[int, ...], target: int) -> None:
    document = chain_document(4, target, count, hops=hops)
    source = dict(line.removeprefix("- ").split(" = ") for line in document.text.split("\n"))
    found = set()
    for fact in document.facts:
        name = fact.question.removeprefix("What does ").removesuffix(" come to?")
        chain = [name]
        while chain[-1] in source:
            chain.append(source[chain[-1]])
        assert fact.answer == " = ".join(chain)
        assert fact.references == (chain[-1],)
        assert re.fullmatch(r"\d{4}", chain[-1])
        found.add(len(chain) - 2)
    assert found == set(hops)
    longest = max(hops)
    assert all(name in source for name in source.values() if not name.isdigit())
    assert len(source) >= longest + 1


def test_a_name_is_explained_before_it_is_used() -> None:
    known: set[str] = set()
    for line in chain_document(7, 600, count).text.split("\n"):
        name, source = line.removeprefix("- ").split(" = ")
        assert source.isdigit() or source in known
        assert name not in known
        known.add(name)


def test_copied_lines_stand_in_the_text() -> None:
    document = copy_document(1, 600, count)
    for fact in document.facts:
        assert f"- {fact.answer}" in document.text.split("\n")
        assert fact.answer.endswith(f": {fact.references[0]}")
        assert fact.question == f"Copy the line of {fact.answer.split(':')[0]}."


def test_needles_stand_in_the_text_once_and_in_order() -> None:
    document = needle_document(2, 1800, count, facts=8)
    assert len(document.facts) == 8
    places = []
    for fact in document.facts:
        subject = fact.question.removeprefix("What is ").removeprefix("Who is ").removesuffix("?")
        assert fact.answer == f"T{subject[1:]} is {fact.references[0]}."
        assert STATEMENT.fullmatch(fact.answer)
        assert document.text.split("\n").count(fact.answer) == 1
        places.append(document.text.index(fact.answer))
    assert places == sorted(places)


def test_facts_can_all_be_planted_in_one_place() -> None:
    lines = [f"line {i}" for i in range(10)]
    for depth, place in ((0.0, 0), (0.5, 5), (1.0, 10)):
        document = plant(random.Random(1), lines, 3, depth=depth)
        out = document.text.split("\n")
        assert out[place : place + 3] == [fact.answer for fact in document.facts]
        assert out[:place] + out[place + 3 :] == lines


def test_every_value_of_a_key_is_asked_for() -> None:
    document = multivalue_document(3, 1500, count, keys=2)
    assert len(document.facts) == 2
    for fact in document.facts:
        subject = fact.question.removeprefix("What are all ").removesuffix("?")
        pattern = rf"One of {subject} is (\d{{4}})\."
        lines = [line for line in document.text.split("\n") if re.fullmatch(pattern, line)]
        assert fact.answer == " ".join(lines)
        assert fact.references == tuple(re.findall(pattern, document.text))
        assert len(set(fact.references)) == 4


@pytest.mark.parametrize("target", [100, 400, 3000])
def test_common_words_are_the_most_common(target: int) -> None:
    for seed in range(20):
        document = common_words_document(seed, target, count)
        listed = [line.removeprefix("- ") for line in document.text.split("\n")]
        ranked = Counter(listed).most_common()
        (fact,) = document.facts
        assert {word for word, _ in ranked[:4]} == set(fact.references)
        assert len(ranked) == 4 or ranked[3][1] > ranked[4][1]
        assert list(fact.references) == sorted(fact.references, key=listed.index)
        assert fact.answer == ", ".join(fact.references)


@pytest.mark.parametrize("target", [20, 100, 400, 3000])
def test_frequent_words_are_the_most_frequent_and_no_two_are_tied(target: int) -> None:
    for seed in range(40):
        document = frequent_words_document(seed, target, count)
        ranked = Counter(document.text.split()).most_common()
        (fact,) = document.facts
        assert tuple(word for word, _ in ranked[:3]) == fact.references
        counts = [number for _, number in ranked[:4]]
        assert counts == sorted(set(counts), reverse=True)


def test_the_demo_is_real_text_with_facts() -> None:
    document = demo_document(0, 1800, count)
    lines = [line for line in document.text.split("\n") if line.strip()]
    planted = [line for line in lines if STATEMENT.fullmatch(line)]
    text = real_text()
    assert len(document.facts) == len(planted) == 8
    assert sum(line in text for line in lines) >= len(lines) - 8


def test_a_document_is_as_large_as_fits() -> None:
    build: Callable[[int], Document] = lambda n: Document("word " * n * n, ())  # noqa: E731 - grows faster than a line
    for target in (64, 1000, 5000):
        assert count(fit(build, target, count).text) <= target
    assert count(fit(build, 1, count, low=5).text) == 25


# == what is held out


def test_splits_share_no_key() -> None:
    rng = random.Random(0)
    train, heldout = set(draw_keys(rng, 5000, "train")), set(draw_keys(rng, 1000, "heldout"))
    assert not train & heldout
    assert all(map(is_heldout, heldout))
    assert not any(map(is_heldout, train))
    assert {a for a, _ in train} == set(ADJECTIVES)
    assert {n for _, n in heldout} == set(NOUNS)
    assert not set(ADJECTIVES) & set(NOUNS)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("build", [kv_document, chain_document, copy_document])
def test_documents_keep_to_their_split(build: Callable[..., Document], split: Split) -> None:
    text = build(5, 600, count, split).text
    keys = re.findall(r"^- ([a-z]+)[- ]([a-z]+)", text, flags=re.MULTILINE)
    assert len(keys) > 20
    assert {is_heldout(key) for key in keys} == {split == "heldout"}


def test_long_texts_have_keys_enough() -> None:
    keys = draw_keys(random.Random(0), 5000, "heldout")
    assert len(set(keys)) == 5000
    assert all(is_heldout((a, n.rstrip("0123456789"))) for a, n in keys)
    for task in ("kv", "copy", "vt"):
        sample = make_sample(task, 0, 40_000, count)
        assert 36_000 < count(sample.prompt) <= 40_000
        assert score(sample, sample.answer) == 1


def test_held_out_sources_are_a_small_part_of_the_library() -> None:
    names = [name for name, _ in library_files()]
    held = [name for name in names if is_heldout_file(name)]
    assert names == sorted(names)
    assert 0 < len(held) < len(names) / 10
    assert all(source in heldout_text() for name, source in library_files() if name == held[0])


def test_passages_are_the_text() -> None:
    text = "a" * 700 + "\n\n" + "b" * 10 + "\n \n" + "c" * 700 + "\n\nd"
    assert passages_of(text) == ["a" * 700, "b" * 10 + "\n\n" + "c" * 700, "d"]
