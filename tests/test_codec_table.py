"""The table of codecs: its simulations are the shipped codecs, and one small run goes through."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from benchmarks.codecs import __main__ as command
from benchmarks.codecs.bands import SHIPPED, Variation, bases_of, shipped, varied
from benchmarks.codecs.learn import Learned, learn
from benchmarks.codecs.rivals import FAMILIES, Codec, affine, bit_reversed, lloyd_max
from benchmarks.codecs.table import MARKS

from kvfold.codecs import affine as kvfold_affine
from kvfold.codecs.pages import PageStore
from kvfold.engine.loading import load
from kvfold.formats import PageFormat, VectorFormat

LENGTH = 256


@pytest.fixture(scope="module")
def learned() -> Learned:
    model, tokenizer = load("bundled", dtype=torch.float32)
    text = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    ids = tokenizer.encode(text[:8000], add_special_tokens=False)
    return learn(model, [ids[:LENGTH], ids[LENGTH : 2 * LENGTH]], seed=0)


@pytest.fixture(scope="module")
def vectors(learned: Learned) -> tuple[torch.Tensor, torch.Tensor]:
    return learned.rows(1, "k"), learned.rows(1, "v")


@pytest.mark.parametrize("average", [4.0, 2.5, 2.0])
def test_the_written_out_banded_code_is_the_shipped_one(
    learned: Learned, vectors: tuple[torch.Tensor, torch.Tensor], average: float
) -> None:
    variation = Variation("the shipped one")
    bits, fold = shipped(learned, average)
    own_bits, own = varied(bases_of(learned, variation), variation, average)
    assert own_bits == pytest.approx(bits)
    for kept, x, y in zip(vectors, fold(1, *vectors), own(1, *vectors), strict=True):
        error, difference = (x - kept).square().sum(), (x - y).square().sum()
        assert difference < 0.01 * error  # numbers between two codes may fall either way


@pytest.mark.parametrize("recipe", ["int4", "int2", "int4,scales=channel,block=64", "int2,scales=channel,block=64"])
def test_rows_with_the_name_of_a_recipe_are_what_its_pages_hold(
    learned: Learned, vectors: tuple[torch.Tensor, torch.Tensor], recipe: str
) -> None:
    (codec,) = [codec for family in FAMILIES for codec in family(learned) if codec.name.endswith(f"(`{recipe}`)")]
    of_values = VectorFormat(learned.dim, int(recipe[3]), quantized=True, group=learned.dim, rotation="hadamard")
    of_keys = replace(of_values, scales="channel") if "channel" in recipe else of_values
    fmt = PageFormat(64, of_keys, of_values)
    pages = [x.unflatten(1, (-1, 64)).flatten(0, 1) for x in vectors]
    addr = torch.arange(len(pages[0])) * fmt.page_bytes
    store = PageStore(torch.zeros(len(addr) * fmt.page_bytes, dtype=torch.uint8), fmt, torch.float32)
    store.write_pages(addr, *pages)
    assert codec.bits == 8 * fmt.page_bytes / (64 * 2 * learned.dim)
    for kept, x, page in zip(vectors, codec.fold(1, *vectors), store.decode_pages(addr), strict=True):
        error, difference = (x - kept).square().sum(), (x - page.view_as(x)).square().sum()
        assert difference < 0.01 * error


def test_simulated_codes_have_the_error_that_is_known_of_them() -> None:
    x = torch.randn(1, 5_000, 64, generator=torch.Generator().manual_seed(0))
    for bits, known in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):  # Max, 1960
        book = torch.tensor(lloyd_max(bits))
        nearest = (x[..., None] - book).abs().argmin(-1)
        assert float((book[nearest] - x).square().mean()) == pytest.approx(known, rel=0.02)
    for bits in (4, 3, 2):
        step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
        assert float((affine(x, bits) - x).abs().amax(-1).div(step).max()) < 0.52
        if bits != 3:
            fmt = VectorFormat(64, bits, quantized=True, group=64, rotation="none")
            for inner, projected in product((False, True), repeat=2):
                stored = kvfold_affine.encode(x, fmt, inner=inner, projected=projected)
                read = kvfold_affine.decode(*stored, fmt, torch.float32)
                assert torch.allclose(affine(x, bits, inner=inner, projected=projected), read)
    assert bit_reversed(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


def test_every_codec_is_better_with_more_bits_and_leaves_its_input(
    learned: Learned, vectors: tuple[torch.Tensor, torch.Tensor]
) -> None:
    before = [x.clone() for x in vectors]
    by_name: dict[str, list[tuple[float, float]]] = {}
    codecs: list[Codec] = [codec for family in FAMILIES for codec in family(learned)]
    for codec in codecs:
        folded = codec.fold(1, *vectors)
        error = sum(float((x - y).square().sum()) for x, y in zip(vectors, folded, strict=True))
        assert error > 0
        name = "".join(c for c in codec.name.split(" (")[0] if not c.isdigit())
        by_name.setdefault(name, []).append((codec.bits, error))
    assert all(torch.equal(x, y) for x, y in zip(vectors, before, strict=True))
    for name, found in by_name.items():
        errors = [error for _, error in sorted(found)]
        assert errors == sorted(errors, reverse=True), name


def test_the_command_writes_a_result_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, result = tmp_path / "page.md", tmp_path / "codecs.json"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n", encoding="utf-8")
    small = ["--windows", "1", "--questions", "1", "--tokens", "512", "--length", "256", "--only", "banded, 4*"]
    monkeypatch.setattr(sys, "argv", ["codecs", *small, "--json", str(result), "--docs", str(page)])
    with pytest.raises(SystemExit) as done:
        command.main()
    assert done.value.code == 0
    data = json.loads(result.read_text(encoding="utf-8"))
    assert {"command", "seed", "model", "model_sha256", "versions"} <= data.keys()
    assert all(row["codec"].startswith(SHIPPED) and row["text_kl"] > 0 for row in data["rows"])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert "int4:calibrated" in text
    assert "int4:calibrated" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--only", "nothing like it"], ["--docs", "nowhere.md"]])
def test_what_cannot_be_done_is_said(
    option: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["codecs", "--tokens", "256", "--length", "128", *option])
    with pytest.raises(SystemExit) as done:
        command.main()
    assert done.value.code == 2
    assert option[0] in capsys.readouterr().err
