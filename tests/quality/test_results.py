"""Results as files: there and back, refused when they are something else, merged when they are comparable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvfold.errors import RequestError
from kvfold.quality.results import ErrorMap, Evaluation, Generation, Row, TaskScore


def row(name: str = "int4", **changes: object) -> Row:
    made = Row(
        contestant=name,
        family="kvfold",
        recipe=name,
        bits_per_value=4.5,
        kv_bytes_per_token=700.0,
        compression=2.9,
        kl_mean=0.01,
        kl_p99=0.1,
        top1_agreement=0.95,
        ppl=13.0,
        ppl_delta=0.1,
        positions=512,
        decode_tok_s=100.0,
        tasks={"kv": TaskScore(0.9, 0.7, 0.97, 20)},
        generation=Generation(
            tokens=512, passages=2, kl_mean=0.01, kl_p99=0.1, top1_agreement=0.9, first_divergence=40.0
        ),
        kl_by_position=[(0, 0.1), (8, 0.2)],
        errors=ErrorMap([[0.1, 0.2]], [[0.3, 0.4]]),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def evaluation(*rows: Row, **changes: object) -> Evaluation:
    made = Evaluation(
        command="kvfold eval",
        seed=0,
        model="bundled",
        settings={"context": 1024, "tasks": ["kv"]},
        versions={"python": "3"},
        hardware={"cores": 2},
        rows=list(rows),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_there_and_back(tmp_path: Path) -> None:
    made = evaluation(row(), row("truncation", recipe=None, bits_per_value=None, generation=None, errors=None))
    file = tmp_path / "e.json"
    file.write_text(json.dumps(made.as_json()))
    assert Evaluation.read(file) == made


def test_a_row_has_the_promised_names() -> None:
    data = row().as_json()
    promised = "recipe bits_per_value kv_bytes_per_token compression kl_mean kl_p99 top1_agreement ppl_delta tasks"
    assert set(promised.split()) <= set(data)
    assert data["tasks"]["kv"] == {"score": 0.9, "low": 0.7, "high": 0.97, "n": 20, "scores": ()}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kvfold_eval": 2}', '{"kvfold_eval": 1}', '"x"', "\x00"])
def test_what_is_no_evaluation_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "e.json"
    file.write_text(content)
    with pytest.raises(RequestError, match=r"e\.json.*\n?hint"):
        Evaluation.read(file)
    with pytest.raises(RequestError, match="No such file"):
        Evaluation.read(tmp_path / "none.json")


def test_merge_keeps_our_rows_and_adds_theirs() -> None:
    ours = evaluation(row("raw"), row("int4"))
    theirs = evaluation(row("raw", kl_mean=9.0), row("hqq"), command="rivals", versions={"python": "4"})
    merged = ours.merge([theirs])
    assert [(each.contestant, each.kl_mean) for each in merged.rows] == [("raw", 0.01), ("int4", 0.01), ("hqq", 0.01)]
    assert merged.versions == ours.versions


def test_merge_names_what_differs() -> None:
    ours = evaluation(row())
    theirs = evaluation(row("hqq"), seed=1, settings={"context": 2048, "tasks": ["kv"]}, command="rivals --x")
    with pytest.raises(RequestError, match="rivals --x") as refused:
        ours.merge([theirs])
    assert "seed is 0 here and 1 there" in str(refused.value)
    assert "context is 1024 here and 2048 there" in str(refused.value)
    assert "tasks" not in refused.value.why
