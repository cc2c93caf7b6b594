"""Hostile page tables, sizes and memory: the native kernel answers or raises ValueError, and reads no byte outside.

What is read outside of a tensor shows under `make sanitize`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.formats import BandFormat, PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.pages import HIDDEN, PagesCall

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=f"not built: {cpu.available()}")

INT64 = 2**63
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fuzz = settings(max_examples=150, deadline=None)


@st.composite
def formats(draw: Any) -> tuple[PageFormat, torch.dtype]:
    """A page of any kind of keys and any kind of values."""
    dtype = draw(st.sampled_from(DTYPES))
    channels = draw(st.integers(0, 5)) == 0

    def side(dim: int, kind: str) -> VectorFormat | BandFormat:
        if kind == "raw":
            return VectorFormat.raw(dim, dtype.itemsize)
        if kind == "bands":
            return BandFormat(dim=dim, bands=((8, dim // 8), (4, dim // 8 * 2), (2, dim // 8 * 4)))
        group = dim if channels else draw(st.sampled_from([dim, dim // 2]))
        scales = "channel" if channels else "token"
        return VectorFormat(dim=dim, bits=int(kind), quantized=True, group=group, rotation="none", scales=scales)

    kinds = st.sampled_from(["raw", "8", "4", "2"] if channels else ["raw", "8", "4", "2", "bands"])
    sides = [side(draw(st.sampled_from([32, 64, 96, 128])), draw(kinds)) for _ in range(2)]
    return PageFormat(draw(st.sampled_from([1, 3, 8, 16, 32, 33])), *sides), dtype


@dataclass
class Case:
    call: PagesCall
    page_bytes: int

    @property
    def inside(self) -> bool:
        """Whether every page lies in the arena, computed without overflow."""
        highest = self.call.arena.numel() - self.page_bytes
        return all(0 <= addr + self.call.shift <= highest for addr in self.call.addr.flatten().tolist())


@st.composite
def cases(draw: Any, *, hostile: bool) -> Case:
    """A call over an arena of random bytes (NaN and infinity among the numbers), without one byte to spare."""
    fmt, dtype = draw(formats())
    pages_in_arena = draw(st.integers(1, 6))
    arena_bytes = pages_in_arena * fmt.page_bytes
    n, heads, rows, pages = (draw(st.integers(low, high)) for low, high in ((1, 2), (1, 2), (1, 5), (0, 9)))
    highest = arena_bytes - fmt.page_bytes
    shift = draw(st.sampled_from([0, 0, 64, -64, highest, -highest]))
    good = st.integers(0, highest) | st.sampled_from([0, highest, highest // 64 * 64])
    addr = [draw(good) - shift for _ in range(n * heads * pages)]
    if hostile and addr:
        bad = st.integers(-INT64, INT64 - 1) | st.sampled_from([-1, highest + 1, arena_bytes, -INT64, INT64 - 1, 2**62])
        addr[draw(st.integers(0, len(addr) - 1))] = draw(bad)
        shift = draw(st.sampled_from([shift, shift, INT64 - 1, -INT64, 2**62, -(2**62)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    bias = None
    if draw(st.booleans()):
        bias = torch.where(torch.rand(n, pages * fmt.block_size, generator=generator) < 0.5, 0.0, HIDDEN)
    q = torch.randn(n, heads, rows, cpu_width(fmt.k), generator=generator)
    call = PagesCall(
        q=q, arena=torch.randint(0, 256, (arena_bytes,), dtype=torch.uint8, generator=generator),
        addr=torch.tensor(addr, dtype=torch.int64).view(n, heads, pages), shift=shift, fmt=fmt, dtype=dtype,
        scale=0.1, bias=bias, read=lambda part: pytest.fail("the native kernel reads pages itself"),
    )  # fmt: skip
    return Case(call, fmt.page_bytes)


def cpu_width(fmt: VectorFormat | BandFormat) -> int:
    return fmt.stored_dim if isinstance(fmt, BandFormat) else fmt.dim


@fuzz
@given(case=cases(hostile=True))
def test_a_page_outside_of_the_arena_is_an_error_before_anything_is_read(case: Case) -> None:
    if case.inside:
        cpu.attend(case.call)
        return
    for variant in range(len(cpu.variants())):
        with pytest.raises(ValueError, match=r"of \d+ page addresses lie outside of the arena of \d+ bytes"):
            cpu.attend(case.call, variant)


@fuzz
@given(case=cases(hostile=False))
def test_any_bytes_at_any_address_inside_give_an_answer(case: Case) -> None:
    """Wherever pages lie, whatever bits they hold; and where nothing is seen the answer is nothing."""
    call = case.call
    answers = [cpu.attend(call, variant) for variant in range(len(cpu.variants()))]
    nothing = call.addr.shape[-1] == 0 or (call.bias is not None and bool((call.bias == HIDDEN).all()))
    for o, lse in answers:
        assert o.shape == (*call.q.shape[:-1], cpu_width(call.fmt.v))
        assert lse.shape == call.q.shape[:-1]
        if nothing:
            assert not o.any()
            assert bool((lse == torch.finfo(torch.float32).min).all())


@fuzz
@given(case=cases(hostile=False), where=st.integers(1, 63))
def test_a_page_means_the_same_wherever_it_lies(case: Case, where: int) -> None:
    """Addresses need not be aligned, and a page may occur many times in a table."""
    call = case.call
    moved = replace(call, arena=torch.cat((torch.full((where,), 255, dtype=torch.uint8), call.arena)))
    moved = replace(moved, shift=call.shift + where)
    for variant in range(len(cpu.variants())):
        for one, other in zip(cpu.attend(call, variant), cpu.attend(moved, variant), strict=True):
            assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


def tensors() -> dict[str, Any]:
    """Arguments for the binding itself, over real but tiny memory, with sizes of one."""
    hold = [torch.zeros(64) for _ in range(4)]
    side = (0, 0, 4, 1, 16, 0, 0, [])
    native = import_module("kvfold.kernels.cpu._native")
    layout = native.make_layout(1, 64, side, side)
    address = [part.data_ptr() for part in hold]
    table = torch.zeros(1, dtype=torch.int64)
    return {
        "keep": (hold, table), "native": native, "layout": layout, "latent": False, "q": address[0],
        "arena": address[1], "arena_bytes": 64, "pages": table.data_ptr(), "shift": 0, "bias": 0, "out": address[2],
        "lse": address[3], "n": 1, "heads": 1, "rows": 1, "pages_per_seq": 1, "scale": 1.0, "softcap": 0.0,
        "threads": 1, "variant": 0,
    }  # fmt: skip


def raw_call(**changes: Any) -> None:
    arguments = tensors() | changes
    keep, native = arguments.pop("keep"), arguments.pop("native")
    native.attend_pages(*arguments.values())
    del keep


def test_the_binding_takes_sizes_that_make_sense() -> None:
    raw_call()
    for none in ("n", "heads", "rows"):
        raw_call(**{none: 0})


@pytest.mark.parametrize(
    "changes",
    [
        *({name: -1} for name in ("n", "heads", "rows", "pages_per_seq", "arena_bytes")),
        *({name: INT64 - 1} for name in ("n", "heads", "rows", "pages_per_seq", "arena_bytes")),
        {"n": 2**32, "heads": 2**32},  # their product is 0 in 64 bits
        {"n": 2**22, "heads": 2**22, "pages_per_seq": 2**22},
        {"arena_bytes": INT64 - 1, "shift": -INT64},
        {"arena_bytes": 0},
        {"shift": -INT64},
        {"shift": INT64 - 1},
        {"variant": 99},
    ],
    ids=str,
)
def test_the_binding_refuses_sizes_that_do_not(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"size|too large|outside|variant"):
        raw_call(**changes)


numbers = st.integers(-3, 300) | st.sampled_from([-INT64, INT64 - 1, 2**20, 2**20 + 1, 2**31, 2**40, 2**62])
bands = st.lists(st.tuples(st.sampled_from([8, 4, 2, 1, 0, -8]), numbers, numbers), max_size=20)
sides = st.tuples(st.integers(-1, 5), st.integers(-1, 5), numbers, numbers, numbers, numbers, numbers, bands)


@fuzz
@given(block_size=numbers, page_bytes=numbers, k=sides, v=sides)
def test_a_layout_makes_sense_or_is_refused(block_size: int, page_bytes: int, k: Any, v: Any) -> None:
    native = import_module("kvfold.kernels.cpu._native")
    with suppress(ValueError):
        native.make_layout(block_size, page_bytes, k, v)
