"""What a snippet or an example has to show: right answers, and bytes."""

from __future__ import annotations

import re

__all__ = ["assert_right_answers_and_bytes"]


def assert_right_answers_and_bytes(code: str, shown: str) -> None:
    """``shown``, the output of ``code``: every access code in its text is answered right; sizes are given, and that of
    ``int4`` is below half of that of ``raw`` where both are.
    """
    values = re.findall(r"\b\d{4}\b", code)
    assert values
    for value in values:
        assert re.search(rf"The access code of the \w+ \w+ is {value}\.", shown), shown
    sizes = {
        recipe: int(size.replace(",", "")) for recipe, size in re.findall(r"^([^:\n]+): ([\d,]+) bytes", shown, re.M)
    }
    assert sizes, shown
    if {"raw", "int4"} <= set(sizes):
        assert 2 * sizes["int4"] < sizes["raw"]
