"""Settings refuse what makes no sense, counters give rates, the stopwatch tells its clock's time."""

from __future__ import annotations

import pytest

from kvfold.errors import KVFoldError
from kvfold.telemetry import Settings, StepStats, Stopwatch


def test_unset_and_empty_keep_the_defaults() -> None:
    assert Settings.from_env({}) == Settings(threads=None, log="warning")
    assert Settings.from_env({"KVFOLD_THREADS": " ", "KVFOLD_LOG": ""}) == Settings()


def test_values_are_read() -> None:
    found = Settings.from_env({"KVFOLD_THREADS": " 2 ", "KVFOLD_LOG": "Debug", "KVFOLD_OTHER": "x"})
    assert found == Settings(threads=2, log="debug")


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_THREADS", "3")
    monkeypatch.delenv("KVFOLD_LOG", raising=False)
    assert Settings.from_env() == Settings(threads=3)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "²", "+2", "1_0"])
def test_a_bad_thread_count_is_refused(text: str) -> None:
    with pytest.raises(KVFoldError, match="KVFOLD_THREADS") as caught:
        Settings.from_env({"KVFOLD_THREADS": text})
    assert caught.value.hint


def test_a_bad_level_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KVFoldError, match="debug, info, warning, error"):
        Settings.from_env({"KVFOLD_LOG": "loud"})


def test_rates() -> None:
    stats = StepStats(steps=2, prefill_tokens=7, decode_tokens=3, seconds=2.0)
    assert stats.tokens == 10
    assert stats.tokens_per_s == 5.0
    assert StepStats().tokens_per_s == 0.0


def test_the_stopwatch_tells_the_time_since_its_making() -> None:
    ticks = iter([10.0, 11.0, 14.0])
    watch = Stopwatch(clock=lambda: next(ticks))
    assert watch.seconds == 1.0
    assert watch.seconds == 4.0
