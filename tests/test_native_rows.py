"""The native write path against the codecs in plain torch: the same bits where the arithmetic is the same, the same law
everywhere, and no byte touched that is not its own.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvfold.codecs import affine, channels
from kvfold.codecs.calibrated import CalibratedBasis
from kvfold.codecs.pages import PageStore, copy_blocks, seal, unseal, zero_blocks
from kvfold.codecs.rotation import Rotation
from kvfold.formats import BandFormat, PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.cpu.rows import row_variants
from kvfold.kernels.runs import TokenRuns

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VARIANTS = row_variants()
BANDS = BandFormat(48, ((8, 7), (4, 10), (2, 20)))
EVERY_DIM = [1, 7, 20, 64, 80, 96, 100, 128, 192, 256, 576]

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=f"not built: {cpu.available()}")
every_variant = pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)


def coded(dim: int, bits: int, *, group: int = 1024, rotation: str = "hadamard", scales: str = "token") -> VectorFormat:
    return VectorFormat(dim, bits, True, group, rotation, scales)  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Twins:
    """The same pages twice, in arenas full of NaN: moved natively in one, by plain torch in the other."""

    def __init__(
        self, k: VectorFormat | BandFormat, v: VectorFormat | BandFormat, dtype: torch.dtype = torch.bfloat16, *,
        size: int = 8, pages: int = 6, heads: int = 1, layers: int = 1, variant: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        fmt = PageFormat(size, k, v)
        generator = torch.Generator().manual_seed(seed)
        gaps = torch.randint(0, 3, (pages,), generator=generator) * 64
        places = torch.cumsum(gaps + fmt.page_bytes, 0) - fmt.page_bytes
        self.addr = places[torch.randperm(pages, generator=generator)]
        self.fmt, self.dtype, self.size = fmt, dtype, size
        bases = None
        if isinstance(k, BandFormat) and isinstance(v, BandFormat):
            bases = tuple(self.basis(side, heads, layers, i) for i, side in enumerate((k, v)))
        length = int(places[-1]) + fmt.page_bytes
        self.native, self.plain = (
            PageStore(
                torch.full((length,), 255, dtype=torch.uint8), fmt, dtype, bases=bases, heads=heads, layers=layers
            )  # type: ignore[arg-type]
            for _ in range(2)
        )
        assert self.native.native is not None
        self.native.native._variant = variant
        self.plain._pages, self.plain.native = self.plain.plain, None

    @staticmethod
    def basis(side: BandFormat, heads: int, layers: int, seed: int) -> CalibratedBasis:
        matrix = torch.linalg.qr(normal(layers, heads, side.dim, side.dim, seed=seed))[0][..., : side.stored_dim]
        mean = normal(layers, heads, side.dim, seed=seed + 2) * (seed == 0)
        return CalibratedBasis(matrix * 6, matrix.mT / 6, mean)

    def rows(self, *lead: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Rows of very different sizes and offsets."""
        k, v = (normal(*lead, side.dim, seed=seed + i) for i, side in enumerate((self.fmt.k, self.fmt.v)))
        sizes = 10.0 ** torch.randint(-3, 2, (*lead, 1), generator=torch.Generator().manual_seed(seed))
        return (k * sizes + 0.3 * sizes).to(self.dtype), (v * sizes - 2 * sizes).to(self.dtype)

    def both(self, method: str, *args: object) -> tuple[object, object]:
        return getattr(self.native, method)(*args), getattr(self.plain, method)(*args)

    def same_bits(self) -> bool:
        return torch.equal(self.native.arena, self.plain.arena)

    def same_law(self, share: float = 0.9) -> None:
        """Where sums run in another order: the same bytes are written, most of them the same, all numbers near."""
        mine, other = self.native.arena, self.plain.arena
        assert float((mine == other).float().mean()) >= share
        untouched = (other == 255) & (mine == 255)
        assert torch.equal(mine[self.gaps()], other[self.gaps()])
        assert bool(untouched[self.gaps()].all())
        for read, side in (("read_k", self.fmt.k), ("read_v", self.fmt.v)):
            found, wanted = (x.float() for x in (getattr(s.plain, read)(self.addr) for s in (self.native, self.plain)))
            assert torch.equal(found.isnan(), wanted.isnan())
            whole = wanted.isfinite()
            if not side.quantized:
                assert torch.equal(found[whole], wanted[whole])
                continue
            # A step of a row is at most its range over the levels (of 2 bits, 2 ** 2 - 1); two may tip either way.
            rows = torch.where(whole, wanted, 0.0)
            bits = side.bits if isinstance(side, VectorFormat) else 2
            width = rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True)
            if isinstance(side, VectorFormat) and not side.movable:
                width = width.amax()
            room = 2.2 * width / (2**bits - 1) + 0.02 * rows.abs().amax(-1, keepdim=True)
            assert bool(((found - wanted).abs() <= room)[whole].all())

    def gaps(self) -> Tensor:
        mask = torch.ones(self.native.arena.numel(), dtype=torch.bool)
        for page in self.addr.tolist():
            for side, codes, meta in (
                (self.fmt.k, self.fmt.k_codes_offset, self.fmt.k_meta_offset),
                (self.fmt.v, self.fmt.v_codes_offset, self.fmt.v_meta_offset),
            ):
                mask[page + codes : page + codes + self.size * side.code_bytes] = False
                if side.quantized:
                    mask[page + meta : page + meta + side.page_meta_bytes(self.size)] = False
        return mask


# == into pages


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", EVERY_DIM)
@pytest.mark.parametrize("group", [1024, 33])
def test_values_without_rotation_have_the_same_bits(variant: int, dtype: torch.dtype, dim: int, group: int) -> None:
    for bits in (8, 4, 2):
        twins = Twins(VectorFormat.raw(dim, dtype.itemsize), coded(dim, bits, group=group, rotation="none"), dtype,
                      variant=variant)  # fmt: skip
        twins.both("write_pages", twins.addr[:3], *twins.rows(3, 8))
        slot = torch.tensor([7, 0, 3, 2])
        twins.both("write_rows", twins.addr[3:][[0, 0, 1, 2]], slot, *twins.rows(4, seed=5))
        assert twins.same_bits()


@every_variant
@pytest.mark.parametrize("dim", EVERY_DIM)
def test_keys_and_rotated_rows_keep_the_law(variant: int, dim: int) -> None:
    for bits in (8, 4, 2):
        for group in (1024, 16):
            twins = Twins(coded(dim, bits, group=group), coded(dim, bits, group=group), variant=variant, size=9)
            twins.both("write_pages", twins.addr[:4], *twins.rows(4, 9))
            twins.both("write_rows", twins.addr[4:], torch.tensor([8, 0]), *twins.rows(2, seed=3))
            twins.same_law()


@every_variant
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", [1024, 32])
def test_encoded_rows_lie_within_their_bound(variant: int, bits: int, group: int) -> None:
    """The law itself, by the scales that were stored: nothing here is taken from the other implementation's codes."""
    twins = Twins(VectorFormat.raw(80, 4), coded(80, bits, group=group), torch.float32, variant=variant, pages=40)
    k, v = twins.rows(40, 8)
    store = twins.native
    store.write_pages(twins.addr, k, v)
    turned = store.v_basis.store(v, 0)
    found = store.plain.v.read(twins.addr, torch.float32).view_as(v)
    assert store.plain.v.meta is not None
    meta = store.plain.v.meta.pages.take(twins.addr).view(torch.bfloat16).view(40, 8, -1, 2)
    bound = affine.error_bound(meta, twins.fmt.v) * (1 + 2.0**-12)  # type: ignore[arg-type]
    assert bool(((found - turned).abs() <= bound + turned.abs() * 2.0**-20).all())


@every_variant
@pytest.mark.parametrize("dim", [20, 64, 100, 128])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_scales_of_channels(variant: int, dim: int, rotation: str) -> None:
    for bits in (8, 4, 2):
        side = coded(dim, bits, rotation=rotation, scales="channel")
        twins = Twins(side, side, variant=variant, size=33)
        twins.both("write_pages", twins.addr[:4], *twins.rows(4, 33))
        if rotation == "none":
            assert twins.same_bits()
        twins.same_law()


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banded_pages_of_each_head_have_its_matrix(variant: int, dtype: torch.dtype) -> None:
    twins = Twins(BANDS, replace(BANDS, bands=((4, 46),)), dtype, heads=3, layers=2, pages=12, variant=variant)
    twins.both("write_pages", twins.addr[:6], *twins.rows(6, 8))
    twins.both("write_rows", twins.addr[6:], torch.arange(6), *twins.rows(6, seed=9), 1)
    twins.same_law()
    for mine, other in zip(*twins.both("decode_pages", twins.addr[:6]), strict=True):  # type: ignore[call-overload]
        assert float((mine.float() - other.float()).abs().max()) <= 0.5 * float(other.float().abs().max())


@every_variant
@pytest.mark.parametrize("bands", [((8, 9), (4, 6)), ((2, 32),), ((4, 40),), ((8, 48),)], ids=str)
def test_banded_codes_and_stretches_have_the_same_bits(variant: int, bands: tuple[tuple[int, int], ...]) -> None:
    """With matrices that only pick dims: sums of one number have no order."""
    fmt = BandFormat(48, bands)
    twins = Twins(fmt, fmt, torch.float32, pages=40, variant=variant)
    pick = torch.eye(48)[:, : fmt.stored_dim]
    for store in (twins.native, twins.plain):
        store.k_basis = store.v_basis = CalibratedBasis(
            pick[None, None].clone(), pick.T[None, None].clone(), torch.zeros(1, 1, 48)
        )
        store.native = None
        store.rebind(store.arena)
    assert twins.native.native is not None
    twins.native.native._variant = variant
    twins.plain._pages = twins.plain.plain
    k, v = twins.rows(40, 8)
    k *= torch.logspace(-2, 9, 320).view(40, 8, 1)
    v[3, 4, 2], v[5, 0, 0], v[7, 1, 5] = torch.inf, torch.nan, 2.0**40
    twins.both("write_pages", twins.addr, k, v)
    assert twins.same_bits()
    assert bool(twins.native.read_v(twins.addr).view(40, 8, -1)[3, 4].isnan().all())


@every_variant
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_number_that_is_not_finite_is_seen_and_alone(variant: int, bad: float, bits: int) -> None:
    side = coded(72, bits, group=36, rotation="none")
    twins = Twins(side, side, torch.float32, variant=variant)
    rows = twins.rows(6, 8)
    twins.native.write_pages(twins.addr, *rows)
    clean = [twins.native.read_k(twins.addr).clone(), twins.native.read_v(twins.addr).clone()]
    for x in rows:
        x[1, 2, 50] = bad
        if bad == 3e38:
            x[1, 2, 51] = -3e38  # the range overflows
    twins.native.write_pages(twins.addr, *rows)
    for before, after in zip(clean, (twins.native.read_k(twins.addr), twins.native.read_v(twins.addr)), strict=True):
        hit = torch.zeros_like(before, dtype=torch.bool)
        hit.view(6, 8, 72)[1, 2, 36:] = True
        assert bool(after[hit].isnan().all())
        assert torch.equal(after[~hit], before[~hit])


@every_variant
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_channel_that_is_not_finite_is_seen_and_alone(variant: int, bad: float) -> None:
    side = coded(50, 4, rotation="none", scales="channel")
    twins = Twins(side, side, torch.float32, variant=variant)
    k, v = twins.rows(6, 8)
    k[2, 3, 11] = bad
    twins.both("write_pages", twins.addr, k, v)
    found, wanted = (torch.nan_to_num(x, nan=7.0) for x in twins.both("read_k", twins.addr))  # type: ignore[arg-type]
    assert torch.equal(found, wanted)
    assert bool(twins.native.read_k(twins.addr).view(6, 8, 50)[2, :, 11].isnan().all())


@pytest.mark.parametrize("dim", EVERY_DIM)
def test_every_build_writes_the_same_bits(dim: int) -> None:
    """Transforms run in the same order whatever the vectors; only sums over a row (of projected keys) do not."""
    arenas = []
    for variant in range(len(VARIANTS)):
        twins = Twins(coded(dim, 8), coded(dim, 4), torch.float16, variant=variant)
        twins.native.write_pages(twins.addr, *twins.rows(6, 8))
        arenas.append(twins.native.arena)
    assert all(torch.equal(arena, arenas[0]) for arena in arenas)


def test_any_dtype_is_encoded_but_raw_pages_hold_their_own() -> None:
    twins = Twins(coded(32, 8, rotation="none"), coded(32, 4, rotation="none"), torch.float32)
    k, v = (x.double() for x in twins.rows(6, 8))
    twins.both("write_pages", twins.addr, k, v.bfloat16())
    assert twins.native.arena[twins.gaps()].eq(255).all()
    assert torch.equal(twins.native.read_v(twins.addr), twins.plain.read_v(twins.addr))
    raw = Twins(VectorFormat.raw(32, 2), VectorFormat.raw(32, 2))
    with pytest.raises(ValueError, match="cannot hold"):
        raw.native.write_pages(raw.addr, *(x.half() for x in raw.rows(6, 8)))


# == runs of a step's tokens


def runs_of(twins: Twins, table: list[list[int]], tokens: int, heads: int) -> TokenRuns:
    return TokenRuns(torch.tensor(table), tokens, heads, twins.fmt.page_bytes, torch.device("cpu"))


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0, 8, 4, 2])
def test_runs_of_tokens_go_where_rows_would(variant: int, dtype: torch.dtype, bits: int) -> None:
    """Two layers of three heads, tokens as slices of a fused projection, some of them going nowhere."""
    side = coded(36, bits, rotation="none") if bits else VectorFormat.raw(36, dtype.itemsize)
    value = coded(20, bits, rotation="none") if bits else VectorFormat.raw(20, dtype.itemsize)
    twins = Twins(side, value, dtype, heads=3, layers=2, pages=40, variant=variant)
    block = 6 * twins.fmt.page_bytes
    table = [[2 * block, 8, 0, 5], [0, 3, 5, 0], [4 * block, 1, 7, 17]]
    runs = runs_of(twins, table, 19, 3)
    fused = normal(19, 3 * 56 + 5).to(dtype)
    k, v = fused[:, 2:110].view(19, 3, 36), fused[:, 110:170].view(19, 3, 20)
    for layer in range(2):
        twins.both("write_runs", runs, k, v * (layer + 1), layer)
    keys_differ = bits in (4, 2)  # their projections are sums
    if keys_differ:
        twins.addr = torch.cat([torch.arange(6) * twins.fmt.page_bytes + at * block for at in (0, 2, 4)])
        twins.same_law()
    else:
        assert twins.same_bits()
    assert not twins.native.arena.eq(255).all()


def test_runs_of_whole_blocks_with_scales_of_channels() -> None:
    side = coded(24, 4, rotation="none", scales="channel")
    twins = Twins(side, side, heads=2, layers=1, pages=20)
    block = 2 * twins.fmt.page_bytes
    runs = runs_of(twins, [[3 * block, 8, 0, 8], [0, 8, 0, 1]], 16, 2)
    k, v = (normal(16, 2, 24, seed=i).bfloat16() for i in range(2))
    twins.both("write_runs", runs, k, v, 0)
    assert twins.same_bits()
    with pytest.raises(ValueError, match="written whole"):
        twins.native.write_runs(runs_of(twins, [[0, 7, 0, 0]], 16, 2), k, v, 0)


# == out of pages


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 20, 64, 80, 100, 128, 256])
def test_what_is_read_has_the_same_bits_whatever_the_pages_hold(variant: int, dtype: torch.dtype, dim: int) -> None:
    """Arenas of random bytes: scales and zeros that are NaN, infinite, subnormal, negative."""
    raw = VectorFormat.raw(dim, dtype.itemsize)
    pairs: list[tuple[VectorFormat, VectorFormat]] = [(raw, coded(dim, 8, group=9))]
    pairs += [(coded(dim, bits), coded(dim, bits, group=24)) for bits in (8, 4, 2)]
    pairs += [(coded(dim, bits, scales="channel"), raw) for bits in (8, 4, 2)]
    for k, v in pairs:
        twins = Twins(k, v, dtype, variant=variant, size=19)
        noise = torch.randint(0, 256, twins.native.arena.shape, generator=torch.Generator().manual_seed(dim)).byte()
        for store in (twins.native, twins.plain):
            store.arena.copy_(noise)
        for method in ("read_k", "read_v"):
            mine, other = twins.both(method, twins.addr.view(2, 1, 3))
            assert mine.dtype == other.dtype  # type: ignore[attr-defined]
            # Where a product overflows and its sum does not, it depends on the instruction whether it is infinite.
            overflown = mine.isinf() != other.isinf()  # type: ignore[attr-defined]
            assert float(overflown.float().mean()) < 0.01
            both = (x.masked_fill(overflown, 0) for x in (mine, other))  # type: ignore[attr-defined]
            torch.testing.assert_close(*both, rtol=0, atol=0, equal_nan=True)


@every_variant
def test_banded_pages_are_read_with_the_same_bits(variant: int) -> None:
    twins = Twins(BANDS, BandFormat(48, ((8, 3), (2, 40))), torch.bfloat16, variant=variant)
    noise = torch.randint(0, 256, twins.native.arena.shape, generator=torch.Generator().manual_seed(0)).byte()
    for store in (twins.native, twins.plain):
        store.arena.copy_(noise)
    for method in ("read_k", "read_v"):
        mine, other = twins.both(method, twins.addr)
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [20, 64, 80, 192, 256, 1024])
def test_decoded_pages_are_turned_back(variant: int, dtype: torch.dtype, dim: int) -> None:
    twins = Twins(coded(dim, 8), coded(dim, 4, group=32), dtype, variant=variant)
    k, v = twins.rows(6, 8)
    for store in (twins.native, twins.plain):
        store.plain.write_pages(twins.addr, k, v, None)
    room = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    for mine, other in zip(*twins.both("decode_pages", twins.addr), strict=True):  # type: ignore[call-overload]
        scale = other.float().norm(dim=-1, keepdim=True)
        assert bool(((mine.float() - other.float()).abs() <= room * scale).all())


# == between pages


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int8", "int4", "int2", "k8v16", "channel", "banded"])
def test_blocks_are_sealed_as_their_rows_are_written_and_unsealed_as_they_are_decoded(
    variant: int, dtype: torch.dtype, name: str
) -> None:
    sides: dict[str, tuple[VectorFormat | BandFormat, VectorFormat | BandFormat]] = {
        **{f"int{bits}": (coded(48, bits), coded(48, bits, group=20)) for bits in (8, 4, 2)},
        "k8v16": (coded(48, 8), VectorFormat.raw(48, dtype.itemsize)),
        "channel": (coded(48, 2, scales="channel"), coded(48, 4)),
        "banded": (BANDS, BANDS),
    }
    twins = Twins(*sides[name], dtype, heads=2, layers=3, variant=variant)
    packed = twins.native
    plain = VectorFormat.raw(48, dtype.itemsize)
    fmt = PageFormat(8, plain, plain)
    arena = torch.full((12 * fmt.page_bytes,), 255, dtype=torch.uint8)
    raw = PageStore(arena, fmt, dtype, heads=2, layers=3)
    assert raw.native is not None
    raw.native._variant = variant
    k, v = twins.rows(6, 8)
    raw_addr = torch.arange(6) * 2 * fmt.page_bytes
    raw.write_pages(raw_addr, k, v)
    seal(raw, raw_addr, packed, twins.addr)
    sealed = packed.arena.clone()
    packed.arena.fill_(255)
    packed.write_pages(twins.addr, k, v)
    assert torch.equal(packed.arena, sealed)
    arena.fill_(255)
    unseal(packed, twins.addr, raw, raw_addr)
    for found, wanted in zip(raw.decode_pages(raw_addr), packed.decode_pages(twins.addr), strict=True):
        assert torch.equal(found, wanted)
    between = arena.view(12, -1)[1::2]
    assert bool((between == 255).all())


@pytest.mark.parametrize("side", [VectorFormat.raw(17, 4), coded(17, 2, group=5), coded(64, 8)], ids=str)
def test_rows_are_copied_with_their_scales(side: VectorFormat) -> None:
    twins = Twins(side, side, torch.float32)
    noise = torch.randint(0, 256, twins.native.arena.shape, generator=torch.Generator().manual_seed(0)).byte()
    for store in (twins.native, twins.plain):
        store.arena.copy_(noise)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    source, target = order[:30], order.flip(0)[:30]  # some rows are both
    twins.both(
        "copy_rows", twins.addr[source // 8], source % 8, twins.addr[target // 8], target % 8
    )  # fmt: skip
    assert twins.same_bits()


def test_blocks_that_are_copied_onto_each_other_are_all_read_first() -> None:
    arena = torch.randint(0, 256, (640,), generator=torch.Generator().manual_seed(0)).byte()
    before = arena.clone()
    copy_blocks(arena, torch.tensor([0, 128, 320]), torch.tensor([128, 64, 0]), 64)
    assert torch.equal(arena[128:192], before[:64])
    assert torch.equal(arena[64:128], before[128:192])
    assert torch.equal(arena[:64], before[320:384])
    assert torch.equal(arena[192:], before[192:])
    for bad in (-64, 577, 1 << 62):
        with pytest.raises(ValueError, match="outside of the arena"):
            copy_blocks(arena, torch.tensor([0, 64]), torch.tensor([128, bad]), 64)
        with pytest.raises(ValueError, match="outside of the arena"):
            zero_blocks(arena, torch.tensor([bad]), 64)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_calls_on_any_threads_write_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    twins = Twins(coded(64, 4, rotation="none"), coded(64, 8, rotation="none"), size=32, pages=300)
    k, v = twins.rows(300, 32)
    twins.native.write_pages(twins.addr, k, v)
    once, read = twins.native.arena.clone(), twins.native.read_v(twins.addr)
    torch.set_num_threads(threads)
    try:
        twins.native.arena.fill_(255)
        twins.native.write_pages(twins.addr, k, v)
        assert torch.equal(twins.native.arena, once)
        assert torch.equal(twins.native.read_v(twins.addr), read)
    finally:
        torch.set_num_threads(before)


# == what is refused


@pytest.mark.parametrize("wrong", [-64, 1 << 40, -(1 << 62), None])
def test_an_address_outside_of_the_arena_is_refused(wrong: int | None) -> None:
    twins = Twins(coded(64, 4), coded(64, 4))
    store = twins.native
    page = store.arena.numel() - twins.fmt.page_bytes + 1 if wrong is None else wrong
    addr = torch.tensor([int(twins.addr[0]), page])
    slot = torch.zeros(2, dtype=torch.int64)
    k, v = twins.rows(2, 8)
    calls = [
        lambda: store.write_pages(addr, k, v),
        lambda: store.write_rows(addr, slot, k[:, 0], v[:, 0]),
        lambda: store.write_runs(runs_of(twins, [[page, 1, 0, 0]], 2, 1), k[:, :1], v[:, :1]),
        lambda: store.read_k(addr),
        lambda: store.decode_pages(addr),
        lambda: store.copy_rows(addr, slot, addr, slot),
        lambda: store.copy_rows(twins.addr[:2], slot, addr, slot),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"1 of [12] page addresses lie outside of the arena"):
            call()
    assert bool((store.arena == 255).all())


@pytest.mark.parametrize("wrong", [-1, 8, 1 << 40])
def test_a_slot_outside_of_its_block_is_refused(wrong: int) -> None:
    twins = Twins(coded(64, 4), coded(64, 4))
    store, addr, slot = twins.native, twins.addr[:2], torch.tensor([0, wrong])
    k, v = twins.rows(2)
    for call in (
        lambda: store.write_rows(addr, slot, k, v),
        lambda: store.write_runs(runs_of(twins, [[0, 1, wrong, 0]], 2, 1), k[:, None], v[:, None]),
        lambda: store.copy_rows(addr, slot, addr, slot),
        lambda: store.copy_rows(addr, addr * 0, addr, slot),
    ):
        with pytest.raises(ValueError, match=r"slots lie outside of a block of 8 tokens"):
            call()
    assert bool((store.arena == 255).all())


@pytest.mark.parametrize("run", [[0, 9, 0, 0], [0, -1, 0, 0], [0, 3, 6, 0], [0, 1, 1 << 62, 0], [0, 1 << 62, 0, 0]])
def test_a_run_that_leaves_its_block_is_refused(run: list[int]) -> None:
    twins = Twins(coded(64, 4), coded(64, 4))
    k, v = twins.rows(20, 1)
    with pytest.raises(ValueError, match="slots lie outside"):
        twins.native.write_runs(runs_of(twins, [run], 20, 1), k, v)


@pytest.mark.parametrize("run", [[0, 4, 0, 17], [0, 1, 0, -1], [0, 1, 0, 1 << 62]])
def test_a_run_that_reaches_for_tokens_that_are_not_there_is_refused(run: list[int]) -> None:
    twins = Twins(coded(64, 4), coded(64, 4))
    k, v = twins.rows(20, 1)
    with pytest.raises(ValueError, match="tokens outside of the 20"):
        twins.native.write_runs(runs_of(twins, [run], 20, 1), k, v)


def test_shapes_and_layers_that_do_not_fit_are_refused() -> None:
    twins = Twins(BANDS, BANDS, heads=2, layers=2, pages=8)
    store = twins.native
    k, v = twins.rows(4, 8)
    for bad in ((k[:3], v), (k, v[:, :7]), (k[..., :40], v), (k.flatten(0, 1), v)):
        with pytest.raises(ValueError, match="is not"):
            store.write_pages(twins.addr[:4], *bad)
    with pytest.raises(ValueError, match="matrix"):
        store.write_pages(twins.addr[:4], k, v, 2)
    with pytest.raises(ValueError, match="int64"):
        store.read_k(twins.addr.int())
    with pytest.raises(ValueError, match="do not fit"):
        store.write_rows(twins.addr[:4], torch.zeros(3, dtype=torch.int64), k[:, 0], v[:, 0])


def test_without_the_extension_torch_moves_the_same_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    side = coded(64, 4, rotation="none")
    twins = Twins(VectorFormat.raw(64, 2), side)
    twins.native.write_pages(twins.addr, *twins.rows(6, 8))
    monkeypatch.setattr(cpu, "available", lambda: "not built")
    store = PageStore(torch.full_like(twins.native.arena, 255), twins.fmt, twins.dtype)
    assert store.native is None
    assert row_variants() == ()
    store.write_pages(twins.addr, *twins.rows(6, 8))
    assert torch.equal(store.arena, twins.native.arena)
    copy_blocks(store.arena, twins.addr[:1], twins.addr[1:2], 64)
    zero_blocks(store.arena, twins.addr[:1], 64)
    assert not store.arena[int(twins.addr[0]) :][:64].any()


def test_an_arena_elsewhere_and_a_dtype_unknown_are_left_to_torch() -> None:
    fmt = PageFormat(4, VectorFormat.raw(8, 8), VectorFormat.raw(8, 8))
    store = PageStore(torch.zeros(fmt.page_bytes * 2, dtype=torch.uint8), fmt, torch.float64)
    assert store.native is None
    k, v = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    addr = torch.tensor([fmt.page_bytes, 0])
    store.write_pages(addr, k, v)
    assert torch.equal(store.read_k(addr).view_as(k), k)
    half = PageFormat(4, coded(8, 4), coded(8, 4))
    assert PageStore(torch.zeros(half.page_bytes, dtype=torch.uint8, device="meta"), half, torch.float16).native is None


def test_channels_module_is_the_oracle_of_the_bound() -> None:
    side = coded(64, 4, rotation="none", scales="channel")
    twins = Twins(side, side, torch.float32, pages=4)
    k, v = twins.rows(4, 8)
    twins.native.write_pages(twins.addr, k, v)
    _, meta = channels.encode(k, side)
    found = twins.native.read_k(twins.addr).view_as(k)
    assert bool(((found - k).abs() <= channels.error_bound(meta, side) * 1.001 + k.abs() * 2.0**-20).all())


@pytest.mark.parametrize("dim", [2, 20, 64, 80, 96, 128, 192, 256, 1024])
def test_queries_are_rotated_as_rows_are(dim: int) -> None:
    rotation = Rotation(VectorFormat(dim, 4, quantized=True, group=dim, rotation="hadamard"))
    x = torch.randn(3, 5, dim)
    assert torch.allclose(rotation.query(x, 0), rotation.apply(x), atol=1e-5)
    assert torch.allclose(rotation.output(rotation.query(x.transpose(0, 1), 0), 0), x.transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 4, 15])
def test_small_blocks_with_scales_of_channels_are_read_in_a_fresh_thread(size: int) -> None:
    """A thread's scratch only grows: what an earlier call left would hide that it is too small."""
    keys = VectorFormat(64, 4, quantized=True, group=64, rotation="hadamard", scales="channel")
    fmt = PageFormat(size, keys, VectorFormat(64, 8, quantized=True, group=64, rotation="hadamard"))
    store = PageStore(torch.zeros(4 * fmt.page_bytes, dtype=torch.uint8), fmt, torch.float32)
    addr = torch.arange(4) * fmt.page_bytes
    found = []

    def work() -> None:
        store.write_pages(addr, torch.randn(4, size, 64), torch.randn(4, size, 64))
        found.append(store.decode_pages(addr))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(found[0], store.plain.decode_pages(addr, None), strict=True)
    )
