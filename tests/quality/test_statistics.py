"""Means, quantiles, intervals and bins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.quality.statistics import binned, mean, median, quantile, task_score

SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=50)


@given(SHARES, st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-12)


@given(SHARES)
def test_an_interval_holds_its_score_and_stays_in_range(scores: list[float]) -> None:
    found = task_score(scores)
    assert 0 <= found.low <= found.score <= found.high <= 1
    assert found.score == mean(scores)
    assert found.n == len(scores)


def test_wilson_as_in_the_books() -> None:
    found = task_score([1.0] * 8 + [0.0] * 2)  # 8 of 10: Wilson's interval is 0.490 to 0.943
    assert found.low == pytest.approx(0.490, abs=5e-4)
    assert found.high == pytest.approx(0.943, abs=5e-4)
    assert task_score([1.0] * 10).low == pytest.approx(0.722, abs=5e-4)  # certain only of so much


def test_median() -> None:
    assert median([3, 1, 2]) == 2
    assert median([1, 2]) == 1.5


def test_bins_cover_all_positions_once() -> None:
    rows = [[float(i) for i in range(20)], [float(i) for i in range(20)]]
    found = binned(rows, 100, 4)
    assert found == [(100, 2.0), (105, 7.0), (110, 12.0), (115, 17.0)]
    assert len(binned(rows, 0, 50)) == 20
