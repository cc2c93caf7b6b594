"""The command: data on stdout, one clear error with a hint and exit code 2 for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.cli import generate as generate_verb
from tests.command import Done, command
from tests.engine.tiny_engine import byte_tokenizer, tiny_model


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    return command(capsys, monkeypatch)


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
    tiny_model().save_pretrained(folder / "no-tokenizer")
    (folder / "short.txt").write_text("a text that is too short")
    (folder / "latin-1.txt").write_bytes("Grüße".encode("latin-1"))
    return folder


def test_help_has_examples(kvfold: Callable[..., Done]) -> None:
    for verb in (["demo"], ["generate"], ["eval"], ["calibrate"], ["profile"], ["doctor"], ["bench", "decode"]):
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
        (["generate", "x", "--recipe", "int4+snipkv(keep=0.5)"], ["snapkv"]),
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
        (["eval", "--recipes", "raw;int5"], ["int5", "int4"]),
        (["eval", "--tasks", "kv,niah_singel"], ["niah_singel", "did you mean 'niah_single'"]),
        (["eval", "--samples", "0"], ["samples", "hint"]),
        (["eval", "--depths", "0,2"], ["depth", "hint"]),
        (["eval", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["eval", "--context", "5000"], ["4096 positions", "hint"]),
        (["eval", "--text", "no-such-file.txt"], ["no-such-file.txt", "hint"]),
        (["eval", "--text", "{bad}/latin-1.txt"], ["latin-1.txt", "UTF-8", "hint"]),
        (["eval", "--text", "{bad}/short.txt"], ["a text of", "--text"]),
        (["eval", "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
        (["eval", "--report", "{bad}/short.txt"], ["is a file", "hint"]),
        (["eval", "--report", "{bad}/short.txt/report"], ["is a file", "hint"]),
        (["eval", "--merge", "{bad}/short.txt"], ["not an evaluation", "hint"]),
        (["eval", "--model", "{bad}/no-tokenizer"], ["no-tokenizer", "hint"]),
        (["eval", "--model", "/no/such/model"], ["/no/such/model", "hint"]),
        (["doctor", "--json", "{bad}/no/result.json"], ["no folder", "hint"]),
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


def test_bad_input_writes_nothing(kvfold: Callable[..., Done], bad: Path, tmp_path: Path) -> None:
    for arguments in (["--text", str(bad / "short.txt")], ["--tasks", "nothing"], ["--model", str(bad / "cut-short")]):
        done = kvfold("eval", *arguments, "--json", str(tmp_path / "e.json"), "--report", str(tmp_path / "report"))
        assert done.returncode == 2
        assert list(tmp_path.iterdir()) == []


def test_a_report_without_matplotlib_is_refused_before_any_work(
    kvfold: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfold.quality.report.canvas.find_spec", lambda name: None)
    monkeypatch.setattr("kvfold.cli.evaluate.start", lambda _: pytest.fail("work has begun"))
    done = kvfold("eval", "--report", str(tmp_path / "report"))
    assert done.returncode == 2
    assert "kvfold[eval]" in done.stderr
    assert not (tmp_path / "report").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, kvfold.cli; from typer.testing import CliRunner; from kvfold.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'lm_eval'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# == eval, on a tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that has no chat template, and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("".join(f"line {i * 7919 % 1000} of a text\n" for i in range(100)))
    return folder


@pytest.fixture
def evaluate(kvfold: Callable[..., Done], tiny: Path) -> Callable[..., Done]:
    def run(*arguments: str) -> Done:
        small = "--context 256 --scored 32 --tasks kv --samples 2 --windows 1 --generation-tokens 8 --generations 1"
        given = ["--model", str(tiny), "--text", str(tiny / "text.txt"), "--recipes", "int4", *small.split()]
        return kvfold("eval", *given, *arguments)

    return run


def test_eval_writes_a_table_a_file_and_a_report(evaluate: Callable[..., Done], tmp_path: Path) -> None:
    file, report = tmp_path / "e.json", tmp_path / "deep" / "report"
    done = evaluate("--json", str(file), "--report", str(report))
    assert done.returncode == 0, done.stderr
    assert "int4" in done.stdout
    assert "Tasks" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    found = json.loads(file.read_text())
    assert [row["recipe"] for row in found["rows"]] == ["raw", "int4"]
    assert found["command"].startswith("kvfold eval --model")
    assert found["model"] == tmp_path.name or "/" not in found["model"]
    assert (report / "index.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "e.json"]  # no journal, nothing unfinished


def test_eval_is_deterministic_and_speaks_json(evaluate: Callable[..., Done]) -> None:
    found = [json.loads(evaluate("--json", "-").stdout)["rows"] for _ in range(2)]
    for rows in found:
        for row in rows:
            row.pop("decode_tok_s")
    assert found[0] == found[1]


def test_eval_goes_on_after_an_interrupt(
    evaluate: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, journal = tmp_path / "e.json", tmp_path / "e.json.journal.jsonl"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvfold.quality.units.Units._follow", interrupted)
        done = evaluate("--json", str(file))
    assert done.returncode == 130
    assert "goes on" in done.stderr
    assert not file.exists()
    before = journal.read_bytes()
    done = evaluate("--json", str(file), "--seed", "1")
    assert done.returncode == 2
    assert "seed was 0 and is 1" in done.stderr
    assert "--no-resume" in done.stderr
    assert journal.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr("kvfold.quality.units.Units._text", interrupted)  # is done, and not done again
        done = evaluate("--json", str(file))
    assert done.returncode == 0, done.stderr
    assert file.is_file()
    assert not journal.exists()


def test_eval_merges_what_is_comparable(evaluate: Callable[..., Done], tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.json", tmp_path / "ours.json"
    assert evaluate("--json", str(theirs)).returncode == 0
    data = json.loads(theirs.read_text())
    data["rows"][1] |= {"contestant": "rival", "family": "transformers", "recipe": None}
    theirs.write_text(json.dumps(data))
    done = evaluate("--json", str(ours), "--merge", str(theirs))
    assert done.returncode == 0, done.stderr
    assert [row["contestant"] for row in json.loads(ours.read_text())["rows"]] == ["raw", "int4", "rival"]
    done = evaluate("--json", str(tmp_path / "other.json"), "--merge", str(theirs), "--samples", "3")
    assert done.returncode == 2
    assert "samples is 3 here and 2 there" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.json", "theirs.json"]


def test_an_interrupt_ends_without_a_traceback(kvfold: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_verb, "_prompt", interrupted)
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
    assert list(rows) == ["raw", "int8", "int4", "int2:calibrated", "int2"]
    raw, int4 = rows["raw"], rows["int4"]
    assert int4["compression"] >= 2.9
    assert int4["answers_right"] >= raw["answers_right"] - 1
    assert int4["top1_agreement"] >= 0.95
    assert all(row["speed"]["tok_s"] > 0 and row["speed"]["batch"] == 16 for row in rows.values())
