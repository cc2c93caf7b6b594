"""The file of gates: written and read again, and refused by its reason when it is something else."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from kvfold.errors import ModelError
from kvfold.gates import GATES_FILE, Gates

GOOD = {
    "format": "kvfold-gates",
    "version": 1,
    "model_type": "llama",
    "sinks": 4,
    "recent": 64,
    "gates": {"0": [0.0, 0.25], "2": [1.0, 0.5]},
}


def gates() -> Gates:
    return Gates(model_type="llama", sinks=4, recent=64, heads={2: (1.0, 0.5), 0: (0.0, 0.25)})


def test_written_and_read_again(tmp_path: Path) -> None:
    gates().write(tmp_path / GATES_FILE)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.json"]
    assert json.loads((tmp_path / GATES_FILE).read_text()) == GOOD
    found = Gates.read(tmp_path / GATES_FILE)
    assert found == gates()
    assert list(found.heads) == [0, 2]  # by layer, whatever order they were given in
    assert Gates.from_json(found.as_json()) == found


def test_the_best_heads_stay_full() -> None:
    some = gates()
    assert some.full(0) == {0: (False, False), 2: (False, False)}
    assert some.full(1) == {0: (False, False), 2: (True, False)}
    assert some.full(3) == {0: (False, True), 2: (True, True)}
    assert some.full(9) == {0: (True, True), 2: (True, True)}
    equal = Gates(model_type="llama", sinks=0, recent=1, heads={1: (0.5, 0.5), 0: (0.5,)})
    assert equal.full(2) == {0: (True,), 1: (True, False)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "kvfold-rates"}, "its format is 'kvfold-rates', not 'kvfold-gates'"),
        ({"version": 2}, "its version is 2"),
        ({"model_type": 3}, "model_type"),
        ({"model_type": ""}, "model_type"),
        ({"sinks": -1}, "sinks is -1"),
        ({"recent": 1.5}, "recent is 1.5"),
        ({"recent": True}, "recent is True"),
        ({"gates": []}, "not lists by layer"),
        ({"gates": {"0": 0.5}}, "not lists by layer"),
        ({"gates": {}}, "there is no layer"),
        ({"gates": {"0": []}}, "layer 0 has no heads"),
        ({"gates": {"one": [0.5]}}, "'one' is not the index of a layer"),
        ({"gates": {"01": [0.5]}}, "'01' is not the index of a layer"),
        ({"gates": {"-1": [0.5]}}, "'-1' is not the index of a layer"),
        ({"gates": {"3": [0.5, 1.01]}}, "layer 3, head 1 is 1.01"),
        ({"gates": {"3": [math.nan]}}, "layer 3, head 0 is nan"),
        ({"gates": {"3": ["0.5"]}}, "layer 3, head 0 is '0.5'"),
        ({"gates": {"3": [True]}}, "layer 3, head 0 is True"),
        ({"more": 1}, "it has more, which is not known"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, object], says: str, tmp_path: Path) -> None:
    file = tmp_path / "gates.json"
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(ModelError) as refused:
        Gates.read(file)
    assert str(file) in refused.value.what
    assert says in refused.value.why
    assert "kvfold profile" in refused.value.hint


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"format": "kvfold-gates"}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "gates.json").write_text(text)
    with pytest.raises(ModelError, match="no gates in"):
        Gates.read(tmp_path / "gates.json")


def test_bytes_that_are_no_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gates.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="no gates in"):
        Gates.read(tmp_path / "gates.json")
    with pytest.raises(ModelError, match="no such file") as refused:
        Gates.read(tmp_path / "none.json")
    assert "--gates" in refused.value.hint
    with pytest.raises(ModelError, match="no such file"):
        Gates.read(tmp_path)


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gates.json"
    file.write_text("the old one")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ModelError, match="No space left"):
        gates().write(file)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.json"]
    assert file.read_text() == "the old one"


def test_the_bundled_model_brings_its_gates() -> None:
    folder = Path(str(files("kvfold").joinpath("bundled")))
    found = Gates.read(folder / GATES_FILE)
    config = json.loads((folder / "config.json").read_text())
    assert found.model_type == config["model_type"]
    assert list(found.heads) == list(range(config["num_hidden_layers"]))
    assert {len(values) for values in found.heads.values()} == {config["num_key_value_heads"]}
    assert found.full(1)[1] == (False, True)  # the one head that finds what is far back


def test_gates_need_no_torch() -> None:
    code = "import sys, kvfold.gates; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
