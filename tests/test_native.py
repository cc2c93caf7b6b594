"""The native kernel against the plain-torch truth, on the same stored codes."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvfold.codecs.pages import PageStore
from kvfold.errors import UnsupportedError
from kvfold.formats import PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.catalog import full_registry
from kvfold.kernels.pages import HIDDEN, PagesCall
from kvfold.kernels.reference import paged_attend

SIZE = 8
# Floats are summed in another order; codes are met by queries and weights of 15 bits (csrc/digits.hpp).
FLOATS, CODES = 2e-5, 1e-3
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

native = pytest.mark.skipif(cpu.available() is not None, reason=f"not built: {cpu.available()}")


def test_the_extension_is_there_where_it_can_be() -> None:
    """A mistake in csrc must not show as skipped tests. ``KVFOLD_TEST_NATIVE``: 1 where the extension has to be there,
    0 where it may lack; unset, it has to be there if the machine has a C++ compiler.
    """
    wanted = os.environ.get("KVFOLD_TEST_NATIVE", "1" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "0")
    if wanted == "0":
        pytest.skip("no C++ compiler here, or the extension is not asked for")
    hint = "see why the build fails: pip install -v --no-deps -e . (KVFOLD_TEST_NATIVE=0 runs the tests without it)"
    assert cpu.available() is None, f"the native extension is missing: {cpu.available()}; {hint}"


def side(storage: str, dim: int, dtype: torch.dtype) -> VectorFormat:
    if storage in DTYPES:
        return VectorFormat.raw(dim, dtype.itemsize)
    return VectorFormat(dim=dim, bits=int(storage[3:]), quantized=True, group=dim, rotation="hadamard")


class Paged:
    """Sequences of ``lengths`` in permuted pages of an arena full of NaN, and calls that attend over them."""

    def __init__(
        self, storages: tuple[str, str], dims: tuple[int, int], *, group: int = 2, heads: int = 2,
        lengths: tuple[int, ...] = (21, 5), size: int = SIZE, bias: bool = False, shift: int = 0,
    ) -> None:  # fmt: skip
        self.lengths, self.size, self.shift = lengths, size, shift
        dtype = next((DTYPES[s] for s in storages if s in DTYPES), torch.float32)
        fmt = PageFormat(size, *(side(s, dim, dtype) for s, dim in zip(storages, dims, strict=True)))
        n, pages = len(lengths), max(-(-length // size) for length in lengths)
        order = torch.randperm(n * heads * pages + 3)
        # 0xff everywhere is NaN in every raw dtype and in every scale and zero.
        arena = torch.full((order.numel() * fmt.page_bytes + shift,), 255, dtype=torch.uint8)
        self.store = PageStore(arena, fmt, dtype)
        self.addr = order[: n * heads * pages].view(n, heads, pages) * fmt.page_bytes
        self.bias = torch.full((n, pages * size), HIDDEN)
        for i, length in enumerate(lengths):
            token = torch.arange(length)
            at = (self.addr[i][:, token // size] + shift).reshape(-1)
            slot = (token % size).expand(heads, -1).reshape(-1)
            k, v = (torch.randn(heads * length, dim).to(dtype) for dim in dims)
            self.store.write_rows(at, slot, k * 3, v + 1)
            self.bias[i, :length] = torch.randn(length) if bias else 0.0
        self.q = torch.randn(n, heads, group, dims[0])

    def call(self) -> PagesCall:
        return PagesCall(
            q=self.q, arena=self.store.arena, addr=self.addr, shift=self.shift, fmt=self.store.fmt,
            dtype=self.store.dtype, scale=self.q.shape[-1] ** -0.5, bias=self.bias, read=self.read,
        )  # fmt: skip

    def read(self, pages: slice) -> tuple[Tensor, Tensor]:
        addr = self.addr[..., pages] + self.shift
        return self.store.read_k(addr), self.store.read_v(addr)

    def truth(self, i: int, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """Float32 attention on what the pages hold, decoded in float32."""
        heads, pages = self.addr.shape[1:]
        addr = (self.addr[i] + self.shift).reshape(-1)
        sides = (self.store.plain.k, self.store.plain.v)
        wide = [
            s.read(addr, torch.float32 if s.fmt.quantized else self.store.dtype).view(-1, self.size, s.fmt.dim).float()
            for s in sides
        ]
        o, lse = paged_attend(
            self.q[i].flatten(0, 1)[None], *wide, table=torch.arange(heads * pages).view(heads, pages),
            block_index=torch.arange(pages), length=self.lengths[i], q_pos=torch.tensor([self.lengths[i]]),
            bias=self.bias[i].view(pages, -1), scale=self.q.shape[-1] ** -0.5, causal=True,
            softcap=softcap,
        )  # fmt: skip
        return o.view(heads, -1, o.shape[-1]), lse.view(heads, -1)

    def check(self, variant: int = 0) -> None:
        o, lse = cpu.attend(self.call(), variant)
        assert o.isfinite().all()
        for i in range(len(self.lengths)):
            want_o, want_lse = self.truth(i)
            error = CODES if self.store.fmt.k.quantized or self.store.fmt.v.quantized else FLOATS
            assert (o[i] - want_o).norm() <= error * want_o.norm()
            assert torch.allclose(lse[i], want_lse, rtol=error / 2, atol=error / 2)


@native
@pytest.mark.parametrize("variant", range(len(cpu.variants())), ids=cpu.variants())
@pytest.mark.parametrize(
    "storages",
    [
        *((s, s) for s in ("f32", "bf16", "f16", "int8", "int4", "int2")),
        ("int8", "int4"), ("int4", "int2"), ("int2", "int8"), ("bf16", "int4"), ("int8", "f16"), ("f32", "int2"),
    ],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256), (20, 36)])
def test_every_storage_and_size_agrees_with_the_truth(
    variant: int, storages: tuple[str, str], dims: tuple[int, int]
) -> None:
    Paged(storages, dims).check(variant)


@native
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("storage", ["bf16", "int4"])
def test_every_group_of_queries_shares_a_row(group: int, storage: str) -> None:
    Paged((storage, storage), (64, 64), group=group, heads=3, bias=True).check()


@native
@pytest.mark.parametrize("size", [1, 3, 16, 32, 33, 80])
@pytest.mark.parametrize("storage", ["f16", "int2"])
def test_every_block_size_and_a_shift(size: int, storage: str) -> None:
    Paged((storage, storage), (32, 32), size=size, lengths=(1, 97, 40), bias=True, shift=640).check()


@native
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("storage", ["bf16", "int4"])
def test_one_long_sequence_is_split_over_threads(threads: int, storage: str) -> None:
    before = torch.get_num_threads()
    paged = Paged((storage, storage), (64, 64), heads=1, lengths=(9001,), size=32)
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            paged.check()
    finally:
        torch.set_num_threads(before)


@native
def test_callers_on_several_threads_do_not_disturb_each_other() -> None:
    paged = [Paged(("int8", "int8"), (64, 64), lengths=(3000, 700), size=32) for _ in range(3)]
    want = [cpu.attend(one.call()) for one in paged]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            o, lse = cpu.attend(paged[i].call())
            if not (torch.allclose(o, want[i][0], atol=1e-6) and torch.allclose(lse, want[i][1], atol=1e-6)):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@native
@pytest.mark.parametrize("length", [40, 4000])
def test_a_sequence_that_sees_nothing_weighs_nothing(length: int) -> None:
    paged = Paged(("bf16", "bf16"), (64, 64), lengths=(length, length), size=32)
    paged.bias[1] = HIDDEN
    o, lse = cpu.attend(paged.call())
    assert not o[1].any()
    assert lse[1].max() == torch.finfo(torch.float32).min
    assert torch.allclose(o[0], paged.truth(0)[0], atol=1e-5)


@native
def test_without_a_bias_everything_is_seen() -> None:
    paged = Paged(("int4", "int4"), (64, 64), lengths=(32, 32))
    seen, unbiased = cpu.attend(paged.call()), cpu.attend(replace(paged.call(), bias=None))
    assert all(torch.equal(a, b) for a, b in zip(seen, unbiased, strict=True))


@native
def test_nan_that_is_seen_is_not_hidden() -> None:
    paged = Paged(("bf16", "bf16"), (64, 64))
    paged.bias[1] = 0.0  # its unused slots hold NaN
    o, lse = cpu.attend(paged.call())
    assert o[0].isfinite().all()
    assert o[1].isnan().all()
    assert lse[1].isnan().all()


@native
def test_far_scores_neither_overflow_nor_vanish() -> None:
    paged = Paged(("f32", "f32"), (64, 64), lengths=(100, 64))
    paged.q *= 300
    o, lse = cpu.attend(paged.call())
    for i in range(2):
        want_o, want_lse = paged.truth(i)
        assert torch.allclose(o[i], want_o, atol=1e-2)
        assert torch.allclose(lse[i], want_lse, rtol=1e-5)


@native
@pytest.mark.parametrize("wrong", [-64, 1 << 40, -(1 << 62)])
def test_an_address_outside_of_the_arena_is_refused(wrong: int) -> None:
    paged = Paged(("int4", "int4"), (64, 64))
    paged.addr[1, 1, 0] = wrong
    with pytest.raises(ValueError, match="1 of 12 page addresses lie outside"):
        cpu.attend(paged.call())
    arena = paged.store.arena
    paged.addr[1, 1, 0] = arena.numel() - paged.store.fmt.page_bytes + 1
    with pytest.raises(ValueError, match="outside"):
        cpu.attend(paged.call())


@native
@pytest.mark.parametrize("storage", ["f32", "bf16", "int8", "int4", "int2"])
@pytest.mark.parametrize("lengths", [(21, 5), (97, 8, 40), (900, 17)])
def test_lists_that_end_early_see_the_pages_they_have(storage: str, lengths: tuple[int, ...]) -> None:
    paged = Paged((storage, storage), (64, 64), heads=1, lengths=lengths, bias=True)
    full = cpu.attend(paged.call())
    for i, length in enumerate(lengths):
        paged.addr[i, :, -(-length // SIZE) :] = -1
    call = replace(paged.call(), ragged=True)
    for got, even, want in zip(cpu.attend(call), cpu.attend(call.evened()), full, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
        assert torch.allclose(even, want, rtol=1e-5, atol=1e-5)


@native
def test_a_page_missing_inside_a_list_or_beside_another_is_refused() -> None:
    paged = Paged(("int4", "int4"), (64, 64), heads=1)
    paged.addr[0, 0, 1] = -1
    with pytest.raises(ValueError, match="1 of 6 page addresses lie outside"):
        cpu.attend(replace(paged.call(), ragged=True))
    beside = Paged(("int4", "int4"), (64, 64), heads=2)  # heads that are walked side by side
    beside.addr[0, 0, 2] = -1
    with pytest.raises(ValueError, match="1 of 12 page addresses lie outside"):
        cpu.attend(beside.call())


@native
def test_shapes_that_do_not_fit_are_refused() -> None:
    call = Paged(("int4", "int4"), (64, 64)).call()
    assert call.bias is not None
    for bad in ({"q": call.q[..., :32]}, {"addr": call.addr[:1]}, {"bias": call.bias[:, :-1]}):
        with pytest.raises(ValueError, match=r"do(es)? not fit"):
            cpu.attend(replace(call, **bad))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_implementations_agree(dtype: torch.dtype) -> None:
    paged = Paged(({v: k for k, v in DTYPES.items()}[dtype],) * 2, (64, 64))
    for i, length in enumerate(paged.lengths):  # a gathering implementation cannot hide NaN
        token = torch.arange(length, paged.bias.shape[1])
        addr = paged.addr[i][:, token // SIZE].reshape(-1)
        zero = torch.zeros(addr.numel(), 64, dtype=dtype)
        paged.store.write_rows(addr, (token % SIZE).repeat(2), zero, zero)
    call = paged.call()
    registry = full_registry()
    one, other = (impl.run(call) for impl in registry.implementations("attend_pages") if impl.name != "triton")
    assert registry.select("attend_pages", call).name == "native"
    assert one[0].dtype == other[0].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert torch.allclose(one[0], other[0], atol=tolerance)
    assert torch.allclose(one[1], other[1], atol=tolerance)


@native
def test_the_registry_tells_why_the_native_kernel_is_passed_over() -> None:
    call, registry = Paged(("int4", "int4"), (64, 64)).call(), full_registry()
    verdicts = dict(registry.explain("attend_pages", call))
    assert verdicts.pop("triton") == "needs tensors on a GPU, got cpu"
    assert verdicts == {"native": "chosen", "unpack": "'native' has precedence"}
    fmt = replace(call.fmt, k=replace(call.fmt.k, bits=8, group=3))
    reasons = {
        "16 groups of dims": replace(call, fmt=fmt),
        "gradients": replace(call, q=call.q.clone().requires_grad_()),
        "on the CPU": replace(call, q=call.q.to("meta")),
        "torch.float64": replace(call, dtype=torch.float64, fmt=replace(fmt, k=VectorFormat.raw(64, 8))),
    }
    for reason, refused in reasons.items():
        verdicts = dict(registry.explain("attend_pages", refused))
        assert reason in verdicts["native"]
        assert verdicts["unpack"] == "chosen"


def test_without_the_extension_torch_takes_over_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    call, registry = Paged(("int4", "int4"), (64, 64), lengths=(16,)).call(), full_registry()
    monkeypatch.setattr(cpu, "import_module", missing)
    forget = (cpu._load.cache_clear, cpu._layout.cache_clear)
    try:
        for clear in forget:
            clear()
        with caplog.at_level(logging.WARNING, logger="kvfold.kernels"):
            for _ in range(3):
                assert registry.select("attend_pages", call).name == "unpack"
        assert len(caplog.records) == 1
        assert "slower" in caplog.text
        assert "no kvfold.kernels.cpu._native" in str(cpu.available())
        assert cpu.variants() == ()
        o, _ = registry.select("attend_pages", call).run(call)
        assert o.isfinite().all()
        with pytest.raises(UnsupportedError, match="not there"):
            cpu.attend(call)
    finally:
        for clear in forget:
            clear()
