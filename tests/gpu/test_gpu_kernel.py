"""The GPU kernel against the plain-torch truth, on the same stored codes, in an arena full of NaN."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from kvfold.errors import UnsupportedError
from kvfold.formats import PageFormat, VectorFormat
from kvfold.kernels import triton
from kvfold.kernels.catalog import full_registry
from kvfold.kernels.pages import HIDDEN, PagesCall
from tests.test_native import Paged

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
RELATIVE, LOG = 1e-3, 3e-3  # of the output; of the log of the sum of exponentials, absolute
PAIRS = [
    *((s, s) for s in ("f32", "bf16", "f16", "int8", "int4", "int2")),
    ("int8", "int4"), ("int4", "int2"), ("int2", "int8"), ("bf16", "int4"), ("int8", "f16"), ("f32", "int2"),
]  # fmt: skip
DIMS = [(16, 16), (64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256), (20, 36)]


def on_device(call: PagesCall) -> PagesCall:
    moved = {name: getattr(call, name).to("cuda") for name in ("q", "arena", "addr", "bias")}
    return replace(call, **moved)


def check(paged: Paged, relative: float = RELATIVE) -> None:
    call = on_device(paged.call())
    assert full_registry().select("attend_pages", call).name == "triton"
    o, lse = (x.cpu() for x in triton.attend(call))
    assert o.isfinite().all()
    for i in range(len(paged.lengths)):
        want_o, want_lse = paged.truth(i)
        assert (o[i] - want_o).norm() <= relative * want_o.norm()
        assert torch.allclose(lse[i], want_lse, rtol=1e-4, atol=LOG)


class TestOnGpu:
    """What needs the device."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("storages", PAIRS, ids="-".join)
    @pytest.mark.parametrize("dims", DIMS)
    def test_every_storage_and_size_agrees_with_the_truth(
        self, storages: tuple[str, str], dims: tuple[int, int]
    ) -> None:
        check(Paged(storages, dims))

    @pytest.mark.parametrize("group", [1, 3, 8, 16, 17, 40, 130])
    @pytest.mark.parametrize("storage", ["bf16", "int4"])
    def test_any_number_of_rows(self, group: int, storage: str) -> None:
        check(Paged((storage, storage), (64, 64), group=group, heads=3, bias=True))

    @pytest.mark.parametrize("size", [1, 3, 16, 32, 33, 80])
    @pytest.mark.parametrize("storage", ["f16", "int2"])
    def test_every_block_size_and_a_shift(self, size: int, storage: str) -> None:
        check(Paged((storage, storage), (32, 32), size=size, lengths=(1, 97, 40), bias=True, shift=640))

    @pytest.mark.parametrize("storage", ["bf16", "int4"])
    def test_one_long_sequence_is_cut_into_spans(self, storage: str) -> None:
        paged = Paged((storage, storage), (64, 64), heads=1, lengths=(9001,), size=32)
        for _ in range(3):
            check(paged)

    @pytest.mark.parametrize("length", [40, 4000])
    @pytest.mark.parametrize("storage", ["bf16", "int4"])
    def test_a_sequence_that_sees_nothing_weighs_nothing(self, length: int, storage: str) -> None:
        paged = Paged((storage, storage), (64, 64), lengths=(length, length), size=32)
        paged.bias[1] = HIDDEN
        o, lse = (x.cpu() for x in triton.attend(on_device(paged.call())))
        assert not o[1].any()
        assert lse[1].max() == torch.finfo(torch.float32).min
        want = paged.truth(0)[0]
        assert (o[0] - want).norm() <= RELATIVE * want.norm()

    @pytest.mark.parametrize("storage", ["bf16", "int4"])
    def test_nan_that_is_seen_is_not_hidden(self, storage: str) -> None:
        paged = Paged((storage, storage), (64, 64))
        paged.bias[1] = 0.0  # its unused slots hold NaN
        o, lse = (x.cpu() for x in triton.attend(on_device(paged.call())))
        assert o[0].isfinite().all()
        assert o[1].isnan().all()
        assert lse[1].isnan().all()

    def test_without_a_bias_everything_is_seen(self) -> None:
        call = on_device(Paged(("int4", "int4"), (64, 64), lengths=(32, 32)).call())
        seen, unbiased = triton.attend(call), triton.attend(replace(call, bias=None))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(seen, unbiased, strict=True))

    def test_far_scores_neither_overflow_nor_vanish(self) -> None:
        paged = Paged(("f32", "f32"), (64, 64), lengths=(100, 64))
        paged.q *= 300
        o, lse = (x.cpu() for x in triton.attend(on_device(paged.call())))
        for i in range(2):
            want_o, want_lse = paged.truth(i)
            assert torch.allclose(o[i], want_o, atol=1e-2)
            assert torch.allclose(lse[i], want_lse, rtol=1e-5)

    @pytest.mark.parametrize("storage", ["f32", "bf16", "int8", "int4"])
    def test_soft_capped_scores(self, storage: str) -> None:
        paged = Paged((storage, storage), (64, 64), bias=True)
        o, lse = (x.cpu() for x in triton.attend(on_device(replace(paged.call(), softcap=1.5))))
        for i in range(len(paged.lengths)):
            want_o, want_lse = paged.truth(i, 1.5)
            assert (o[i] - want_o).norm() <= RELATIVE * want_o.norm()
            assert torch.allclose(lse[i], want_lse, rtol=1e-4, atol=LOG)

    def test_outlying_scales_of_values_keep_their_neighbours(self) -> None:
        paged = Paged(("int8", "int8"), (64, 64), lengths=(200,), size=32)
        at = paged.addr[0, :, 5] + paged.shift
        slot = torch.full((2,), 3)
        k = torch.randn(2, 64)
        paged.store.write_rows(at, slot, k, torch.randn(2, 64) * 1e30)
        paged.bias[0, 5 * 32 + 3] = HIDDEN
        check(paged)

    def test_the_registry_tells_why_the_kernel_is_passed_over(self) -> None:
        call, registry = on_device(Paged(("int4", "int4"), (64, 64)).call()), full_registry()
        assert dict(registry.explain("attend_pages", call))["triton"] == "chosen"
        fmt = replace(call.fmt, k=replace(call.fmt.k, group=32))
        reasons = {
            "latent": replace(call, latent=True),
            "2 groups": replace(call, fmt=fmt),
            "gradients": replace(call, q=call.q.clone().requires_grad_()),
            "torch.float64": replace(call, dtype=torch.float64, fmt=replace(fmt, k=VectorFormat.raw(64, 8))),
            "aligned": replace(call, shift=8),
            "channels": replace(call, fmt=replace(fmt, k=VectorFormat(64, 4, True, 64, "none", "channel"))),
        }
        for reason, refused in reasons.items():
            assert reason in dict(registry.explain("attend_pages", refused))["triton"]
            with pytest.raises(UnsupportedError, match="GPU kernel"):
                triton.attend(refused)

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        call = on_device(Paged(("int4", "int4"), (64, 64)).call())
        assert call.bias is not None
        for bad in ({"q": call.q[..., :32]}, {"addr": call.addr[:1]}, {"bias": call.bias[:, :-1]}):
            with pytest.raises(ValueError, match=r"do(es)? not fit"):
                triton.attend(replace(call, **bad))


def test_on_a_cpu_the_kernel_says_that_it_needs_a_gpu() -> None:
    call = Paged(("int4", "int4"), (64, 64)).call()
    assert triton.refuses(call) == "needs tensors on a GPU, got cpu"
    with pytest.raises(UnsupportedError, match="needs tensors on a GPU"):
        triton.attend(call)


def test_pages_it_does_not_know_are_named() -> None:
    token, channel = (VectorFormat(8, 4, True, 8, "none", scales) for scales in ("token", "channel"))
    assert triton._layout(PageFormat(8, channel, token), torch.float32) == "does not know scales of channels"


def test_without_triton_the_log_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(triton, "import_module", missing)
    with caplog.at_level(logging.WARNING, logger="kvfold.kernels"):
        assert triton._missing.__wrapped__() == "Triton is not there (no triton.language)"
    assert "slower" in caplog.text
