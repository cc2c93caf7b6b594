"""The banded code keeps its law for any rows, in any dtype and shape, and its pages hold what was written."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.codecs.banded import decode, encode
from kvfold.codecs.calibrated import CalibratedBasis
from kvfold.codecs.pages import PageStore, seal, unseal
from kvfold.formats import BandFormat, PageFormat, VectorFormat

DIMS = {8: (1, 3, 16), 4: (2, 8, 10), 2: (4, 8, 20)}
"""Dims that fill whole bytes at each width."""

FORMATS = [
    BandFormat(64, tuple(zip(widths, dims, strict=True)))
    for count in (1, 2, 3)
    for widths in itertools.combinations((8, 4, 2), count)
    for dims in itertools.product(*(DIMS[bits] for bits in widths))
]
SOME = FORMATS[:: len(FORMATS) // 12]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits_of(fmt: BandFormat) -> Tensor:
    """The width of each kept dim, as float64."""
    return torch.tensor([bits for bits, dims in fmt.bands for _ in range(dims)], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_law(x: Tensor, fmt: BandFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes and meta have their shapes, and what comes back lies within the promised error; the meta."""
    codes, meta = encode(x, fmt)
    assert codes.dtype == meta.dtype == torch.uint8
    assert codes.shape == (*x.shape[:-1], fmt.code_bytes)
    assert meta.shape == (*x.shape[:-1], fmt.meta_bytes)
    back = decode(codes, meta, fmt, dtype)
    assert back.dtype == dtype
    assert back.shape == x.shape
    wide, bits = x.double(), bits_of(fmt)
    stretch = torch.exp2(meta.double() / 8)
    outside = wide.abs() > stretch * 2 ** (bits - 1)
    allowed = stretch * (0.5 + outside * 2**bits / 8)
    # The stretch is chosen, and codes are rounded, in float32.
    narrow, wide_eps = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    rounding = 2 * narrow * (wide.abs() + stretch) + 16 * wide_eps * (wide.abs() + stretch * 2**bits)
    assert ((wide - back.double()).abs() <= allowed + rounding).all()
    return meta


# == the law


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: "+".join(f"{dims}x{bits}" for bits, dims in fmt.bands))
def test_the_law_holds_for_every_combination_of_bands(fmt: BandFormat) -> None:
    scale = 2 ** (bits_of(fmt) - 2)
    for factor in (0.01, 0.5, 1.0, 3.0, 1000.0):
        assert_law((normal(40, fmt.stored_dim) * scale * factor).float(), fmt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", SOME, ids=str)
def test_the_law_holds_in_every_dtype(fmt: BandFormat, dtype: torch.dtype) -> None:
    scale = (2 ** (bits_of(fmt) - 2)).float()
    assert_law((normal(50, fmt.stored_dim) * scale * 2).to(dtype), fmt, dtype)


numbers = st.floats(-(2.0**30), 2.0**30, width=32)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(SOME))
def test_the_law_holds_for_any_finite_numbers(data: st.DataObject, fmt: BandFormat) -> None:
    row = st.lists(numbers, min_size=fmt.stored_dim, max_size=fmt.stored_dim)
    assert_law(torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3))), fmt)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (2, 3), (1, 2, 3, 5)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    fmt = BandFormat(32, ((8, 3), (4, 6), (2, 4)))
    x = normal(*shape, fmt.stored_dim)
    assert_law(x, fmt)
    codes, meta = encode(x, fmt)
    flat_codes, flat_meta = encode(x.reshape(-1, fmt.stored_dim), fmt)
    assert torch.equal(codes.reshape(-1, fmt.code_bytes), flat_codes)
    assert torch.equal(meta.reshape(-1, 1), flat_meta)


def test_rows_that_are_not_contiguous() -> None:
    fmt = BandFormat(32, ((8, 8), (2, 8)))
    x = normal(16, 40).T
    for mine, other in zip(encode(x, fmt), encode(x.contiguous(), fmt), strict=True):
        assert torch.equal(mine, other)


def test_codes_of_a_row_do_not_depend_on_other_rows() -> None:
    fmt = BandFormat(32, ((8, 8), (4, 8), (2, 8)))
    x = normal(30, 24) * 20
    together = encode(x, fmt)
    for i in range(30):
        for mine, other in zip(encode(x[i : i + 1], fmt), together, strict=True):
            assert torch.equal(mine[0], other[i])
    assert all(torch.equal(a, b) for a, b in zip(encode(x, fmt), together, strict=True))


# == the stretch


def test_almost_all_rows_are_not_stretched() -> None:
    fmt = BandFormat(64, ((4, 64),))
    # A Gaussian's best steps of 4 bits are a third of its deviation.
    assert float((assert_law(normal(2000, 64) * 3, fmt) > 0).float().mean()) < 0.1


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_row_is_stretched_only_beyond_its_room(bits: int) -> None:
    fmt = BandFormat(8, ((bits, 8),))
    end = 2.0 ** (bits - 1)  # the outermost code stands for half a step beyond it
    x = torch.zeros(4, 8)
    x[:, 3] = torch.tensor([end, -1.25 * end, 1.26 * end, -2.5 * end])
    codes, meta = encode(x, fmt)
    assert meta.flatten().tolist() == [0, 0, 1, 8]
    back = decode(codes, meta, fmt, torch.float32)[:, 3]
    assert back[:2].tolist() == [end - 0.5, 0.5 - end]
    assert back[3] == 2 * (0.5 - end)
    assert_law(x, fmt)


def test_the_tightest_band_sets_the_stretch() -> None:
    fmt = BandFormat(32, ((8, 8), (2, 8)))
    x = torch.zeros(2, 16)
    x[0, 0], x[1, 15] = 100, 100
    meta = assert_law(x, fmt)
    assert meta.flatten().tolist() == [0, 43]  # 2 ** (43 / 8) * 2.5 is just above 100


def test_larger_numbers_stretch_no_less() -> None:
    fmt = BandFormat(16, ((4, 16),))
    x = torch.full((300, 16), 1.0) * torch.logspace(-3, 9, 300)[:, None]
    meta = assert_law(x, fmt).flatten().int()
    assert bool((meta.diff() >= 0).all())
    assert bool((meta.diff() <= 2).all())


def test_zero_is_half_a_step_from_a_code() -> None:
    fmt = BandFormat(24, ((8, 8), (4, 8), (2, 8)))
    codes, meta = encode(torch.zeros(1, 24), fmt)
    assert not meta.any()
    assert decode(codes, meta, fmt, torch.float32).abs().tolist() == [[0.5] * 24]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_codes_come_back_exactly(dtype: torch.dtype) -> None:
    fmt = BandFormat(24, ((8, 8), (4, 8), (2, 8)))
    x = torch.cat([(torch.arange(256)[:, None] % 2**b).expand(256, 8) - (2**b - 1) / 2 for b in (8, 4, 2)], dim=1)
    codes, meta = encode(x.to(dtype), fmt)
    assert torch.equal(decode(codes, meta, fmt, dtype), x.to(dtype))


# == what is not finite


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**40])
def test_a_row_that_is_not_finite_is_nan_and_alone(bad: float, dtype: torch.dtype) -> None:
    fmt = BandFormat(32, ((8, 8), (4, 8), (2, 8)))
    x = normal(5, 24).to(dtype)
    clean = encode(x, fmt)
    x[2, 17] = bad
    codes, meta = encode(x, fmt)
    assert meta.flatten().tolist()[2] == 255
    back = decode(codes, meta, fmt, dtype)
    assert back[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(codes[others], clean[0][others])
    assert back[others].isfinite().all()


def test_every_byte_decodes_to_something() -> None:
    fmt = BandFormat(24, ((8, 8), (4, 8), (2, 8)))
    codes = torch.randint(0, 256, (256, fmt.code_bytes), generator=torch.Generator().manual_seed(0)).byte()
    back = decode(codes, torch.arange(256).byte()[:, None], fmt, torch.float32)
    assert back[:255].isfinite().all()
    assert back[255].isnan().all()


# == in pages


def store(arena: Tensor, fmt: PageFormat, layers: int, heads: int, dtype: torch.dtype = torch.float32) -> PageStore:
    """Packed pages whose bases keep the first dims of a random orthogonal basis."""
    bases = []
    for seed, side in enumerate((fmt.k, fmt.v)):
        assert isinstance(side, BandFormat)
        basis = torch.linalg.qr(normal(layers, heads, side.dim, side.dim, seed=seed))[0]
        kept = basis[..., : side.stored_dim]
        mean = normal(layers, heads, side.dim, seed=seed + 2) * (side is fmt.k)
        bases.append(CalibratedBasis(kept * 20, kept.mT / 20, mean))
    return PageStore(arena, fmt, dtype, bases=(bases[0], bases[1]), heads=heads, layers=layers)


# Seventeen bytes of codes a token, and blocks of odd length: regions that no wide integer divides.
ODD = PageFormat(7, BandFormat(24, ((8, 13), (4, 6), (2, 4))), BandFormat(16, ((8, 9), (4, 6))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 7, 32])
def test_pages_of_odd_bytes_hold_what_is_written(block_size: int, dtype: torch.dtype) -> None:
    fmt = PageFormat(block_size, ODD.k, ODD.v)
    assert fmt.k.code_bytes == 17
    layers, heads, blocks = 3, 5, 4
    arena = torch.full((fmt.page_bytes * 100,), 255, dtype=torch.uint8)
    pages = store(arena, fmt, layers, heads, dtype)
    addr = torch.randperm(100, generator=torch.Generator().manual_seed(0))[: blocks * layers * heads] * fmt.page_bytes
    by_layer = addr.view(blocks, layers, heads)
    k, v = normal(addr.numel(), block_size, 24).to(dtype), normal(addr.numel(), block_size, 16, seed=1).to(dtype)
    pages.write_pages(addr, k, v)
    whole = arena.clone()
    arena.fill_(255)
    for layer in range(layers):  # the same, layer by layer and token by token
        rows = (
            k.view(blocks, layers, heads, block_size, 24)[:, layer],
            v.view(blocks, layers, heads, block_size, 16)[:, layer],
        )
        for slot in range(block_size):
            at = by_layer[:, layer].reshape(-1)
            pages.write_rows(
                at,
                torch.full_like(at, slot),
                rows[0][:, :, slot].flatten(0, 1),
                rows[1][:, :, slot].flatten(0, 1),
                layer,
            )
    for read in ("read_k", "read_v"):
        mine = getattr(pages, read)(addr)
        other = getattr(store(whole, fmt, layers, heads, dtype), read)(addr)
        assert torch.equal(mine, other)
        assert mine.isfinite().all()
    found = pages.decode_pages(addr)
    for layer in range(layers):
        alone = pages.decode_pages(by_layer[:, layer].reshape(-1), layer)
        for mine, other, dim in zip(alone, found, (24, 16), strict=True):
            wanted = other.view(blocks, layers, heads, block_size, dim)[:, layer].flatten(0, 1)
            assert torch.allclose(mine, wanted, atol=1e-6)


def test_what_is_read_is_what_the_basis_and_the_code_say() -> None:
    fmt = PageFormat(5, BandFormat(16, ((8, 16),)), BandFormat(16, ((8, 8), (4, 8))))
    arena = torch.zeros(fmt.page_bytes * 8, dtype=torch.uint8)
    pages = store(arena, fmt, layers=2, heads=2)
    addr = torch.arange(4) * fmt.page_bytes
    k, v = normal(4, 5, 16), normal(4, 5, 16, seed=1)
    pages.write_pages(addr, k, v)
    back_k, back_v = pages.decode_pages(addr)
    assert float((back_k - k).abs().max()) < 16**0.5 / 20 / 2  # half a step of 1/20 in each of 16 directions
    assert float((back_v - v).abs().max()) < 0.5
    q = normal(4, 16, seed=2)
    for layer in range(2):
        turned = pages.k_basis.query(q, layer)
        stored = pages.read_k(addr.view(2, 2)[layer]).view(2, 5, 16)
        lacking = pages.k_basis.offset(q, layer)
        assert lacking is not None
        scores = (turned.view(2, 2, 1, 16) * stored[:, None]).sum(-1) + lacking.view(2, 2, 1)
        plain = (q.view(2, 2, 1, 16) * back_k.view(2, 2, 5, 16)[layer][:, None]).sum(-1)
        assert torch.allclose(scores, plain, atol=1e-4)
        values = pages.read_v(addr.view(2, 2)[layer]).view(2, 5, 16)
        out = pages.v_basis.output(values.mean(1).repeat_interleave(2, 0), layer)
        assert pages.v_basis.offset(q, layer) is None
        assert torch.allclose(out, back_v.view(2, 2, 5, 16)[layer].mean(1).repeat_interleave(2, 0), atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 40])
def test_seal_and_unseal_go_through_many_parts(blocks: int) -> None:
    layers, heads = 3, 11  # 33 pages a block: the work is cut into whole blocks, though 8192 / 7 is no multiple
    dim, size = 16, 7
    raw = PageFormat(size, VectorFormat.raw(dim, 4), VectorFormat.raw(dim, 4))
    fmt = PageFormat(size, BandFormat(dim, ((8, 16),)), BandFormat(dim, ((8, 16),)))
    count = blocks * layers * heads
    arena = torch.zeros(2 * count * (raw.page_bytes + fmt.page_bytes), dtype=torch.uint8)
    raws = PageStore(arena, raw, torch.float32, heads=heads, layers=layers)
    packed = store(arena, fmt, layers, heads)
    first = torch.arange(count) * raw.page_bytes
    second = count * raw.page_bytes + torch.arange(count) * fmt.page_bytes
    third = second[-1] // 64 * 64 + fmt.page_bytes + first
    k, v = normal(count, size, dim), normal(count, size, dim, seed=1)
    raws.write_pages(first, k, v)
    seal(raws, first, packed, second)
    unseal(packed, second, raws, third)
    for mine, other in zip(raws.decode_pages(third), (k, v), strict=True):
        assert float((mine - other).abs().max()) < 16**0.5 / 20 / 2


def test_no_pages_at_all() -> None:
    pages = store(torch.zeros(ODD.page_bytes * 4, dtype=torch.uint8), ODD, 2, 2)
    none = torch.zeros(0, dtype=torch.int64)
    assert pages.read_k(none).shape == (0, ODD.k.stored_dim)
    assert pages.read_v(none.view(2, 0)).shape == (2, 0, ODD.v.stored_dim)
    assert [x.shape for x in pages.decode_pages(none)] == [(0, 7, 24), (0, 7, 16)]
    pages.write_pages(none, torch.zeros(0, 7, 24), torch.zeros(0, 7, 16))
    pages.write_rows(none, none, torch.zeros(0, 24), torch.zeros(0, 16), 1)
    pages.copy_rows(none, none, none, none)


def test_copied_rows_keep_their_stretch() -> None:
    arena = torch.zeros(ODD.page_bytes * 4, dtype=torch.uint8)
    pages = store(arena, ODD, 1, 1)
    addr = torch.arange(2) * ODD.page_bytes
    k, v = normal(2, 7, 24) * torch.logspace(0, 3, 7)[:, None], normal(2, 7, 16)
    pages.write_pages(addr, k, v)
    target = addr + 2 * ODD.page_bytes
    slots = torch.tensor([6, 2])
    pages.copy_rows(addr, slots, target, torch.tensor([0, 5]))
    for read in (pages.read_k, pages.read_v):
        before, after = read(addr[:, None]), read(target[:, None])
        assert torch.equal(after[0, 0], before[0, 6])
        assert torch.equal(after[1, 5], before[1, 2])


def test_banded_pages_without_a_basis_are_refused() -> None:
    with pytest.raises(TypeError, match="basis"):
        PageStore(torch.zeros(ODD.page_bytes, dtype=torch.uint8), ODD, torch.float32)
