"""The ruler can fail: a codec that is broken on purpose is seen, by every measure that is there to see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from kvfold.codecs import affine
from kvfold.codecs.pages import PageStore
from kvfold.engine.loading import load
from kvfold.kernels.cpu.rows import NativePages
from kvfold.quality.evaluate import EvalSettings, Workload, build_workload, evaluate
from kvfold.quality.recipes import recipe_contestants
from kvfold.quality.results import Row

SETTINGS = EvalSettings(
    tasks=("kv",),
    context=512,
    samples=4,
    text_windows=1,
    scored_tokens=128,
    generation_tokens=48,
    generation_passages=1,
    decode_steps=0,
)


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Workload]:
    model, tokenizer = load("bundled")
    return model, build_workload(tokenizer, SETTINGS, stop=frozenset({tokenizer.eos_token_id}))


def measured(bundled: tuple[Any, Workload]) -> Row:
    raw, int8 = recipe_contestants(bundled[0], ["int8"])
    return evaluate([int8], raw, bundled[1])[0]


@pytest.fixture(scope="module")
def healthy(bundled: tuple[Any, Workload]) -> Row:
    return measured(bundled)


def gate(row: Row) -> list[str]:
    """What a release would be refused for, if ``int8`` showed it."""
    found = {
        "kl_mean": row.kl_mean > 2e-3,
        "top1_agreement": row.top1_agreement < 0.97,
        "ppl": abs(row.ppl_delta) > 0.01 * row.ppl,
        "errors": row.errors is None or max(max(heads) for heads in (*row.errors.k, *row.errors.v)) > 0.02,
    }
    return [name for name, bad in found.items() if bad]


def swapped_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales of two neighbouring tokens change places."""
    encode = affine.encode

    def broken(x: Tensor, fmt: Any, **options: bool) -> tuple[Tensor, Tensor]:
        codes, meta = encode(x, fmt, **options)
        if meta.dim() >= 3 and meta.shape[-3] > 1:
            pair = meta[..., 4:6, :, :].clone()
            meta[..., 4:6, :, :] = pair.flip(-3)
        return codes, meta

    monkeypatch.setattr(affine, "encode", broken)


def shifted_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every packed page goes where its neighbour belongs."""
    write = PageStore.write_pages

    def broken(self: PageStore, addr: Tensor, k: Tensor, v: Tensor, layer: int | None = None) -> None:
        write(self, addr.roll(1) if self.fmt.k.quantized else addr, k, v, layer)

    monkeypatch.setattr(PageStore, "write_pages", broken)


def shifted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of a packed page goes one slot too far."""
    write = PageStore.write_pages

    def broken(self: PageStore, addr: Tensor, k: Tensor, v: Tensor, layer: int | None = None) -> None:
        turns = 1 if self.fmt.k.quantized else 0
        write(self, addr, k.roll(turns, 1), v, layer)

    monkeypatch.setattr(PageStore, "write_pages", broken)


def test_a_healthy_codec_passes(healthy: Row) -> None:
    assert gate(healthy) == []


@pytest.mark.parametrize("break_it", [swapped_scales, shifted_pages, shifted_rows])
def test_a_broken_codec_is_caught(
    bundled: tuple[Any, Workload],
    healthy: Row,
    break_it: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is broken here are the codes of torch, which the native ones would stand in for.
    monkeypatch.setattr(NativePages, "refuses", lambda *_: "codes are broken on purpose")
    break_it(monkeypatch)
    broken = measured(bundled)
    assert {"kl_mean", "errors"} <= set(gate(broken))
    assert broken.kl_mean > 10 * healthy.kl_mean
    assert broken.generation is not None
    assert healthy.generation is not None
    assert broken.generation.kl_mean > healthy.generation.kl_mean
