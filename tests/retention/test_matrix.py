"""Every method, width and kind of model: the laws hold or it is refused, as ``docs/composition.md`` says."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs.make_composition import read_page

from tests.retention.matrix import FAMILIES, WORDS, judge, methods


@pytest.fixture(scope="module")
def told() -> dict[tuple[str, str], str]:
    """What the page says of each method and family."""
    return read_page()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("axis", "word"), methods())
def test_it_holds_the_laws_or_is_refused(axis: str, word: str, family: str, told, tmp_path: Path) -> None:
    verdicts = {width: judge(axis, word, family, width, tmp_path) for width in WORDS}
    assert {width: verdict.broken for width, verdict in verdicts.items() if verdict.broken} == {}
    assert len({bool(verdict.refused) for verdict in verdicts.values()}) == 1
    assert (told[word, family] == "refused") == bool(verdicts["raw"].refused)
