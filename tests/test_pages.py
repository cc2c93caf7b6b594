"""Pages in an arena: what is written is read, nothing else is touched, and stored bits move unchanged."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.codecs import affine, channels
from kvfold.codecs.pages import PageStore, copy_blocks, seal, unseal, zero_blocks
from kvfold.formats import PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.pages import PagesCall
from kvfold.kernels.reference import paged_attend

quick = settings(max_examples=50, deadline=None)
dtypes = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))
SIZES = st.integers(1, 24) | st.sampled_from((32, 48, 64, 80))


@st.composite
def vectors(draw, dim: int, dtype: torch.dtype, scales: str = "token") -> VectorFormat:
    bits = draw(st.sampled_from((2, 4, 8, 16)))
    if bits == 16:
        return VectorFormat.raw(dim, dtype.itemsize)
    group = draw(st.integers(1, 80) | st.just(128))
    rotation = draw(st.sampled_from(("hadamard", "none")))
    return VectorFormat(dim, bits, quantized=True, group=group, rotation=rotation, scales=scales)


@dataclass
class Case:
    """A store over an arena full of NaN, with free places for pages in random order."""

    store: PageStore
    addr: Tensor
    generator: torch.Generator

    def tokens(self, *lead: int) -> tuple[Tensor, Tensor]:
        k, v = (
            torch.randn(*lead, side.dim, generator=self.generator).to(self.store.dtype)
            for side in (self.store.fmt.k, self.store.fmt.v)
        )
        return k, v

    def snapshot(self) -> Tensor:
        return self.store.arena.clone()


def poisoned(count: int) -> Tensor:
    """All bits set: NaN in every dtype."""
    return torch.full((count,), 255, dtype=torch.uint8)


@st.composite
def cases(draw, pages: int = 6, *, whole: bool = False) -> Case:
    """``whole``: keys or values may have scales of channels, so that pages are written whole."""
    dtype = draw(dtypes)
    scales = st.sampled_from(("token", "channel") if whole else ("token",))
    fmt = PageFormat(
        block_size=draw(st.sampled_from((1, 3, 8, 16, 32))),
        k=draw(vectors(draw(SIZES), dtype, draw(scales))),
        v=draw(vectors(draw(SIZES), dtype, draw(scales))),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Pages stand at any multiple of 64, with gaps between them that nobody may touch.
    gaps = torch.randint(0, 3, (pages,), generator=generator) * 64
    places = torch.cumsum(gaps + fmt.page_bytes, 0) - fmt.page_bytes
    addr = places[torch.randperm(pages, generator=generator)]
    arena = poisoned(int(places[-1]) + fmt.page_bytes + draw(st.sampled_from((0, 64, 100))))
    return Case(PageStore(arena, fmt, dtype), addr, generator)


def regions(fmt: PageFormat) -> list[tuple[int, int]]:
    """Offset and row bytes of the regions that have rows of tokens."""
    found = [(fmt.k_codes_offset, fmt.k.code_bytes), (fmt.k_meta_offset, fmt.k.meta_bytes)]
    found += [(fmt.v_codes_offset, fmt.v.code_bytes), (fmt.v_meta_offset, fmt.v.meta_bytes)]
    return [(offset, size) for offset, size in found if size]


def owned(case: Case, addr: Tensor, slot: Tensor) -> Tensor:
    """Which bytes of the arena belong to these tokens: bool ``[bytes]``."""
    mask = torch.zeros(case.store.arena.numel(), dtype=torch.bool)
    for page, row in zip(addr.tolist(), slot.tolist(), strict=True):
        for offset, size in regions(case.store.fmt):
            mask[page + offset + row * size : page + offset + (row + 1) * size] = True
        fmt = case.store.fmt
        for side, offset in ((fmt.k, fmt.k_meta_offset), (fmt.v, fmt.v_meta_offset)):
            if not side.movable:
                mask[page + offset : page + offset + side.page_meta_bytes(fmt.block_size)] = True
    return mask


def some_slots(case: Case) -> tuple[Tensor, Tensor]:
    """A random choice of different (page, slot) pairs, in random order."""
    size = case.store.fmt.block_size
    total = case.addr.numel() * size
    picked = torch.randperm(total, generator=case.generator)[: max(1, total // 3)]
    return case.addr[picked // size], picked % size


def encoded(x: Tensor, fmt: VectorFormat, store: PageStore) -> tuple[Tensor, Tensor]:
    """Codes and meta of ``x``, keys or values; as a store encodes them."""
    keys = fmt is store.fmt.k
    turned = (store.k_basis if keys else store.v_basis).apply(x.float())
    inner = keys and fmt.bits == 2
    if not fmt.movable:
        return channels.encode(turned, fmt, inner=inner)
    return affine.encode(turned, fmt, inner=inner, projected=keys and fmt.bits <= 4)


def stored(x: Tensor, fmt: VectorFormat, store: PageStore) -> Tensor:
    """What reading back must give: in the stored basis."""
    if not fmt.quantized:
        return x
    decode = affine.decode if fmt.movable else channels.decode
    return decode(*encoded(x, fmt, store), fmt, store.dtype)


def error_bound(x: Tensor, fmt: VectorFormat, store: PageStore) -> Tensor:
    """What the code of ``x`` may be wrong by, in the stored basis."""
    _, meta = encoded(x, fmt, store)
    return affine.error_bound(meta, fmt) if fmt.movable else channels.error_bound(meta, fmt).expand(x.shape)


def assert_stored(found: Tensor, x: Tensor, fmt: VectorFormat, store: PageStore) -> None:
    """Bit for bit; after a rotation, a product of other shape may sum in another order, and a code tip over."""
    wanted = stored(x, fmt, store)
    if fmt.quantized and fmt.rotation == "hadamard":
        room = 2.1 * error_bound(x, fmt, store) + 2.0**-7 * wanted.float().abs()
        assert bool(((found.float() - wanted.float()).abs() <= room).all())
    else:
        assert torch.equal(found, wanted)


@quick
@given(cases())
def test_rows_written_are_read_and_nothing_else_is_touched(case):
    store, size = case.store, case.store.fmt.block_size
    addr, slot = some_slots(case)
    k, v = case.tokens(addr.numel())
    before = case.snapshot()
    store.write_rows(addr, slot, k, v)
    mask = owned(case, addr, slot)
    assert torch.equal(store.arena[~mask], before[~mask])
    order = {page: i for i, page in enumerate(case.addr.tolist())}
    row = torch.tensor([order[page] * size + s for page, s in zip(addr.tolist(), slot.tolist(), strict=True)])
    read_k, read_v = store.read_k(case.addr), store.read_v(case.addr)
    assert read_k.is_contiguous()
    assert read_k.dtype == read_v.dtype == store.dtype
    assert_stored(read_k[row], k, store.fmt.k, store)
    assert_stored(read_v[row], v, store.fmt.v, store)
    # The poison stays in the slots that were not written.
    written = torch.zeros(read_k.shape[0], dtype=torch.bool)
    written[row] = True
    assert bool(read_k[written].isfinite().all())
    assert bool(read_k[~written].isnan().all())
    assert bool(read_v[~written].isnan().all())


@quick
@given(cases(whole=True))
def test_pages_written_are_read_and_nothing_else_is_touched(case):
    store, size = case.store, case.store.fmt.block_size
    addr = case.addr[:4]
    k, v = case.tokens(4, size)
    before = case.snapshot()
    store.write_pages(addr, k, v)
    mask = owned(case, addr.repeat_interleave(size), torch.arange(size).repeat(4))
    assert torch.equal(store.arena[~mask], before[~mask])
    # Tables of any shape: two heads with two pages each, and one head with four.
    assert_stored(store.read_k(addr.view(2, 2)).view(4, size, -1), k, store.fmt.k, store)
    assert_stored(store.read_v(addr.view(1, 4))[0].view(4, size, -1), v, store.fmt.v, store)
    assert store.read_k(addr.view(2, 1, 2)).shape == (2, 1, 2 * size, store.fmt.k.dim)


@quick
@given(cases(whole=True))
def test_decoded_pages_are_within_the_bound(case):
    store, size = case.store, case.store.fmt.block_size
    k, v = case.tokens(case.addr.numel(), size)
    store.write_pages(case.addr, k, v)
    sides = ((store.fmt.k, k), (store.fmt.v, v))
    for found, (fmt, x) in zip(store.decode_pages(case.addr), sides, strict=True):
        assert found.shape == x.shape
        if not fmt.quantized:
            assert torch.equal(found, x)
            continue
        # Orthogonal: the norm of the error in the original basis is that in the stored one. Scale and zero of projected
        # keys are both rounded to bfloat16, which tells in rows of two dims.
        room = error_bound(x, fmt, store).norm(dim=-1) * 1.01 + 2.0**-6 * x.float().norm(dim=-1) + 2.0**-20
        assert bool(((found.float() - x.float()).norm(dim=-1) <= room).all())


@quick
@given(cases())
def test_rows_move_bit_for_bit(case):
    store, size = case.store, case.store.fmt.block_size
    k, v = case.tokens(3, size)
    source = case.addr[:3]
    store.write_pages(source, k, v)
    count = max(1, size * 3 // 2)
    picked = torch.randperm(3 * size, generator=case.generator)[:count]
    target = torch.randperm(3 * size, generator=case.generator)[:count]
    src = (source[picked // size], picked % size)
    dst = (case.addr[3:][target // size], target % size)
    before = case.snapshot()
    store.copy_rows(*src, *dst)
    mask = owned(case, *dst)
    assert torch.equal(store.arena[~mask], before[~mask])
    for offset, row_bytes in regions(store.fmt):
        for (a, s), (b, t) in zip(zip(*src, strict=True), zip(*dst, strict=True), strict=True):
            start, end = int(a + offset + s * row_bytes), int(b + offset + t * row_bytes)
            assert torch.equal(store.arena[end : end + row_bytes], before[start : start + row_bytes])
    # Back to where they came from, over poison: the arena is as it was.
    store.arena[owned(case, *src)] = 255
    store.copy_rows(*dst, *src)
    mask = owned(case, *src)
    assert torch.equal(store.arena[mask], before[mask])


@quick
@given(cases())
def test_rows_shift_within_a_page(case):
    """All sources are read before anything is written, so a page can be made dense in place."""
    store, size = case.store, case.store.fmt.block_size
    k, v = case.tokens(1, size)
    page = case.addr[:1]
    store.write_pages(page, k, v)
    before = store.read_k(page)
    here = page.expand(size - 1)
    store.copy_rows(here, torch.arange(1, size), here, torch.arange(size - 1))
    after = store.read_k(page)
    assert torch.equal(after[: size - 1], before[1:])
    assert torch.equal(after[size - 1], before[size - 1])


@quick
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6))
def test_blocks_are_copied_and_zeroed_bit_for_bit(seed, count, lines):
    generator = torch.Generator().manual_seed(seed)
    block = 64 * lines
    arena = torch.randint(0, 256, (block * 2 * count + 64 + 7,), dtype=torch.uint8, generator=generator)
    order = torch.randperm(2 * count, generator=generator) * block + 64
    src, dst = order[:count], order[count:]
    wanted = arena.clone()
    for a, b in zip(src.tolist(), dst.tolist(), strict=True):
        wanted[b : b + block] = arena[a : a + block]
    copy_blocks(arena, src, dst, block)
    assert torch.equal(arena, wanted)
    for a in src.tolist():
        wanted[a : a + block] = 0
    zero_blocks(arena, src, block)
    assert torch.equal(arena, wanted)


@quick
@given(cases(whole=True), st.integers(0, 2))
def test_seal_and_unseal(case, extra):
    """Raw pages sealed into packed ones of the same arena and unsealed again; raw sides come back bit for bit."""
    packed, size = case.store, case.store.fmt.block_size
    dtype = packed.dtype
    sides = (VectorFormat.raw(side.dim, dtype.itemsize) for side in (packed.fmt.k, packed.fmt.v))
    fmt = PageFormat(size, *sides)
    start = packed.arena.numel() // 64 * 64 + 64
    grown = torch.cat((packed.arena, poisoned(start + 8 * fmt.page_bytes - packed.arena.numel())))
    packed.rebind(grown)
    raw = PageStore(grown, fmt, dtype)
    raw_addr = start + torch.randperm(8, generator=case.generator)[: 2 + extra] * fmt.page_bytes
    packed_addr = case.addr[: 2 + extra]
    k, v = case.tokens(2 + extra, size)
    raw.write_pages(raw_addr, k, v)
    seal(raw, raw_addr, packed, packed_addr)
    assert_stored(packed.read_k(packed_addr).view_as(k), k, packed.fmt.k, packed)
    assert_stored(packed.read_v(packed_addr).view_as(v), v, packed.fmt.v, packed)
    zero_blocks(grown, raw_addr, fmt.page_bytes)
    unseal(packed, packed_addr, raw, raw_addr)
    for found, wanted in zip(raw.decode_pages(raw_addr), packed.decode_pages(packed_addr), strict=True):
        torch.testing.assert_close(found, wanted)


def test_many_pages_in_parts_are_the_same_pages():
    """More rows than are encoded at a time."""
    fmt = PageFormat(32, *(VectorFormat(10, 4, quantized=True, group=10, rotation="none"),) * 2)
    store = PageStore(poisoned(300 * fmt.page_bytes), fmt, torch.float32)
    generator = torch.Generator().manual_seed(7)
    addr = torch.randperm(300, generator=generator) * fmt.page_bytes
    k, v = torch.randn(2, 300, 32, 10, generator=generator)
    store.write_pages(addr, k, v)
    assert torch.equal(store.read_k(addr).view_as(k), stored(k, fmt.k, store))
    by_pages = store.arena.clone()
    store.arena.fill_(255)
    slot = torch.arange(32).repeat(300)
    store.write_rows(addr.repeat_interleave(32), slot, k.flatten(0, 1), v.flatten(0, 1))
    assert torch.equal(store.arena, by_pages)


def test_rows_are_rotated_in_float32():
    """Turned in bfloat16, a third of the 8-bit codes would come out differently."""
    fmt = PageFormat(32, *(VectorFormat(64, 8, quantized=True, group=64, rotation="hadamard"),) * 2)
    store = PageStore(poisoned(4 * fmt.page_bytes), fmt, torch.bfloat16)
    addr = torch.arange(4) * fmt.page_bytes
    k, v = torch.randn(2, 4, 32, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    store.write_pages(addr, k, v)
    wanted = affine.decode(*affine.encode(store.v_basis.apply(v.float()), fmt.v), fmt.v, torch.bfloat16)
    assert float((store.read_v(addr).view_as(v) == wanted).float().mean()) > 0.99


@quick
@given(cases())
def test_strided_and_shifted_inputs(case):
    """Keys as attention layers have them: transposed, sliced, at odd offsets of a larger buffer."""
    store = case.store
    addr, slot = some_slots(case)
    k, v = case.tokens(addr.numel())
    store.write_rows(addr, slot, k, v)
    wanted = case.snapshot()
    store.arena.fill_(255)
    shifted = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view_as(k).copy_(k)
    transposed = v.t().contiguous().t()
    store.write_rows(addr, slot, shifted, transposed)
    mask = owned(case, addr, slot)
    if all(side.rotation == "none" for side in (store.fmt.k, store.fmt.v)):
        assert torch.equal(store.arena[mask], wanted[mask])
    assert torch.equal(store.arena[~mask], wanted[~mask])
    assert_stored(store.read_k(addr[:1])[slot[0]], k[0], store.fmt.k, store)


@quick
@given(cases())
def test_nothing_to_do(case):
    store, size = case.store, case.store.fmt.block_size
    none = torch.empty(0, dtype=torch.int64)
    before = case.snapshot()
    store.write_rows(none, none, *case.tokens(0))
    store.write_pages(none, *case.tokens(0, size))
    store.copy_rows(none, none, none, none)
    copy_blocks(store.arena, none, none, 64)
    seal(store, none, store, none)
    assert torch.equal(store.arena, before)
    assert store.read_k(none).shape == (0, store.fmt.k.dim)


@quick
@given(cases(pages=8), st.booleans())
def test_attention_over_pages_needs_no_unrotation(case, causal):
    """Turn the query, attend in the stored basis, turn the output: attention over the decoded pages."""
    store, size = case.store, case.store.fmt.block_size
    heads, columns = 2, 3
    table = case.addr[: heads * columns]
    length = columns * size - size // 2
    block = torch.arange(columns).repeat(heads)
    slot = torch.arange(size)
    kept = (block[:, None] * size + slot < length).flatten()
    k, v = case.tokens(heads * columns, size)
    k, v = k.flatten(0, 1)[kept], v.flatten(0, 1)[kept]
    store.write_rows(table.repeat_interleave(size)[kept], slot.repeat(heads * columns)[kept], k, v)
    q = torch.randn(3, 4, store.fmt.k.dim, generator=case.generator)
    rules = {
        "table": torch.arange(heads * columns).view(heads, columns),
        "block_index": torch.arange(columns),
        "length": length,
        "q_pos": torch.tensor([length - 1, length, length + 5]),
        "scale": store.fmt.k.dim**-0.5,
        "causal": causal,
    }
    k_pages = store.read_k(table).view(heads * columns, size, -1)
    v_pages = store.read_v(table).view(heads * columns, size, -1)
    o, lse = paged_attend(store.k_basis.apply(q), k_pages, v_pages, **rules)
    o_plain, lse_plain = paged_attend(q, *store.decode_pages(table), **rules)
    room = 1e-5 if store.dtype == torch.float32 else 0.03
    torch.testing.assert_close(store.v_basis.undo(o), o_plain, atol=room, rtol=room)
    torch.testing.assert_close(lse, lse_plain, atol=room, rtol=room)


def test_refusals():
    fmt = PageFormat(32, VectorFormat.raw(64, 2), VectorFormat.raw(64, 2))
    arena = poisoned(4 * fmt.page_bytes)
    with pytest.raises(ValueError, match="16 bits cannot hold"):
        PageStore(arena, fmt, torch.float32)
    for bad in (arena[8:], arena.view(torch.int16), arena.view(2, -1), arena[::2]):
        with pytest.raises(ValueError, match="an arena is"):
            PageStore(bad, fmt, torch.bfloat16)
    store = PageStore(arena, fmt, torch.bfloat16)
    rows = torch.zeros(1, 64, dtype=torch.bfloat16)
    outside = torch.tensor([arena.numel()])
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        store.write_rows(outside, torch.zeros(1, dtype=torch.int64), rows, rows)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        store.read_k(outside)
    with pytest.raises((RuntimeError, ValueError)):
        store.write_rows(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), rows.float(), rows)


@quick
@given(cases(whole=True))
def test_pages_with_scales_of_channels_are_not_taken_apart(case):
    """No token of theirs is written or copied alone, but blocks are copied bit for bit."""
    store, size = case.store, case.store.fmt.block_size
    k, v = case.tokens(1, size)
    store.write_pages(case.addr[:1], k, v)
    before = case.snapshot()
    copy_blocks(store.arena, case.addr[:1], case.addr[1:2], store.fmt.page_bytes)
    assert torch.equal(store.read_k(case.addr[1:2]), store.read_k(case.addr[:1]))
    assert torch.equal(store.read_v(case.addr[1:2]), store.read_v(case.addr[:1]))
    if store.fmt.movable:
        return
    store.arena.copy_(before)
    slot = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="whole"):
        store.copy_rows(case.addr[:1], slot, case.addr[1:2], slot)
    with pytest.raises(ValueError, match="whole"):
        store.write_rows(case.addr[:1], slot, k[:, 0], v[:, 0])
    assert torch.equal(store.arena, before)


def test_the_native_kernel_knows_scales_of_channels():
    if cpu.available():
        pytest.skip(cpu.available())
    call = PagesCall(
        q=torch.zeros(1, 1, 1, 8),
        arena=poisoned(1024),
        addr=torch.zeros(1, 1, 1, dtype=torch.int64),
        shift=0,
        fmt=PageFormat(8, *(VectorFormat(8, 4, True, 8, "none", scales) for scales in ("channel", "token"))),
        dtype=torch.float32,
        scale=1.0,
        read=lambda pages: (torch.zeros(1, 1, 8, 8),) * 2,
    )
    assert cpu.refuses(call) is None


def test_an_arena_inside_a_larger_buffer():
    """Addresses count from the arena's start, wherever its storage begins."""
    fmt = PageFormat(4, VectorFormat(8, 4, quantized=True, group=8, rotation="none"), VectorFormat.raw(8, 4))
    buffer = poisoned(10 * fmt.page_bytes)
    arena = buffer[48 : 48 + 4 * fmt.page_bytes]
    store = PageStore(arena, fmt, torch.float32)
    addr = torch.tensor([0, 3]) * fmt.page_bytes
    k, v = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(8))
    store.write_pages(addr, k, v)
    assert torch.equal(store.read_v(addr).view_as(v), v)
    assert torch.equal(store.read_k(addr).view_as(k), stored(k, fmt.k, store))
    assert bool((buffer[:48] == 255).all())
    assert bool((buffer[48 + 4 * fmt.page_bytes :] == 255).all())
