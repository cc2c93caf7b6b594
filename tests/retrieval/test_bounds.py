"""The bounds that pages carry hold for every query, whatever pages hold; choosing by them is choosing the greatest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold.codecs.pages import PageStore
from kvfold.codecs.summaries import outward, read_summaries, summarise
from kvfold.formats import BandFormat, PageFormat, VectorFormat
from kvfold.kernels import bounds, cpu
from kvfold.kernels.bounds import BoundsCall
from kvfold.kernels.catalog import full_registry
from kvfold.kernels.cpu import retrieval as native
from kvfold.kernels.reference import best_pages, page_bounds
from tests.test_native_rows import Twins, coded

HEADS, SIZE = 2, 8
BANDS = BandFormat(48, ((8, 8), (4, 8), (2, 20)))
RAW = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
needs_native = pytest.mark.skipif(cpu.available() is not None, reason=f"not built: {cpu.available()}")


def raw(dim: int, dtype: torch.dtype = torch.bfloat16) -> VectorFormat:
    return VectorFormat.raw(dim, RAW[dtype])


FORMATS: dict[str, tuple[VectorFormat | BandFormat, VectorFormat | BandFormat, torch.dtype]] = {
    "raw float32": (raw(20, torch.float32), raw(20, torch.float32), torch.float32),
    "raw bfloat16": (raw(64), raw(64), torch.bfloat16),
    "raw float16": (raw(64, torch.float16), raw(48, torch.float16), torch.float16),
    "int8": (coded(64, 8), coded(64, 8), torch.bfloat16),
    "int4": (coded(96, 4), coded(64, 4), torch.bfloat16),
    "int2": (coded(64, 2), coded(64, 2), torch.float32),
    "int4, no rotation, groups": (coded(64, 4, group=32, rotation="none"), coded(64, 4), torch.bfloat16),
    "k16v4": (raw(64), coded(64, 4), torch.bfloat16),
    "channels": (coded(64, 4, scales="channel"), coded(64, 4), torch.bfloat16),
    "bands": (BANDS, BANDS, torch.bfloat16),
}


def store_of(name: str, pages: int = 6, *, latent: bool = False) -> tuple[PageStore, Tensor]:
    """A store of ``pages`` pages of each head, in memory full of NaN, and the addresses ``[pages * HEADS]``, heads
    fastest.
    """
    k, v, dtype = FORMATS[name]
    fmt = PageFormat(SIZE, k, v, summary_dims=k.dim + (v.dim if latent else 0))
    stored = None
    if isinstance(k, BandFormat):
        stored = Twins.basis(k, HEADS, 1, 0), Twins.basis(k, HEADS, 1, 1)
    # Gaps between the pages, which nothing may touch.
    stride = fmt.page_bytes + 64
    arena = torch.full((pages * HEADS * stride,), 255, dtype=torch.uint8)
    store = PageStore(arena, fmt, dtype, bases=stored, heads=HEADS, layers=1)
    order = torch.randperm(pages * HEADS, generator=torch.Generator().manual_seed(0))
    return store, order * stride


def keys_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(shape, generator=generator)
    if kind == "outliers":
        x[..., 3] = x[..., 3] * 300 + 500
        x[..., 0, :] *= 40
    elif kind == "constant":
        x = torch.full(shape, -1.37)
    elif kind == "tiny":
        x = x * 1e-20
    elif kind == "one sign":
        x = x.abs() + 1e-3
    return x


def filled(name: str, kind: str, *, latent: bool = False, plain: bool = False) -> tuple[PageStore, Tensor]:
    store, addr = store_of(name, latent=latent)
    if plain:
        store._pages, store.native = store.plain, None
    k, v = (
        keys_of(kind, (addr.numel(), SIZE, side.dim)).clamp(-6e4, 6e4).to(store.dtype)
        for side in (store.fmt.k, store.fmt.v)
    )
    store.write_pages(addr, k, v, 0)
    summarise(store, addr, 0)
    return store, addr


def queries(dim: int) -> Tensor:
    """Random ones, single channels of both signs, and the signs of a corner."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(40, dim, generator=generator) * torch.logspace(-2, 2, 40)[:, None]
    return torch.cat((random, torch.eye(dim), -torch.eye(dim), random.sign(), torch.zeros(1, dim)))


@pytest.mark.parametrize("kind", ["normal", "outliers", "constant", "tiny", "one sign"])
@pytest.mark.parametrize("name", FORMATS)
def test_no_score_exceeds_the_bound_of_its_page(name: str, kind: str) -> None:
    store, addr = filled(name, kind)
    keys = store.decode_keys(addr, 0)
    found = read_summaries(store, addr).float()
    q = queries(keys.shape[-1])
    scores = torch.einsum("qd,psd->qps", q.double(), keys.double()).amax(-1)
    limit = torch.stack([page_bounds(x[None], found[:, 0].double(), found[:, 1].double()) for x in q])
    room = 1e-6 * torch.einsum("qd,pd->qp", q.double().abs(), keys.double().abs().amax(1))
    assert bool((scores <= limit + room).all())
    # No wider than rounding outward makes them.
    least, greatest = keys.aminmax(dim=1)
    assert bool((found[:, 0] >= least - least.abs() / 120 - 1e-37).all())
    assert bool((found[:, 1] <= greatest + greatest.abs() / 120 + 1e-37).all())


@pytest.mark.parametrize("name", ["raw bfloat16", "int4", "k16v4"])
def test_latent_pages_have_bounds_of_both_parts(name: str) -> None:
    store, addr = filled(name, "outliers", latent=True)
    keys = store.decode_keys(addr, 0, values=True)
    assert keys.shape[-1] == store.fmt.k.dim + store.fmt.v.dim
    least, greatest = outward(*keys.aminmax(dim=1))
    assert torch.equal(read_summaries(store, addr), torch.stack((least, greatest), dim=1))


@pytest.mark.parametrize("name", FORMATS)
def test_bounds_touch_their_region_alone_and_natively_or_not_mean_the_same(name: str) -> None:
    store, addr = filled(name, "normal")
    before = store.arena.clone()
    keys = store.decode_pages(addr, 0)
    fmt = store.fmt
    summarise(store, addr.flip(0).roll(HEADS), 0)
    assert torch.equal(store.arena, before) or name == "bands"  # heads in another order have other bases
    summarise(store, addr, 0)
    assert torch.equal(store.arena, before)
    inside = (addr[:, None] + torch.arange(fmt.summary_offset, fmt.summary_offset + fmt.summary_bytes)).flatten()
    store.arena[inside] = 255
    for mine, again in zip(keys, store.decode_pages(addr, 0), strict=True):
        assert torch.equal(mine, again)
    other, _ = filled(name, "normal", plain=True)
    mine, plain = (read_summaries(x, addr).float() for x in (filled(name, "normal")[0], other))
    assert torch.allclose(mine, plain, rtol=0.02, atol=1e-3 * float(mine.abs().max()))


def test_pages_that_are_not_there_are_left_out() -> None:
    store, addr = filled("int4", "normal")
    wanted = read_summaries(store, addr)
    store.arena.view(-1)[(addr[:, None] + torch.arange(store.fmt.summary_offset, store.fmt.page_bytes)).flatten()] = 255
    some = addr.clone()
    some[3] = some[7] = -1
    summarise(store, some, 0)
    summarise(store, torch.full_like(addr, -1), 0)
    found = read_summaries(store, addr)
    there = some >= 0
    assert torch.equal(found[there], wanted[there])
    assert bool(found[~there].isnan().all())


def test_rounding_goes_outward() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4000)
    low, high = outward(x, x)
    assert bool((low.float() <= x).all())
    assert bool((high.float() >= x).all())
    assert bool(((high.float() - low.float()) <= x.abs() / 120).all())
    whole = x.to(torch.bfloat16)
    assert all(torch.equal(y, whole) for y in outward(whole.float(), whole.float()))
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38])
    low, high = outward(ends, ends)
    assert low[2].isnan()
    assert high[2].isnan()
    assert high[3] == torch.inf
    assert low[4] == -torch.inf
    assert (low[0], high[1]) == (torch.inf, -torch.inf)


def test_a_page_without_retrieval_is_what_it_was() -> None:
    for k, v, _ in FORMATS.values():
        plain, wide = PageFormat(SIZE, k, v), PageFormat(SIZE, k, v, summary_dims=k.dim)
        assert plain.summary_bytes == 0
        assert wide.summary_offset >= plain.v_meta_offset
        assert wide.summary_offset + 4 * k.dim <= wide.page_bytes
        assert wide.page_bytes - plain.page_bytes <= 4 * k.dim + 64 + 15
        names = ("k_codes_offset", "k_meta_offset", "v_codes_offset", "v_meta_offset")
        assert all(getattr(plain, name) == getattr(wide, name) for name in names)
    with pytest.raises(ValueError, match="a summary has the dims of keys, 64"):
        PageFormat(SIZE, coded(64, 4), coded(64, 4), summary_dims=48)


# == choosing


def call_of(store: PageStore, addr: Tensor, *, n: int = 1, group: int = 3, seed: int = 2, **changes: Any) -> BoundsCall:
    """``n`` sequences whose heads read all pages, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    pages = addr.view(-1, HEADS).T
    lists = torch.stack([pages[:, torch.randperm(pages.shape[1], generator=generator)] for _ in range(n)])
    q = torch.randn(n, HEADS, group, store.fmt.summary_dims, generator=generator)
    call = BoundsCall(q, store.arena, lists.contiguous(), 0, store.fmt, 0.25, partial(read_summaries, store))
    return replace(call, **changes)


def wanted_bounds(call: BoundsCall) -> Tensor:
    """The truth, page by page."""
    found = torch.full(call.addr.shape, -torch.inf)
    for place in (call.addr >= 0).nonzero().tolist():
        n, head, page = place
        ends = call.read(call.addr[n, head, page] + call.shift).float()
        logit = page_bounds(call.q[n, head], ends[:1], ends[1:])[0] * call.scale
        if call.softcap is not None:
            logit = torch.tanh(logit / call.softcap) * call.softcap
        found[n, head, page] = logit + (0 if call.bias is None else call.bias[n, head, page])
    return found


def variants() -> list[Any]:
    builds = [pytest.param(i, id=name, marks=needs_native) for i, name in enumerate(cpu.variants())]
    return [pytest.param(None, id="torch"), *builds]


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("name", ["raw float32", "raw bfloat16", "int4", "bands"])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_bounds_and_choice_are_those_of_the_reference(variant: int | None, name: str, group: int) -> None:
    store, addr = filled(name, "normal")
    call = call_of(store, addr, n=3, group=group)
    call.addr[1, 0, 4:] = -1
    call.addr[2, 1, 1] = -1
    biases = torch.randn(call.addr.shape, generator=torch.Generator().manual_seed(3))
    run = bounds.bound if variant is None else partial(native.bound, variant=variant)
    choose = bounds.choose if variant is None else partial(native.choose, variant=variant)
    for case in (call, replace(call, bias=biases), replace(call, softcap=2.0, bias=biases)):
        found, wanted = run(case), wanted_bounds(case)
        assert torch.equal(found == -torch.inf, wanted == -torch.inf)
        there = wanted > -torch.inf
        assert torch.allclose(found[there], wanted[there], rtol=1e-5, atol=1e-5)
        for count in (1, 3, 6, 9):
            chosen = choose(replace(case, pages=count))
            assert chosen.shape[-1] == min(count, 6)
            for where in ((n, h) for n in range(3) for h in range(HEADS)):
                row, have = chosen[where], int(there[where].sum())
                best = best_pages(found[where], min(count, have))
                assert row[: best.numel()].tolist() == best.tolist()
                assert bool((row[best.numel() :] == -1).all())


@pytest.mark.parametrize("variant", variants())
def test_of_equal_bounds_the_first_are_chosen(variant: int | None) -> None:
    store, addr = filled("raw bfloat16", "constant")
    choose = bounds.choose if variant is None else partial(native.choose, variant=variant)
    call = call_of(store, addr, pages=4)
    assert choose(call).tolist() == [[[0, 1, 2, 3]] * HEADS]
    call.addr[0, 0, 1] = -1
    assert choose(call)[0, 0].tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("variant", variants())
def test_what_is_no_number_is_read(variant: int | None) -> None:
    store, addr = filled("raw bfloat16", "normal")
    call = call_of(store, addr, pages=1)
    broken = call.addr[0, 1, 2].view(1)
    store.write_rows(broken, torch.zeros(1, dtype=torch.int64), *(torch.full((1, 64), torch.nan).bfloat16(),) * 2)
    summarise(store, broken, None)
    choose = bounds.choose if variant is None else partial(native.choose, variant=variant)
    run = bounds.bound if variant is None else partial(native.bound, variant=variant)
    assert choose(call)[0, 1].tolist() == [2]
    assert int(run(call).isinf().sum()) == 1
    everywhere = replace(call, q=call.q * torch.nan)
    assert bool((run(everywhere) == torch.inf).all())


@needs_native
def test_the_registry_takes_the_native_way_and_many_pages_on_many_threads() -> None:
    registry = full_registry()
    store, addr = store_of("int4", pages=700)
    k, v = (keys_of("normal", (addr.numel(), SIZE, side.dim)).bfloat16() for side in (store.fmt.k, store.fmt.v))
    store.write_pages(addr, k, v, 0)
    summarise(store, addr, 0)
    for n, group in ((1, 4), (3, 16)):
        call = call_of(store, addr, n=n, group=group, pages=90)
        chosen = registry.select("choose_pages", call)
        assert chosen.name == "native"
        found = registry.select("bound_pages", call).run(call)
        assert torch.allclose(found, bounds.bound(call), rtol=1e-5, atol=1e-5)
        assert torch.equal(chosen.run(call), bounds.top(found, 90))


@needs_native
def test_hostile_tables_are_refused() -> None:
    store, addr = filled("int4", "normal")
    call = call_of(store, addr, pages=2)
    for wrong in (-2, -(2**63), 2**62, store.arena.numel() - store.fmt.summary_offset):
        bad = call.addr.clone()
        bad[0, 1, 3] = wrong
        with pytest.raises(ValueError, match="outside of the arena"):
            native.choose(replace(call, addr=bad))
    for shift in (-(2**62), 2**62, store.arena.numel()):
        with pytest.raises(ValueError, match=r"outside of the arena|too large"):
            native.bound(replace(call, shift=shift))
    with pytest.raises(ValueError, match="do not fit"):
        native.bound(replace(call, q=call.q[..., :-1]))
    with pytest.raises(ValueError, match="biases"):
        native.bound(replace(call, bias=torch.zeros(1, HEADS, 2)))
    assert native.bound(replace(call, addr=call.addr[..., :0])).shape == (1, HEADS, 0)
    assert native.choose(replace(call, addr=call.addr[..., :0])).shape == (1, HEADS, 0)
    assert native.choose(replace(call, pages=0)).shape == (1, HEADS, 0)
