"""The command: data on stdout, one clear error with a hint and exit code 2 for every bad input."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from kvfold import cli
from kvfold.cli import main
from tests.engine.tiny_engine import byte_tokenizer, tiny_model


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    def run(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["kvfold", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as done:
            main()
        out = capsys.readouterr()
        return Done(int(done.value.code or 0), out.out, out.err)

    return run


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that cannot be used: a model without a chat template, one cut short, a text in Latin-1."""
    folder = tmp_path_factory.mktemp("bad")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    for name in ("no-template", "cut-short"):
        tiny_model().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    weights = folder / "cut-short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "latin-1.txt").write_bytes("Grüße".encode("latin-1"))
    return folder


def test_help_has_examples(kvfold: Callable[..., Done]) -> None:
    for verb in (["demo"], ["generate"], ["bench", "decode"]):
        done = kvfold(*verb, "--help")
        assert done.returncode == 0
        assert "Examples:" in done.stdout


def test_generate_streams_text_and_says_what_it_used(kvfold: Callable[..., Done]) -> None:
    done = kvfold(
        "generate", "def add(a, b):", "--recipe", "int4", "--max-tokens", "8", "--kv-memory", "16MiB", "--stats"
    )
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "maximum concurrency" in done.stderr
    assert "bytes" in done.stderr
    assert "Loading weights" not in done.stderr


def test_generate_reads_stdin_and_writes_json(kvfold: Callable[..., Done]) -> None:
    done = kvfold("generate", "--json", "-", "--max-tokens", "4", stdin="The import statement")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert len(result["token_ids"]) <= 4
    assert result["prompt_tokens"] > 0


def test_bench_decode_has_a_rival_and_a_limit(kvfold: Callable[..., Done]) -> None:
    done = kvfold(
        "bench",
        "decode",
        "--shape",
        "tiny",
        "--context",
        "96",
        "--batch",
        "2",
        "--steps",
        "2",
        "--recipes",
        "raw;int4",
        "--vs",
        "transformers",
        "--json",
        "-",
    )
    assert done.returncode == 0, done.stderr
    rows = {row["contestant"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(rows) == {"transformers", "raw", "int4"}
    assert rows["raw"]["kl"] == 0
    assert all(row["fraction_of_limit"] > 0 and row["vs"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--recipe", "int5"], ["int5", "int4"]),
        (["generate", "x", "--recipe", "int4,recnt=3"], ["recnt", "recent"]),
        (["generate", "x", "--recipe", "int4+snapkv(keep=0.5)"], ["snapkv"]),
        (["generate", "x", "--model", "/no/such/model"], ["/no/such/model", "hint"]),
        (["generate", "x", "--kv-memory", "10KiB"], ["block", "hint"]),
        (["generate", "x", "--kv-memory", "2 apples"], ["apples", "hint"]),
        (["generate", "word " * 20000], ["context", "hint"]),
        (["generate", "x", "--temperature", "-1"], ["temperature"]),
        (["generate", "x", "--file", "no-such-file.txt"], ["hint"]),
        (["generate", "--file", "no-such-file.txt"], ["no such file"]),
        (["generate", "--file", "{bad}/latin-1.txt"], ["latin-1.txt", "UTF-8", "hint"]),
        (["generate", "x", "--max-tokens", "0"], ["max_tokens"]),
        (["generate", "x", "--model", "{bad}/cut-short"], ["cut-short", "hint"]),
        (["generate", "x", "--chat", "--model", "{bad}/no-template"], ["chat template", "hint"]),
        (["generate", "x", "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
        (["demo", "--model", "{bad}/no-template"], ["chat template", "hint"]),
        (["demo", "--json", "{bad}"], ["it is a folder", "hint"]),
        (["demo", "--recipes", "raw;int5"], ["int5", "int4"]),
        (["demo", "--tokens", "9000"], ["positions", "hint"]),
        (["bench", "decode", "--recipes", "raw;int5"], ["int5", "int4"]),
        (["bench", "decode", "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
        (["bench", "decode", "--shape", "llama-9"], ["llama-9", "tiny"]),
        (["bench", "decode", "--shape", "tiny", "--vs", "vllm"], ["vllm", "transformers"]),
    ],
)
def test_bad_input_is_one_clear_error(
    kvfold: Callable[..., Done], bad: Path, arguments: list[str], says: list[str]
) -> None:
    done = kvfold(*(argument.replace("{bad}", str(bad)) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in says:
        assert word in done.stderr


def test_an_interrupt_ends_without_a_traceback(kvfold: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_prompt", interrupted)
    done = kvfold("generate", "x")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("rivals", [[], ["--vs", "transformers"]])
def test_the_gate_runs_with_and_without_a_rival(
    kvfold: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, rivals: list[str]
) -> None:
    monkeypatch.setattr("kvfold.bench.decode._GATE", -1.0)
    done = kvfold("bench", "decode", "--shape", "tiny", "--context", "40", "--steps", "1", *rivals)
    assert done.returncode == 2
    assert "correctness gate" in done.stderr


@pytest.mark.slow
def test_demo_gives_the_promised_rows(kvfold: Callable[..., Done]) -> None:
    done = kvfold("demo", "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = {row["recipe"]: row for row in json.loads(done.stdout)}
    assert list(rows) == ["raw", "int8", "int4", "k4v2", "int2"]
    raw, int4 = rows["raw"], rows["int4"]
    assert int4["compression"] >= 2.9
    assert int4["answers_right"] >= raw["answers_right"] - 1
    assert int4["top1_agreement"] >= 0.95
    assert all(row["decode_tok_s"] > 0 for row in rows.values())
