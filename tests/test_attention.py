"""Pieces of attention against the float32 reference: permuted pages, odd lengths, NaN beside valid rows, dtypes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.attention.decode import attend_decode
from kvfold.attention.pieces import LayerCall
from kvfold.attention.prefill import QUERY_TILE, SPAN_PAGES, attend_prefill
from kvfold.attention.rows import FewRows, attend_rows
from kvfold.attention.tables import Blocks, DecodeTables, GroupPages, SequencePages, past_of
from kvfold.codecs.pages import PageStore
from kvfold.formats import PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.catalog import RAW_ROWS, full_registry
from kvfold.kernels.dense import DenseCall, dense_registry
from kvfold.kernels.merge import merge, with_sinks
from kvfold.kernels.pages import PagesCall
from kvfold.kernels.reference import attend
from kvfold.kernels.registry import OpRegistry

SIZE, HEADS, DIM, QUERIES, LAYERS, LAYER = 8, 2, 16, 6, 3, 2
LENGTHS = [21, 5, 40, 700]
ARENA = 8 << 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
KINDS = [("full", None), ("sliding", 6), ("chunked", 7), ("sliding", 300)]
EMPTY = Blocks(np.zeros(0, np.int64), np.zeros(0, np.int64))


class Paged:
    """Sequences of ``LENGTHS`` in randomly placed pages of a NaN-filled arena; unused rows of a last page are zero."""

    def __init__(self, dtype: torch.dtype, kind: str, window: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        raw = VectorFormat.raw(DIM, dtype.itemsize)
        store = PageStore(torch.full((ARENA,), 255, dtype=torch.uint8), PageFormat(SIZE, raw, raw), dtype)
        self.group = GroupPages(store, None, HEADS, kind, window)
        block = LAYERS * self.group.layer_bytes(store)
        order = np.random.default_rng(0).permutation(ARENA // block)
        self.k = [torch.randn(n, HEADS, DIM, generator=generator).to(dtype) for n in LENGTHS]
        self.v = [torch.randn(n, HEADS, DIM, generator=generator).to(dtype) for n in LENGTHS]
        self.pages = []
        for k, v in zip(self.k, self.v, strict=True):
            count = -(-len(k) // SIZE)
            offset, order = order[:count].astype(np.int64) * block, order[count:]
            self.pages.append(SequencePages(Blocks(offset, np.arange(count) * SIZE), EMPTY))
            padding = (0, 0, 0, 0, 0, count * SIZE - len(k))
            rows = [torch.nn.functional.pad(x, padding) for x in (k, v)]
            addr = self.group.addresses(store, np.repeat(offset, SIZE)[:, None])[..., 0]
            slot = (torch.arange(count * SIZE) % SIZE)[:, None].expand(-1, HEADS)
            addr = addr + LAYER * self.group.layer_bytes(store)
            store.write_rows(addr.reshape(-1), slot.reshape(-1), rows[0].flatten(0, 1), rows[1].flatten(0, 1))

    def reference(self, i: int, q: Tensor, first: int, call: LayerCall) -> tuple[Tensor, Tensor]:
        length = first + q.shape[0]
        return attend(
            q,
            self.k[i][:length],
            self.v[i][:length],
            q_pos=torch.arange(first, length),
            k_pos=torch.arange(length),
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            window=call.window if call.kind == "sliding" else None,
            chunk=call.window if call.kind == "chunked" else None,
        )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("kind", "window"), KINDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_decode_agrees_with_the_reference(
    dtype: torch.dtype, kind: str, window: int | None, softcap: float | None
) -> None:
    paged = Paged(dtype, kind, window)
    sinks = torch.linspace(-1, 1, QUERIES)
    call = LayerCall(scale=0.3, kind=kind, window=window, softcap=softcap, sinks=sinks)
    q = torch.randn(len(LENGTHS), QUERIES, DIM).to(dtype)
    walks = DecodeTables(paged.group, paged.pages).at(np.asarray(LENGTHS) - 1)
    o, lse = with_sinks(attend_decode(q, LAYER, walks, call, full_registry()), sinks)
    for i, length in enumerate(LENGTHS):
        want_o, want_lse = paged.reference(i, q[i : i + 1], length - 1, call)
        assert (o[i].float() - want_o[0]).abs().max() <= TOLERANCE[dtype]
        assert (lse[i] - want_lse[0]).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("kind", "window"), KINDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("i", range(len(LENGTHS)))
def test_prefill_over_a_past_agrees_with_the_reference(
    dtype: torch.dtype, kind: str, window: int | None, softcap: float | None, i: int
) -> None:
    paged = Paged(dtype, kind, window)
    call = LayerCall(scale=0.3, kind=kind, window=window, softcap=softcap)
    for first in (0, LENGTHS[i] // 2, LENGTHS[i] - 2):
        q = torch.randn(LENGTHS[i] - first, QUERIES, DIM).to(dtype)
        past = past_of(paged.group, paged.pages[i], first)
        piece = attend_prefill(q, paged.k[i][first:], paged.v[i][first:], first, LAYER, past, call, dense_registry())
        want_o, want_lse = paged.reference(i, q, first, call)
        assert (piece[0].float() - want_o).abs().max() <= TOLERANCE[dtype]
        assert (piece[1] - want_lse).abs().max() <= TOLERANCE[dtype]


def test_merge_of_any_split_is_the_whole() -> None:
    q, k, v = torch.randn(3, 4, 8), torch.randn(50, 2, 8), torch.randn(50, 2, 8)

    def part(a: int, b: int) -> tuple[Tensor, Tensor]:
        return attend(q, k[a:b], v[a:b], q_pos=torch.full((3,), 50), k_pos=torch.arange(a, b), scale=0.4, causal=True)

    whole = part(0, 50)
    for cuts in ([0, 50], [0, 1, 50], [0, 7, 20, 21, 50]):
        o, lse = merge([part(a, b) for a, b in pairwise(cuts)])
        assert torch.allclose(o, whole[0], atol=1e-5)
        assert torch.allclose(lse, whole[1], atol=1e-5)


@pytest.mark.parametrize("name", ["flash_cpu", "matmul"])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (24, 16), (16, 24)])
def test_every_dense_implementation_agrees_with_the_reference(name: str, dim: int, value_dim: int) -> None:
    registry = dense_registry()
    run = {impl.name: impl.run for impl in registry.implementations("attend_dense")}[name]
    q, k, v = torch.randn(2, 3, 7, dim), torch.randn(2, 3, 7, dim), torch.randn(2, 3, 7, value_dim)
    o, lse = run(DenseCall(q=q, k=k, v=v, scale=0.2, causal=True))
    for b in range(2):
        flat = [x[b].transpose(0, 1) for x in (q, k, v)]
        want_o, want_lse = registry.reference("attend_dense")(
            *flat, q_pos=torch.arange(7), k_pos=torch.arange(7), scale=0.2
        )
        assert torch.allclose(o[b].transpose(0, 1), want_o, atol=1e-5)
        assert torch.allclose(lse[b].transpose(0, 1), want_lse, atol=1e-5)


def test_a_row_that_sees_nothing_stays_finite_and_weighs_nothing() -> None:
    registry = dense_registry()
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    blind = torch.full((1, 1, 3, 5), torch.finfo(torch.float32).min)
    for impl in registry.implementations("attend_dense"):
        nothing = impl.run(DenseCall(q=q, k=k, v=k, scale=0.2, bias=blind))
        some = impl.run(DenseCall(q=q, k=k, v=k, scale=0.2))
        o, lse = merge([some, nothing])
        assert torch.allclose(o, some[0], atol=1e-6)
        assert torch.allclose(lse, some[1], atol=1e-6)


def test_the_registry_says_why() -> None:
    q = torch.randn(1, 1, 1, 4)
    call = DenseCall(q=q, k=q, v=q, scale=1.0, softcap=30.0)
    verdicts = dict(dense_registry().explain("attend_dense", call))
    assert verdicts["matmul"] == "chosen"
    assert "soft-capping" in verdicts["flash_cpu"]


def test_a_choice_is_remembered_for_calls_that_are_alike() -> None:
    registry, asked = OpRegistry(), []

    def refuses(call: int) -> str | None:
        asked.append(call)
        return None if call < 3 else "too large"

    registry.register_reference("op", abs)
    registry.register("op", "small", refuses, abs, priority=1)
    registry.register("op", "any", lambda _: None, abs)
    assert [registry.select("op", call, alike="small").name for call in (1, 2, 1)] == ["small"] * 3
    assert registry.select("op", 5, alike="large").name == "any"
    assert asked == [1, 5]
    assert registry.select("op", 2).name == "small"
    registry.register("op", "better", lambda _: None, abs, priority=2)
    assert registry.select("op", 1, alike="small").name == "better"
    assert registry.select("op", 1).name == "better"


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_few_queries_walk_the_pages_of_the_past(queries: int) -> None:
    """Several sequences at once, in order and not: pages for the past, fresh keys beside them."""
    paged = Paged(torch.float32, "full", None)
    call = LayerCall(scale=0.3)
    order = [2, 0, 3]
    first = [LENGTHS[i] - queries for i in order]
    q = torch.randn(len(order) * queries, QUERIES, DIM)
    past = [paged.pages[i].before(start) for i, start in zip(order, first, strict=True)]
    walks = DecodeTables(paged.group, past, queries).at(np.asarray(first) - 1)
    k, v = (torch.cat([x[i][-queries:] for i in order]) for x in (paged.k, paged.v))
    rows = None if queries == 2 else torch.randperm(len(q))
    if rows is not None:  # the step has them in another order
        q, k, v = (torch.empty_like(x).index_copy_(0, rows, x) for x in (q, k, v))
    few = [FewRows(rows, queries, walks)]
    if queries == 1:  # a single token is read from its page
        pages = [paged.pages[i] for i in order]
        few = [FewRows(rows, 1, DecodeTables(paged.group, pages).at(np.asarray(first)))]
    found = attend_rows(q, k, v, LAYER, few, [], call, full_registry())
    if rows is not None:
        found, q = found[rows], q[rows]
    for n, (i, start) in enumerate(zip(order, first, strict=True)):
        mine = slice(n * queries, (n + 1) * queries)
        assert (found[mine] - paged.reference(i, q[mine], start, call)[0]).abs().max() <= 1e-5


def test_raw_pages_are_gathered_for_many_rows() -> None:
    if cpu.available():
        pytest.skip(cpu.available())
    paged = Paged(torch.float32, "full", None)
    walks = DecodeTables(paged.group, paged.pages[:1]).at(np.asarray([20]))
    (piece,) = walks[0].own
    registry = full_registry()
    for rows, chosen in ((RAW_ROWS, "native"), (RAW_ROWS + 1, "unpack")):
        call = PagesCall(
            q=torch.randn(1, HEADS, rows, DIM),
            arena=piece.store.arena,
            addr=piece.addr,
            shift=0,
            fmt=piece.store.fmt,
            dtype=torch.float32,
            scale=1.0,
            read=partial(piece.read, 0, None),
            bias=piece.bias,
        )
        assert registry.select("attend_pages", call).name == chosen


@pytest.mark.parametrize(("kind", "window"), KINDS)
def test_prefill_masks_no_more_than_a_window(kind: str, window: int | None) -> None:
    """Full layers have no mask at all; the others none that grows with the past."""
    paged, count = Paged(torch.float32, kind, window), 300
    registry, masks = dense_registry(), []

    def watch(call: DenseCall) -> str | None:
        masks.append(0 if call.bias is None else call.bias.shape[-1])
        return "only looks"

    registry.register("attend_dense", "watch", watch, lambda _: None, priority=99)
    first = LENGTHS[3] - count
    past = past_of(paged.group, paged.pages[3], first)
    q = torch.randn(count, QUERIES, DIM)
    call = LayerCall(scale=0.3, kind=kind, window=window)
    attend_prefill(q, paged.k[3][first:], paged.v[3][first:], first, LAYER, past, call, registry)
    assert len(masks) >= 2
    assert max(masks) <= (0 if window is None else max(QUERY_TILE + window, SPAN_PAGES * SIZE))
