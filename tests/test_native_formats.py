"""The native kernel on every format there is, against attention in float32 over what the pages hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kvfold.codecs.calibrated import CalibratedBasis
from kvfold.codecs.pages import PageStore
from kvfold.codecs.rotation import Basis, Rotation
from kvfold.formats import BandFormat, PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.pages import HIDDEN, PagesCall

SIZE, HEADS = 32, 3

native = pytest.mark.skipif(cpu.available() is not None, reason=f"not built: {cpu.available()}")
every_build = pytest.mark.parametrize("variant", range(len(cpu.variants())), ids=cpu.variants())

Side = VectorFormat | BandFormat


def codes(dim: int, bits: int, group: int = 512, scales: str = "token") -> VectorFormat:
    return VectorFormat(dim=dim, bits=bits, quantized=True, group=group, rotation="none", scales=scales)  # type: ignore[arg-type]


def basis(fmt: Side) -> Basis:
    if not isinstance(fmt, BandFormat):
        return Rotation(fmt)
    # Keeps the leading dims, in quarters: as plain as a calibrated basis can be.
    keep = torch.eye(fmt.dim)[:, : fmt.stored_dim].expand(1, HEADS, -1, -1).contiguous()
    return CalibratedBasis(keep * 4, keep.mT.contiguous() / 4, torch.zeros(1, HEADS, fmt.dim))


@dataclass
class Case:
    """Full pages of two sequences, permuted in an arena full of NaN, and a call over them."""

    call: PagesCall
    k: Tensor
    v: Tensor

    def check(self, variant: int, error: float = 1e-3) -> None:
        found, lse = cpu.attend(self.call, variant)
        scores = torch.einsum("nhrd,nhsd->nhrs", self.call.q.double(), self.k.double()) * self.call.scale
        if self.call.softcap is not None:
            scores = torch.tanh(scores / self.call.softcap) * self.call.softcap
        if self.call.bias is not None:
            scores = scores + self.call.bias.double()[:, None, None]
        wanted = torch.einsum("nhrs,nhsd->nhrd", scores.softmax(-1), self.v.double())
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= error * wanted.norm()
        assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=error, atol=error)


def case(k: Side, v: Side, *, rows: int = 4, pages: int = 5, latent: bool = False, size: int = SIZE) -> Case:
    torch.manual_seed(k.dim + v.dim + rows)
    n = 2
    fmt = PageFormat(size, k, v)
    total = n * HEADS * pages
    store = PageStore(
        torch.full(((total + 2) * fmt.page_bytes,), 255, dtype=torch.uint8),
        fmt,
        torch.float32,
        bases=(basis(k), basis(v)),
    )
    addr = torch.randperm(total + 2)[:total] * fmt.page_bytes
    store.write_pages(addr, torch.randn(total, size, k.dim) + 0.5, torch.randn(total, size, v.dim) + 0.5, 0)
    addr = addr.view(n, HEADS, pages)
    keys, values = (side.read(addr, torch.float32) for side in (store.plain.k, store.plain.v))
    if latent:
        keys, values = torch.cat((keys, values), -1), keys
    call = PagesCall(
        q=torch.randn(n, HEADS, rows, keys.shape[-1]), arena=store.arena, addr=addr, shift=0, fmt=fmt,
        dtype=torch.float32, scale=keys.shape[-1] ** -0.5, read=lambda _: (keys, values), latent=latent,
    )  # fmt: skip
    return Case(call, keys, values)


@native
@every_build
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("dim", "group"), [(64, 32), (96, 32), (128, 64), (192, 128), (256, 128), (320, 128), (24, 8)])
def test_groups_of_dims_have_scales_of_their_own(variant: int, bits: int, dim: int, group: int) -> None:
    case(codes(dim, bits, group), codes(dim, bits, group)).check(variant)


@native
@every_build
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("dim", "size"), [(64, 32), (80, 16), (128, 128), (20, 24)])
def test_channels_have_scales_of_their_own(variant: int, bits: int, dim: int, size: int) -> None:
    case(codes(dim, bits, scales="channel"), codes(dim, 4), size=size).check(variant)


@native
@every_build
@pytest.mark.parametrize(
    "bands",
    [((8, 16), (4, 24), (2, 16)), ((4, 64),), ((2, 40),), ((8, 3), (4, 10), (2, 20)), ((8, 64), (2, 128))],
    ids=str,
)
def test_bands_of_calibrated_codes(variant: int, bands: tuple[tuple[int, int], ...]) -> None:
    dim = max(64, sum(dims for _, dims in bands))
    case(BandFormat(dim, bands), BandFormat(dim, bands[::-1] if len(bands) == 1 else bands)).check(variant)


@native
@every_build
@pytest.mark.parametrize(
    "k", [codes(512, 8, 128), codes(512, 4, 128), codes(512, 2, 128), VectorFormat.raw(512, 4)], ids=str
)
@pytest.mark.parametrize("v", [codes(64, 8), codes(64, 4), VectorFormat.raw(64, 4)], ids=str)
def test_latent_pages_are_key_and_value(variant: int, k: VectorFormat, v: VectorFormat) -> None:
    case(k, v, rows=9, pages=3, latent=True).check(variant)


@native
@every_build
@pytest.mark.parametrize("k", [codes(64, 4), VectorFormat.raw(64, 4)], ids=["int4", "raw"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 16, 33, 64, 65, 130])
def test_any_number_of_queries_shares_a_walk(variant: int, k: VectorFormat, rows: int) -> None:
    case(k, k, rows=rows).check(variant)


@native
@every_build
@pytest.mark.parametrize("k", [codes(64, 4), VectorFormat.raw(64, 4)], ids=["int4", "raw"])
def test_soft_caps_and_hidden_tokens(variant: int, k: VectorFormat) -> None:
    one = case(k, k)
    bias = torch.randn(2, one.k.shape[2])
    bias[torch.rand(bias.shape) < 0.4] = HIDDEN
    replace(one, call=replace(one.call, softcap=2.0)).check(variant)
    replace(one, call=replace(one.call, softcap=30.0, bias=bias)).check(variant)


@native
@every_build
def test_a_query_scores_the_same_alone_and_among_others(variant: int) -> None:
    many = case(codes(128, 4), codes(128, 4), rows=64).call
    _, together = cpu.attend(many, variant)
    for i in (0, 5, 63):
        _, alone = cpu.attend(replace(many, q=many.q[:, :, i : i + 1].contiguous()), variant)
        assert torch.allclose(alone[..., 0], together[..., i], atol=1e-5, rtol=0)


@native
@every_build
def test_what_is_not_a_number_is_not_hidden(variant: int) -> None:
    one = case(codes(64, 4), codes(64, 8))
    call = replace(one.call, q=one.call.q.clone())
    call.q[0, 1, 2, 5] = float("nan")
    o, _ = cpu.attend(call, variant)
    assert o[0, 1, 2].isnan().all()
    assert o[0, 1, [0, 1, 3]].isfinite().all()
    assert o[1].isfinite().all()
