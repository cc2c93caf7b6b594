"""Kept pages with logit biases: every way of attending to them agrees with the plain reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.attention.kept import KeptPages
from kvfold.attention.pieces import LayerCall
from kvfold.attention.rows import FewRows, PrefillRows, attend_rows
from kvfold.attention.tables import Blocks, DecodeTables, GroupPages, SequencePages, past_of
from kvfold.codecs.pages import PageStore
from kvfold.formats import PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.catalog import full_registry
from kvfold.kernels.dense import dense_registry
from kvfold.kernels.merge import Piece, merge, with_sinks
from kvfold.kernels.pages import unpack_with
from kvfold.kernels.reference import attend, paged_attend
from kvfold.kernels.registry import OpRegistry

HEADS, GROUP, DIM, LAYERS = 2, 3, 32, 2
PAGES = 40  # places in the arena
EMPTY = Blocks(np.zeros(0, np.int64), np.zeros(0, np.int64))


def torch_registry() -> OpRegistry:
    """Everything in plain torch: pages are unpacked and handed to dense attention."""
    registry = dense_registry()
    registry.register_reference("attend_pages", paged_attend)
    registry.register("attend_pages", "unpack", lambda call: None, unpack_with(registry))
    return registry


REGISTRIES = {"native": full_registry, "torch": torch_registry}


@dataclass
class Kept:
    """A sequence of which retention has left ragged lists of biased pages, in an arena full of NaN."""

    group: GroupPages
    pages: KeptPages
    generator: torch.Generator

    @classmethod
    def make(cls, bits: int, size: int, counts: list[int], seed: int, *, biased: bool = True) -> Kept:
        side = VectorFormat.raw(DIM, 4) if bits == 32 else VectorFormat(DIM, bits, True, 128, "hadamard")
        raw = VectorFormat.raw(DIM, 4)
        formats = PageFormat(size, raw, raw), PageFormat(size, side, side)
        arena = torch.full((PAGES * max(each.page_bytes for each in formats),), 255, dtype=torch.uint8)
        stores = [PageStore(arena, fmt, torch.float32, heads=HEADS, layers=LAYERS) for fmt in formats]
        group = GroupPages(stores[0], None if bits == 32 else stores[1], HEADS, "full", None)
        generator = torch.Generator().manual_seed(seed)
        number = torch.tensor(counts).view(LAYERS, HEADS)
        total = int(number.sum())
        flat = torch.randperm(PAGES, generator=generator)[:total] * group.kept_store.fmt.page_bytes
        k, v = (torch.randn(total, size, DIM, generator=generator) for _ in range(2))
        group.kept_store.write_pages(flat, k, v, 0)
        # From tokens that hardly count to some that stand for a thousand.
        bias = 3 * torch.randn(total * size, generator=generator) if biased else None
        return cls(group, KeptPages(number, flat, bias), generator)

    def rows(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.randn(count, n, DIM, generator=self.generator) for n in (HEADS * GROUP, HEADS, HEADS))  # type: ignore[return-value]

    def truth(self, layer: int, q: Tensor, call: LayerCall) -> Piece:
        """What the queries get of the kept tokens, by the reference, head by head."""
        size, begin = self.group.kept_store.fmt.block_size, int(self.pages.counts[:layer].sum())
        outs = []
        for head in range(HEADS):
            count = int(self.pages.counts[layer, head])
            addr = self.pages.flat[begin : begin + count]
            bias = None if self.pages.bias is None else self.pages.bias[begin * size : (begin + count) * size]
            k, v = (x.float().flatten(0, 1)[:, None] for x in self.group.kept_store.decode_pages(addr, layer))
            begin += count
            nowhere = {"q_pos": torch.zeros(len(q), dtype=torch.int64), "k_pos": torch.zeros(len(k), dtype=torch.int64)}
            rows = q[:, head * GROUP : (head + 1) * GROUP]
            outs.append(attend(rows, k, v, **nowhere, scale=call.scale, softcap=call.softcap, bias=bias))
        o, lse = (torch.cat(x, dim=1) for x in zip(*outs, strict=True))
        return o, lse


def close(found: Tensor, want: Tensor, tolerance: float) -> None:
    assert torch.isfinite(found).all()
    assert float((found - want).norm() / want.norm()) <= tolerance


PLANS = {
    "bits": st.sampled_from((32, 8, 4)),
    "size": st.sampled_from((4, 8, 16)),
    "counts": st.lists(st.integers(1, 5), min_size=LAYERS * HEADS, max_size=LAYERS * HEADS),
    "softcap": st.sampled_from((None, 4.0)),
    "layer": st.integers(0, LAYERS - 1),
    "seed": st.integers(0, 99),
}


@pytest.mark.parametrize("registry", REGISTRIES)
@settings(max_examples=25, deadline=None)
@given(**PLANS)
def test_decoding_over_biased_pages(registry: str, bits, size, counts, softcap, layer, seed) -> None:
    """A batch of two: biased pages, and the same without biases."""
    if registry == "native" and not cpu.variants():
        pytest.skip("no native kernels here")
    kept = Kept.make(bits, size, counts, seed)
    plain = KeptPages(kept.pages.counts, kept.pages.flat)
    call = LayerCall(scale=0.3, softcap=softcap)
    q, k, v = kept.rows(2)
    sequences = [SequencePages(EMPTY, EMPTY, pages) for pages in (kept.pages, plain)]
    walks = DecodeTables(kept.group, sequences).at(np.zeros(2, np.int64))
    found = attend_rows(q, k, v, layer, [FewRows(None, 1, walks)], [], call, REGISTRIES[registry]())
    close(found[0], kept.truth(layer, q[:1], call)[0][0], 2e-3)
    without = Kept(kept.group, plain, kept.generator)
    close(found[1], without.truth(layer, q[1:], call)[0][0], 2e-3)
    assert (found[0] - kept.truth(layer, q[:1], call)[0][0]).norm() < (found[0] - found[1]).norm()


@pytest.mark.parametrize("registry", REGISTRIES)
@pytest.mark.parametrize("few", [True, False])
@settings(max_examples=15, deadline=None)
@given(**PLANS, tokens=st.integers(2, 9))
def test_a_chunk_over_biased_pages(registry: str, few: bool, bits, size, counts, softcap, layer, seed, tokens) -> None:
    """Fresh tokens, causal among themselves, over what was kept: walked as it lies, or unpacked; with learned sinks."""
    if registry == "native" and not cpu.variants():
        pytest.skip("no native kernels here")
    kept = Kept.make(bits, size, counts, seed)
    sinks = torch.linspace(-1, 1, HEADS * GROUP)
    call = LayerCall(scale=0.3, softcap=softcap, sinks=sinks)
    q, k, v = kept.rows(tokens)
    pages = SequencePages(EMPTY, EMPTY, kept.pages)
    if few:
        walks = DecodeTables(kept.group, [pages], tokens).at(np.zeros(1, np.int64))
        plan: tuple[list[FewRows], list[PrefillRows]] = ([FewRows(None, tokens, walks)], [])
    else:
        plan = [], [PrefillRows(0, tokens, 100, past_of(kept.group, pages, 100))]
    found = attend_rows(q, k, v, layer, *plan, call, REGISTRIES[registry]())
    places = torch.arange(tokens)
    own = attend(q, k, v, q_pos=places, k_pos=places, scale=call.scale, softcap=softcap)
    want, _ = with_sinks(merge([kept.truth(layer, q, call), own]), sinks)
    close(found, want, 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_keep_their_precision_where_pages_are_unpacked(dtype: torch.dtype) -> None:
    """One of two equal tokens, both with great biases, counts three times: the model's dtype would round that away."""
    side = VectorFormat.raw(DIM, 2)
    store = PageStore(torch.zeros(1 << 14, dtype=torch.uint8), PageFormat(2, side, side), dtype)
    values = torch.stack([torch.zeros(DIM), torch.ones(DIM)])[None].to(dtype)
    store.write_pages(torch.zeros(1, dtype=torch.int64), torch.ones(1, 2, DIM).to(dtype), values, 0)
    bias = 50 + torch.tensor([1.0, 3.0]).log()
    pages = KeptPages(torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), bias)
    group = GroupPages(store, None, 1, "full", None)
    q = torch.ones(1, 1, DIM).to(dtype)
    walks = DecodeTables(group, [SequencePages(EMPTY, EMPTY, pages)]).at(np.zeros(1, np.int64))
    out = attend_rows(q, q, q, 0, [FewRows(None, 1, walks)], [], LayerCall(scale=0.1), torch_registry())
    assert float((out.float() - 0.75).abs().max()) < 8e-3
