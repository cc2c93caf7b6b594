"""The page of a profile, its JSON, the terminal, and the command with its errors."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvfold.errors import RequestError
from kvfold.gates import Gates
from kvfold.quality.profile import Plan, Profile, profile_model
from kvfold.quality.profile.page import write_page
from kvfold.quality.report.canvas import ReportError
from kvfold.quality.report.palette import LIGHT
from kvfold.quality.results import ErrorMap
from kvfold.report import profile_report
from tests.calibrations import tiny
from tests.command import Done, command
from tests.engine.tiny_engine import byte_tokenizer, tiny_model

TEXT = "All work and no play makes Jack a dull boy.\n" * 40
PLAN = Plan(model="tiny <b>", command="kvfold profile", context=500, tokens=500, recipe="int4,recent=32")


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_model(tiny_model(), byte_tokenizer(), PLAN, TEXT)


@pytest.fixture(scope="module")
def page(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "profile.html"
    write_page(profile, file)
    assert [path.name for path in file.parent.iterdir()] == ["profile.html"]
    return file.read_text(encoding="utf-8")


# == the page


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<link|<script|@import|\bsrc=|url\((?!#|data:)", text)
    assert not re.search(r'href="(?!#)', text)


def test_ids_are_unique_and_all_references_lead_somewhere(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_figures_take_their_colours_from_the_page(page: str) -> None:
    drawn = page[page.index("<svg") :]
    assert "var(--ink)" in drawn
    assert not [tone for tone, value in LIGHT.items() if value in drawn]


def test_every_panel_is_there_under_a_title_that_says_what_is_seen(page: str, profile: Profile) -> None:
    titles = [title.replace("\u00a0", " ") for title in re.findall("<h2>(.*?)</h2>", page)]
    wanted = [
        "of the attention stays within 32 tokens",
        "The narrowest head looks at",
        "KV heads find",
        "What is left when the other heads forget",
        "A tenth of the past, chosen once, holds",
        "of their mass, heads need",
        "int4,recent=32 moves keys by",
        "All layers",
        "How to get these figures",
    ]
    assert len(titles) == len(wanted)
    for title, words in zip(titles, wanted, strict=True):
        assert words in title
    assert f"<pre>{profile.suggestion.recipe}</pre>" in page
    assert "tiny &lt;b&gt;" in page
    assert "tiny <b>" not in page
    assert page.count('role="img"') == page.count("aria-label=") == page.count("<svg")


def test_the_same_profile_gives_the_same_bytes(page: str, profile: Profile, tmp_path: Path) -> None:
    write_page(profile, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_model_that_cannot_answer_is_said_to(page: str) -> None:
    assert "its gates say little" in page.replace("\u00a0", " ")


def test_parts_may_be_missing_and_layers_many(profile: Profile, tmp_path: Path) -> None:
    layers = [
        replace(layer, layer=n, kind="sliding", window=64, nowhere=[0.1] * layer.q_heads)
        for n in range(24)
        for layer in profile.layers[:1]
    ]
    wide = replace(profile, layers=layers, stored=list(range(24)), errors=None, retrieval=None)
    write_page(wide, tmp_path / "wide.html")
    text = (tmp_path / "wide.html").read_text(encoding="utf-8")
    assert "KV heads find" not in text
    assert "moves keys" not in text
    assert "mean of all layers" in text
    assert "marks layers with a window" in text
    assert "learned" in text
    grid = [[0.1] * 32] * 24
    write_page(replace(wide, errors=ErrorMap(k=grid, v=grid)), tmp_path / "wide.html")
    assert "data:image/png;base64," in (tmp_path / "wide.html").read_text(encoding="utf-8")  # so many cells


def test_a_page_that_cannot_be_written_is_one_error(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(ReportError, match="cannot be written"):
        write_page(profile, tmp_path / "file" / "page.html")


# == as data, and on the terminal


def test_json_holds_all_of_it(profile: Profile) -> None:
    data = json.loads(json.dumps(profile.as_json(), allow_nan=False))
    assert data["kvfold_profile"] == 1
    assert Gates.from_json(data["retrieval"]["gates"]) == profile.retrieval.gates  # type: ignore[union-attr]
    assert len(data["layers"]) == 2
    for layer in data["layers"]:
        assert len(layer["distance"]) == len(data["distance_edges"])
        assert len(layer["held_once"]) == len(layer["held_anew"]) == len(data["shares"])
        assert set(layer["budgets"]) == {"0.95", "0.99"}
        assert len(layer["budgets"]["0.95"]) == 2
        assert len(layer["entropy"]) == 4
    assert data["suggestion"]["recipe"] == profile.suggestion.recipe
    assert (data["sinks"], data["recent"], data["tokens"], data["passages"]) == (4, 32, 500, 1)


def test_the_same_seed_gives_the_same_profile(profile: Profile) -> None:
    shares: list[float] = []
    again = profile_model(tiny_model(), byte_tokenizer(), PLAN, TEXT, lambda what, share: shares.append(share))
    assert again.as_json() == profile.as_json()
    assert shares == pytest.approx([n / len(shares) for n in range(len(shares))])  # every forward, and no more
    other = profile_model(tiny_model(), byte_tokenizer(), replace(PLAN, seed=1), TEXT)
    assert other.retrieval != profile.retrieval


def test_the_terminal_is_concise(profile: Profile) -> None:
    out = io.StringIO()
    profile_report(Console(file=out, width=80), profile)
    lines = out.getvalue().splitlines()
    assert f"A recipe to try: {profile.suggestion.recipe}" in lines
    assert len(lines) < 30
    assert all(len(line) <= 80 for line in lines)
    heading = next(line for line in lines if "breadth" in line)
    assert heading.split() == "layer sinks last 32 breadth top 10% for 95% for 99% gate K err V err".split()
    bare = io.StringIO()
    profile_report(Console(file=bare, width=80), replace(profile, errors=None, retrieval=None))
    assert "A recipe to try" in bare.getvalue()


# == the command


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    return command(capsys, monkeypatch, "profile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("too short")
    (folder / "latin-1.txt").write_bytes("Grüße".encode("latin-1"))
    return folder


def test_the_command_writes_page_gates_and_json(kvfold: Callable[..., Done], folder: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("html", "gates", "json")}
    options = ("--model", folder, "--text", folder / "text.txt", "--tokens", 1, "--recipe", "int8")
    done = kvfold(*options, "-o", files["html"], "--gates", files["gates"], "--json", files["json"])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gates", "out.html", "out.json"]
    assert Gates.read(files["gates"]).recent == 64
    data = json.loads(files["json"].read_text())
    assert data["model"] == folder.name
    assert data["tokens"] == 512  # what the model takes
    assert data["text"] == "text.txt"
    assert "A recipe to try: int8" in done.stdout
    assert f"page: {files['html']}" in done.stderr
    assert "kvfold profile --model" in files["html"].read_text()


def test_json_is_all_of_stdout(
    kvfold: Callable[..., Done], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = kvfold("--model", folder, "--tokens", 1, "--context", 400, "--no-page", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-o", "{folder}"), ["--output", "it is a folder", "hint"]),
        (("-o", "{folder}/no/page.html"), ["there is no folder", "hint"]),
        (("--gates", "{folder}"), ["--gates", "it is a folder", "hint"]),
        (("--gates", "{folder}/no/gates.json"), ["there is no folder", "hint"]),
        (("--json", "{folder}/no/p.json"), ["no folder", "hint"]),
        (("--text", "{folder}/none.txt"), ["none.txt", "hint"]),
        (("--text", "{folder}/latin-1.txt"), ["latin-1.txt", "UTF-8", "hint"]),
        (("--text", "{folder}/short.txt"), ["a text of 9 tokens", "--text"]),
        (("--recipe", "int5"), ["int5", "int4"]),
        (("--recipe", "int4:calibrated"), ["calibration", "kvfold calibrate"]),
        (("--context", "513"), ["a context of 513 tokens", "512 positions", "hint"]),
        (("--context", "271"), ["a context of 271 tokens", "at least 272"]),
        (("--context", "-1"), ["a context of -1 tokens", "hint"]),
        (("--tokens", "0"), ["--tokens"]),
        (("--model", "/no/such/model"), ["/no/such/model", "hint"]),
    ],
)
def test_bad_options_are_one_clear_error(
    kvfold: Callable[..., Done],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    says: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    done = kvfold("--model", folder, *(option.format(folder=folder) for option in options))
    assert done.returncode == 2
    assert not done.stdout
    assert "Traceback" not in done.stderr
    for words in says:
        assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_gates_of_a_model_that_only_slides_are_refused() -> None:
    plan = replace(PLAN, gates=True, recipe="int4")
    with pytest.raises(RequestError, match="no layer of tiny"):
        profile_model(tiny("mistral"), byte_tokenizer(), plan, TEXT)


def test_without_matplotlib_only_the_figures(kvfold: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.quality.report.canvas.find_spec", lambda name: None)
    done = kvfold()
    assert done.returncode == 2
    assert "pip install 'kvfold[eval]'" in done.stderr


def test_help_says_how(kvfold: Callable[..., Done]) -> None:
    done = kvfold("--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert "--gates" in done.stdout
