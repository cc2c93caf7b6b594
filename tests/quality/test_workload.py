"""The workload: passages, questions and prompts of the right length, and the same ones every time."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvfold.engine.loading import load
from kvfold.errors import RequestError
from kvfold.quality import workload
from kvfold.quality.settings import EvalSettings
from kvfold.quality.tasks import TASKS, Sample
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


@pytest.mark.parametrize(("content", "says"), [(b"Gr\xfc\xdfe", "not UTF-8"), (None, "no such file")])
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


# == contexts


@pytest.mark.parametrize("task", TASKS)
def test_a_context_ends_with_its_last_line_and_knows_no_question(task: str, text: Path) -> None:
    """Joined, the two parts are the prompt; the first holds all of the context and nothing of the question, and stays
    the same when something else is asked.
    """
    tokenizer = load("bundled")[1]
    settings = replace(SETTINGS, text=text, tasks=(task,), generation_tokens=0, context=1024)
    questions = build_workload(tokenizer, settings).questions
    render = workload._render
    for question in questions:
        first, rest = question.prompt[: question.context_tokens], question.prompt[question.context_tokens :]
        content = question.sample.context.rstrip()
        assert tokenizer.decode(first) == f"<|bos|><|user|>\n{content}"
        assert tokenizer.decode(rest).strip().startswith(question.sample.question)
        for other in ("?", "Who knows it?", "42", " ...", "\n- amber-falcon: 4821"):
            prompt, tokens = render(tokenizer, replace(question.sample, question=other))
            assert tuple(prompt[:tokens]) == first


def test_a_token_over_the_end_goes_with_the_question() -> None:
    """Where the last character is one token with the line break behind it, the context ends before it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0} | {letter: i for i, letter in enumerate([*letters, ".Ċ"], 1)}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[(".", "Ċ")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")
    prompt, tokens = workload._render(tokenizer, Sample("kv", "a: 1.", "What is a?", "a: 1", ("1",)))
    assert tokenizer.decode(prompt[:tokens]) == "a: 1"
    assert tokenizer.decode(prompt[tokens:]) == ".\n\nWhat is a?\nAnswer:"


def test_a_template_that_changes_words_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(RequestError, match="chat template"):
        workload._render(tokenizer, Sample("kv", "a: 1", "What is a?", "a: 1", ("1",)))


def test_the_digest_knows_contexts_only_where_they_are_compressed(text: Path) -> None:
    settings = replace(SETTINGS, text=text)
    work = build_workload(byte_tokenizer(), settings)
    same = build_workload(byte_tokenizer(), replace(settings, compress="context"))
    assert same.questions == work.questions
    assert same.digest != work.digest
    longer = tuple(replace(question, context_tokens=question.context_tokens + 1) for question in work.questions)
    assert replace(work, questions=longer).digest == work.digest
    assert replace(same, questions=longer).digest != same.digest


def test_digests_of_earlier_versions_stay() -> None:
    """What was measured before contexts were known still has the workload of today."""
    tokenizer = byte_tokenizer()
    passages = ((1, 2, 3), (4, 5, 6))
    sample = Sample("kv", "a: 1", "What is a?", "a: 1", ("1",))
    questions = (workload.Question(sample, (7, 8, 9), 40, 2),)
    work = workload.Workload(SETTINGS, passages, 2, ((1, 2),), questions, frozenset({2}), tokenizer.decode)
    data = (passages, 2, ((1, 2),), [((7, 8, 9), 40, ("1",))], [2])
    assert work.digest == hashlib.sha256(repr(data).encode()).hexdigest()
