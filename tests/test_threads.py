"""How many threads the native kernels use; the pool under forks, second callers and any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvfold.errors import KVFoldError
from kvfold.kernels import cpu
from kvfold.kernels.catalog import full_registry
from kvfold.kernels.cpu import threads
from kvfold.kernels.cpu.threads import cgroup_cpus, explain_threads, thread_count, usable_cpus
from tests.test_native import Paged, native

CACHED = (threads._asked, threads.usable_cpus)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The environment is read once a process: each test is a process to it."""
    before = torch.get_num_threads()
    for cached in CACHED:
        cached.cache_clear()
    yield
    torch.set_num_threads(before)
    for cached in CACHED:
        cached.cache_clear()


def test_the_variable_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_THREADS", "7")
    torch.set_num_threads(1)
    assert thread_count() == 7
    assert explain_threads() == "KVFOLD_THREADS"


def test_otherwise_torch_and_the_processors_bound_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFOLD_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 3)
    torch.set_num_threads(2)
    assert thread_count() == 2
    assert "torch" in explain_threads()
    torch.set_num_threads(5)
    assert thread_count() == 3
    assert "processors" in explain_threads()


@pytest.mark.parametrize("text", ["0", "-2", "many", "1.5"])
def test_nonsense_is_refused_before_the_first_token(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KVFOLD_THREADS", text)
    for asks in (thread_count, full_registry):
        with pytest.raises(KVFoldError, match="KVFOLD_THREADS") as caught:
            asks()
        assert caught.value.why
        assert caught.value.hint


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_counts() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from kvfold.kernels.cpu.threads import thread_count, usable_cpus\n"
        "import torch; torch.set_num_threads(4); print(usable_cpus(), thread_count())"
    )
    env = {name: value for name, value in os.environ.items() if name != "KVFOLD_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize(
    ("membership", "files", "granted"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 2.0),
        ("0::/not/visible/here\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("0::/../../outside\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:cpu:/old\n", {}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {"cpu.max": "0 0"}, None),
        ("", {}, None),
    ],
)
def test_a_quota_is_read_from_the_control_groups(
    tmp_path: Path, membership: str, files: dict[str, str], granted: float | None
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert cgroup_cpus(tmp_path / "fs", tmp_path / "cgroup") == granted


def test_there_is_always_a_processor() -> None:
    assert usable_cpus() >= 1


# == the pool


@native
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_any_number_of_threads_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("KVFOLD_THREADS", str(count))
    for lengths in ((9001,), (700, 3, 1500)):
        paged = Paged(("int4", "bf16"), (64, 64), heads=1, lengths=lengths, size=32)
        for _ in range(3):
            paged.check()


@native
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_makes_its_own_threads() -> None:
    """Also a child of a child, and the parent goes on."""
    paged = Paged(("int8", "int8"), (64, 64), lengths=(4000, 900), size=32)
    call = paged.call()
    want = cpu.attend(call)

    def same() -> bool:
        return all(torch.equal(one, other) for one, other in zip(cpu.attend(call), want, strict=True))

    def in_child(work: object) -> bool:
        child = os.fork()
        if child == 0:
            assert callable(work)
            os._exit(0 if work() else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    assert in_child(same)
    assert in_child(lambda: same() and in_child(same) and same())
    assert same()


@native
def test_waking_is_timed_and_bounded() -> None:
    assert (cpu.wake_seconds(1, 0.0) or 0) > 0  # how long it takes is the machine's affair
    assert (cpu.wake_seconds(2, 0.001) or 0) > 0
    for bad in ((0, 0.0), (-1, 0.0), (2, -1.0), (2, float("nan")), (2, 1e9)):
        with pytest.raises(ValueError, match=r"threads|pause"):
            cpu.wake_seconds(*bad)


@native
def test_many_callers_with_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one has the pool the others do their work alone."""
    monkeypatch.setenv("KVFOLD_THREADS", "4")
    paged = [Paged(("int4", "int4"), (64, 64), lengths=(2500, 100), size=32) for _ in range(4)]
    want = [cpu.attend(one.call()) for one in paged]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            found = cpu.attend(paged[i].call())
            if not all(torch.equal(one, other) for one, other in zip(found, want[i], strict=True)):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(len(paged))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
