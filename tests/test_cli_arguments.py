"""Every argument that the command line can judge by itself is judged before torch and transformers are loaded."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvfold.clause import Clause
from kvfold.cli.methods import method_fields
from kvfold.cli.progress import PlainLines
from kvfold.engine.source import Source, find_source
from kvfold.errors import ModelError
from kvfold.recipe import known_methods, method_class
from tests.command import Done, command

_DRIVER = """
import contextlib, io, json, sys
from kvfold.cli import main

done = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err = ["kvfold", *arguments], io.StringIO(), io.StringIO()
    code, sys.stdin = 0, io.StringIO("")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except ImportError as error:
            code, _ = 99, print(error, file=err)
    done.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""

GENERATE = ["generate", "x"]
TRAIN = ["train-retention", "-o", "{tmp}/scorer.safetensors"]
CALIBRATE = ["calibrate", "-o", "{tmp}/calibration.safetensors"]
PROFILE = ["profile", "-o", "{tmp}/profile.html"]
DECODE, ATTENTION = ["bench", "decode"], ["bench", "attention"]

BAD: list[tuple[list[str], list[str]]] = [
    ([*GENERATE, "--recipe", "int5"], ["int5", "int4", "hint"]),
    ([*GENERATE, "--recipe", "int4,recnt=3"], ["recnt", "recent"]),
    ([*GENERATE, "--recipe", "int4+snipkv(keep=0.5)"], ["snapkv"]),
    ([*GENERATE, "--recipe", "raw+snapkv(keep=0.5,windw=3)"], ["windw", "window"]),
    ([*GENERATE, "--recipe", "raw+quest(pags=64)"], ["pags", "pages"]),
    ([*GENERATE, "--recipe", "raw+adakv(snapkv(windw=3),keep=0.5)"], ["windw", "window"]),
    ([*GENERATE, "--recipe", "int2:calibrated(no-such.safetensors)"], ["no-such.safetensors", "hint"]),
    ([*GENERATE, "--recipe", "raw+learned(no-such.safetensors,keep=0.5)"], ["no-such.safetensors", "hint"]),
    ([*GENERATE, "--max-tokens", "-3"], ["max_tokens", "-3"]),
    ([*GENERATE, "--max-tokens", "many"], ["--max-tokens"]),
    ([*GENERATE, "--temperature", "-1"], ["temperature"]),
    ([*GENERATE, "--top-p", "1.5"], ["top_p"]),
    ([*GENERATE, "--top-k", "-2"], ["top_k"]),
    ([*GENERATE, "--kv-memory", "lots"], ["lots", "hint"]),
    ([*GENERATE, "--kv-memory", "2 apples"], ["apples", "hint"]),
    ([*GENERATE, "--kv-memory", "0"], ["kv-memory", "hint"]),
    ([*GENERATE, "--model", "/no/such/model"], ["/no/such/model", "hint"]),
    ([*GENERATE, "--model", "{bad}"], ["config.json"]),
    ([*GENERATE, "--model", "not a name"], ["not a name", "hint"]),
    ([*GENERATE, "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
    (["generate", "--file", "{bad}/no-such.txt"], ["no such file"]),
    (["generate", "--file", "{bad}"], ["it is a folder"]),
    (["generate", "--file", "{bad}/latin-1.txt"], ["latin-1.txt", "UTF-8", "hint"]),
    (["generate", "--file", "{bad}/empty.txt"], ["empty.txt", "empty"]),
    (["demo", "--recipes", "raw;int5"], ["int5", "int4"]),
    (["demo", "--tokens", "10"], ["300"]),
    (["demo", "--model", "./no-model"], ["no-model", "hint"]),
    (["eval", "--recipes", "raw;int5"], ["int5", "int4"]),
    (["eval", "--tasks", "kv,niah_singel"], ["did you mean 'niah_single'"]),
    (["eval", "--samples", "0"], ["samples", "hint"]),
    (["eval", "--windows", "0"], ["windows", "hint"]),
    (["eval", "--scored", "1"], ["scored", "hint"]),
    (["eval", "--generation-tokens", "-1"], ["generation tokens", "hint"]),
    (["eval", "--depths", "0,2"], ["depth", "hint"]),
    (["eval", "--depths", "deep"], ["deep", "hint"]),
    (["eval", "--compress", "all"], ["prompt", "context"]),
    (["eval", "--context", "100", "--quick"], ["context", "hint"]),
    (["eval", "--dtype", "int8"], ["int8", "bfloat16"]),
    (["eval", "--text", "no-such-file.txt"], ["no-such-file.txt", "no such file", "hint"]),
    (["eval", "--text", "{bad}"], ["it is a folder", "hint"]),
    (["eval", "--text", "{bad}/latin-1.txt"], ["UTF-8", "hint"]),
    (["eval", "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
    (["eval", "--report", "{bad}/latin-1.txt"], ["is a file", "hint"]),
    (["eval", "--merge", "{bad}/latin-1.txt"], ["not an evaluation", "hint"]),
    (["eval", "--merge", "{bad}/no-such.json"], ["no-such.json", "hint"]),
    (["eval", "--model", "/no/such/model"], ["/no/such/model", "hint"]),
    (["eval", "--limit", "3"], ["--lm-eval"]),
    (["eval", "--lm-eval", "gsm8k", "--dtype", "int8"], ["int8", "bfloat16"]),
    (["eval", "--lm-eval", "gsm8k", "--lm-eval-path", "{bad}/no-folder"], ["no-folder", "hint"]),
    (["eval", "--lm-eval", ",", "--limit", "1"], ["--lm-eval", "hint"]),
    (["eval", "--lm-eval", "gsm8k", "--model", "/no/such/model"], ["/no/such/model"]),
    ([*CALIBRATE, "--text", "no-such-file.txt"], ["no-such-file.txt", "hint"]),
    ([*CALIBRATE, "--tokens", "0"], ["--tokens"]),
    ([*CALIBRATE, "--model", "/no/such/model"], ["/no/such/model"]),
    (["calibrate", "-o", "{bad}/no/c.safetensors"], ["no folder", "hint"]),
    ([*TRAIN, "--text", "no-such-file.txt"], ["no-such-file.txt", "hint"]),
    ([*TRAIN, "--model", "/no/such/model"], ["/no/such/model"]),
    (["train-retention", "-o", "{bad}"], ["it is a folder", "hint"]),
    ([*PROFILE, "--recipe", "int5"], ["int5", "int4"]),
    ([*PROFILE, "--text", "no-such-file.txt"], ["no-such-file.txt", "hint"]),
    ([*PROFILE, "--context", "20"], ["20", "hint"]),
    ([*PROFILE, "--model", "/no/such/model"], ["/no/such/model"]),
    (["profile", "-o", "{bad}/no/p.html"], ["no folder", "hint"]),
    ([*PROFILE, "--gates", "{bad}/no/gates.json"], ["no folder", "hint"]),
    (["doctor", "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
    ([*DECODE, "--recipes", "raw;int5"], ["int5", "int4"]),
    ([*DECODE, "--shape", "llama-9"], ["llama-9", "tiny"]),
    ([*DECODE, "--vs", "vllm"], ["vllm", "transformers"]),
    ([*DECODE, "--shape", "tiny", "--model", "bundled"], ["--shape", "only one"]),
    ([*DECODE, "--dtype", "int8"], ["int8", "bfloat16"]),
    ([*DECODE, "--context", "0"], ["--context"]),
    ([*DECODE, "--model", "/no/such/model"], ["/no/such/model"]),
    ([*DECODE, "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
    ([*ATTENTION, "--recipes", "raw;int5"], ["int5", "int4"]),
    ([*ATTENTION, "--dtype", "int8"], ["int8", "bfloat16"]),
    ([*ATTENTION, "--rope", "64"], ["rope", "--kv-heads 1"]),
    ([*ATTENTION, "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
]
HELP = [
    ["--help"], ["demo", "--help"], ["generate", "--help"], ["eval", "--help"], ["calibrate", "--help"],
    ["profile", "--help"], ["train-retention", "--help"], ["doctor", "--help"], ["bench", "--help"],
    ["bench", "decode", "--help"], ["bench", "attention", "--help"],
]  # fmt: skip


def blocked(folder: Path) -> dict[str, str]:
    """An environment in which torch and transformers cannot be imported."""
    for name in ("torch", "transformers", "numpy"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} is loaded')\n")
    return {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "100"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """What came of every command line above, all run in one process without torch; by their arguments."""
    folder = tmp_path_factory.mktemp("arguments")
    (folder / "bad").mkdir()
    (folder / "tmp").mkdir()
    (folder / "bad" / "latin-1.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "bad" / "empty.txt").write_text("")
    texts = [*(arguments for arguments, _ in BAD), *HELP]
    places = [
        [word.replace("{bad}", str(folder / "bad")).replace("{tmp}", str(folder / "tmp")) for word in arguments]
        for arguments in texts
    ]
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER], input=json.dumps(places), capture_output=True, text=True, timeout=120,
        env=blocked(folder / "blocked"), check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((folder / "tmp").iterdir()) == []
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {" ".join(arguments): Done(*result) for arguments, result in zip(texts, found, strict=True)}


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_a_bad_argument_is_refused_without_torch(runs: dict[str, Done], arguments: list[str], says: list[str]) -> None:
    done = runs[" ".join(arguments)]
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    for word in says:
        assert word in done.stderr


@pytest.mark.parametrize("arguments", HELP, ids=[" ".join(arguments) for arguments in HELP])
def test_help_shows_examples_without_torch(runs: dict[str, Done], arguments: list[str]) -> None:
    done = runs[" ".join(arguments)]
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "Examples:" in done.stdout


@pytest.mark.parametrize(("axis", "base"), [("retention", "RetentionMethod"), ("retrieval", "RetrievalMethod")])
def test_options_read_off_the_source_are_those_of_the_methods(axis: str, base: str) -> None:
    kind = getattr(importlib.import_module(f"kvfold.{axis}.method"), base)
    for name in known_methods(axis):
        method = method_class(axis, Clause(name), kind)
        fields = {field.name: str(field.type) for field in dataclasses.fields(method)}
        assert method_fields(axis, name) == fields


@pytest.mark.parametrize("verb", [["generate", "x"], ["eval"], ["demo"], ["bench", "decode"]], ids=" ".join)
def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path: Path, verb: list[str]) -> None:
    env = {**blocked(tmp_path), "HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    arguments = [sys.executable, "-m", "kvfold", *verb, "--model", "someone/some-model"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    first, second = done.stderr.splitlines()
    assert "someone/some-model" in first
    assert "the hub does not answer" in first
    assert second.startswith("hint: ")


def test_a_hub_that_never_answers_is_waited_for_only_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr("kvfold.engine.source._answer", lambda name: str(never.wait(60)))
    monkeypatch.setattr("kvfold.engine.source._MOST_SECONDS", 0.01)
    with pytest.raises(ModelError, match="no answer within"):
        find_source("someone/some-model-that-is-nowhere")
    never.set()


def test_a_cached_model_is_used_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    monkeypatch.setattr("kvfold.engine.source._answer", lambda name: "no network")
    assert find_source("someone/some-model") == Source("someone/some-model", offline=True)
    monkeypatch.setattr("kvfold.engine.source._answer", lambda name: "")
    assert find_source("someone/some-model") == Source("someone/some-model", offline=False)
    monkeypatch.setattr("kvfold.engine.source._answer", lambda name: pytest.fail("the hub is asked"))
    assert find_source("someone/some-model", downloaded=False) == Source("someone/some-model")


def test_lines_of_progress_are_few_and_none_is_lost() -> None:
    now, out = 0.0, io.StringIO()
    lines = PlainLines(out, clock=lambda: now)
    lines.update("loading", 0.0)
    for step in range(1, 101):
        now = step / 10
        lines.update(f"unit {step}", step / 1000)
    assert [line.split("  ")[-1] for line in out.getvalue().splitlines()] == [
        "loading",
        "unit 30",
        "unit 60",
        "unit 90",
    ]
    for second in range(11, 100):
        now = float(second)
        lines.tick()
    said = out.getvalue().splitlines()[4:]
    assert said[0].endswith("unit 100")
    assert 3 <= len(said) <= 4


def test_a_verb_says_what_it_does_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command(capsys, monkeypatch)("generate", "x", "--max-tokens", "1")
    assert done.returncode == 0, done.stderr
    assert "0%  loading" in done.stderr.splitlines()[0]


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "kvfold", "generate", "x", "--recipe", "int5"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=blocked(tmp_path), timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("kvfold: bad recipe 'int5'")
