"""`kvfold doctor`: what it says, what it measures, and that a wrong kernel is found out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvfold
from kvfold import doctor
from kvfold.cli import main
from kvfold.kernels import cpu
from kvfold.kernels.merge import Piece
from kvfold.kernels.pages import PagesCall
from tests.test_native import native


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_stream_gb_s", lambda: 12.5)
    monkeypatch.delenv("KVFOLD_THREADS", raising=False)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kvfold", "doctor", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


@native
def test_it_says_what_runs_here_and_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    out = capsys.readouterr().out
    for word in (f"native {cpu.variants()[0]}", "threads", torch.__version__, "12.5 GB/s", "GPU", "agrees"):
        assert word in out
    for build in cpu.builds():
        assert build in out
    assert max(map(len, out.splitlines())) <= 80


@native
def test_json_holds_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert found["missing"] is None
    assert found["kernel"] == f"native {cpu.variants()[0]}"
    assert set(found["passed_over"]) == set(cpu.builds()) - {cpu.variants()[0]}
    assert found["features"] == cpu.features()
    assert found["threads"] >= 1
    assert found["wake_seconds"] > 0
    assert (found["cuda"] is None) != (found["no_cuda"] is None)
    tested = {(test["kernel"], test["storage"]) for test in found["tests"]}
    kernels = [*(f"native {name}" for name in cpu.variants()), "torch"]
    assert tested == {(kernel, storage) for kernel in kernels for storage in doctor.STORAGES}
    assert all(0 < test["error"] <= test["tolerance"] for test in found["tests"])


@native
def test_builds_say_what_they_lack() -> None:
    builds = cpu.builds()
    assert tuple(name for name, lacks in builds.items() if not lacks) == cpu.variants()
    known = cpu.features()
    for lacks in builds.values():
        assert all(known[feature] is False for feature in lacks.split(", ") if feature)


@native
def test_a_better_build_that_cannot_run_is_named_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "builds", lambda: {"future": "warp-drive, tea", **dict.fromkeys(cpu.variants(), "")})
    monkeypatch.setattr(cpu, "features", lambda: {"avx2": True, "warp-drive": False})
    assert run(monkeypatch) == 0
    assert "not future: this processor lacks warp-drive, tea" in capsys.readouterr().out


@native
@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_kernel_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    good = cpu.attend

    def attend(call: PagesCall, variant: int = 0) -> Piece:
        o, lse = good(call, variant)
        return (o * wrong, lse) if variant == 0 and call.fmt.k.quantized else (o, lse)

    monkeypatch.setattr(cpu, "attend", attend)
    assert run(monkeypatch) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 3
    assert f"FAILED: native {cpu.variants()[0]} on 4 bits" in out
    assert "agrees" not in out


@native
def test_a_wrong_log_sum_exp_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    good = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda call, variant=0: (good(call, variant)[0], good(call, variant)[1] + 0.01))
    assert not any(test.passed for test in doctor.self_test() if test.kernel.startswith("native"))


def test_a_bad_variable_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KVFOLD_THREADS", "two")
    assert run(monkeypatch) == 2
    said = capsys.readouterr().err
    assert "KVFOLD_THREADS='two'" in said
    assert "hint" in said


# == without the extension


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that imports a copy of the package from which the extension is missing."""
    copy = tmp_path_factory.mktemp("bare")
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "bundled")
    shutil.copytree(Path(kvfold.__file__).parent, copy / "kvfold", ignore=ignored)
    # -S keeps the import hook of an editable installation away; everything else is found where it is here.
    root = Path(__file__).resolve().parents[1]
    path = [str(copy), str(root), *(place for place in sys.path if "site-packages" in place)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "TERM": "dumb"}


def bare_python(bare: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=bare, capture_output=True, text=True, timeout=300, check=False)


def test_without_the_extension_it_says_how_to_get_it(bare: dict[str, str]) -> None:
    done = bare_python(bare, "import sys; sys.argv = ['kvfold', 'doctor']; from kvfold.cli import main; main()")
    assert done.returncode == 0, done.stderr
    assert "No native kernel" in done.stdout
    assert "C++20 compiler" in done.stdout
    assert "agrees" in done.stdout
    assert done.stderr.count("native kernel") == 1


def test_without_the_extension_the_cache_works_and_the_log_says_so_once(bare: dict[str, str]) -> None:
    code = (
        "import torch, kvfold.kernels.cpu\n"
        "from kvfold import KVCache\n"
        "from tests.engine.tiny_engine import tiny_model\n"
        "model = tiny_model()\n"
        "prompt = torch.arange(70)[None] % 50\n"
        "for recipe in ('raw', 'int4'):\n"
        "    cache = KVCache(model, recipe)\n"
        "    out = model.generate(prompt, past_key_values=cache, max_new_tokens=40, do_sample=False)\n"
        "    print(out.shape[1])\n"
    )
    done = bare_python(bare, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["110", "110"]
    assert done.stderr.count("the native kernel is not available") == 1
    assert "C++20 compiler" in done.stderr


def test_what_is_not_finite_is_no_success() -> None:
    test = doctor.SelfTest(kernel="torch", storage="4 bits", error=float("nan"), tolerance=1.0)
    assert not test.passed
    assert not replace(test, error=2.0).passed
    assert replace(test, error=0.5).passed
