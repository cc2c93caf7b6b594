"""The journal: nothing finished is lost, nothing of other settings is taken, nothing half-written is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvfold.errors import RequestError
from kvfold.quality.journal import Journal, journal_of

SETTINGS = {"seed": 0, "settings": {"context": 1024, "tasks": ["kv"]}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return journal_of(tmp_path / "e.json")


def begun(file: Path) -> None:
    with Journal(file, SETTINGS) as journal:
        journal.add("a", [1.5, 2])
        journal.add("b", {"kl": 1e-300})


def test_a_journal_goes_on(file: Path) -> None:
    begun(file)
    with Journal(file, SETTINGS) as journal:
        assert len(journal) == 2
        assert journal["a"] == [1.5, 2]
        assert journal["b"] == {"kl": 1e-300}
        assert "c" not in journal
        assert journal.get("c") is None
        journal.add("c", None)
    with Journal(file, SETTINGS) as journal:
        assert "c" in journal
        journal.remove()
    assert not file.exists()


@pytest.mark.parametrize("lost", range(1, 30, 4))
def test_half_a_line_is_forgotten(file: Path, lost: int) -> None:
    begun(file)
    data = file.read_bytes()
    file.write_bytes(data[:-lost])
    with Journal(file, SETTINGS) as journal:
        assert "a" in journal
        assert "b" not in journal
        journal.add("b", {"kl": 1e-300})
    assert file.read_bytes() == data


@pytest.mark.parametrize("size", [0, 5])
def test_a_journal_cut_in_its_first_line_begins_anew(file: Path, size: int) -> None:
    begun(file)
    file.write_bytes(file.read_bytes()[:size])
    with Journal(file, SETTINGS) as journal:
        assert len(journal) == 0
        journal.add("a", 1)
    assert len(file.read_text().splitlines()) == 2


def test_other_settings_are_refused_by_name_and_the_file_stays(file: Path) -> None:
    begun(file)
    before = file.read_bytes()
    other = {"seed": 1, "settings": {"context": 2048, "tasks": ["kv"]}}
    with pytest.raises(RequestError, match="other settings") as refused:
        Journal(file, other)
    assert "seed was 0 and is 1" in str(refused.value)
    assert "settings.context was 1024 and is 2048" in str(refused.value)
    assert "tasks" not in refused.value.why
    assert "--no-resume" in refused.value.hint
    assert file.read_bytes() == before
    with Journal(file, other, resume=False) as journal:
        assert len(journal) == 0


@pytest.mark.parametrize("content", ["[1]\n", "{}\n", "text\n", json.dumps({"kvfold_eval_journal": {}}) + "\n{}\n"])
def test_another_file_is_not_overwritten(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(RequestError, match="not the journal"):
        Journal(file, SETTINGS)
    assert file.read_text() == content


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot write"):
        Journal(tmp_path / "none" / "journal", SETTINGS)


def test_without_a_file_it_remembers() -> None:
    with Journal(None, SETTINGS) as journal:
        journal.add("a", 1)
        assert journal["a"] == 1
        journal.remove()
