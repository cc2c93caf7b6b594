"""Codecs from elsewhere, as small functions: affine codes, TurboQuant, KIVI, OScaR, OSCAR, flat transform codes, rank.

Every code makes a number of what it was given, rounded as it would be stored; scales, zeros and norms are bfloat16 and
counted. Formulas are those of the papers: TurboQuant 2504.19874, KIVI 2402.02750, OSCAR 2605.17757.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from benchmarks.codecs.learn import SIDES, Learned, Weight
from benchmarks.codecs.protocol import Fold
from torch import Tensor

from kvfold.calibration import Side
from kvfold.codecs import banded as kvfold_banded
from kvfold.codecs.affine import quantize
from kvfold.codecs.calibrated import CalibratedBasis
from kvfold.codecs.rotation import hadamard_matrix
from kvfold.formats import BandFormat

__all__ = ["FAMILIES", "Codec", "affine", "bit_reversed", "by_side", "lloyd_max", "native"]

Code = Callable[[Tensor], Tensor]
"""Vectors ``[H, T, D]`` as they are read back."""

_TOKENS: Final = 64  # KIVI's group
_META: Final = 32  # bits of a scale and a zero
_NORM: Final = 16
_FLOOR: Final = 1e-6  # of the largest eigenvalue


@dataclass(frozen=True, slots=True)
class Codec:
    """``bits``: stored for each number of keys and values, all metadata counted. ``note``: what else is to be known."""

    family: str
    name: str
    bits: float
    fold: Fold
    note: str = ""


def flat(learned: Learned) -> Iterator[Codec]:
    """Scale and zero for each token, in the model's basis and in the Hadamard basis: the latter, with keys that keep
    their projection on themselves, is kvfold's.
    """
    mix = hadamard_matrix(learned.dim)

    def plain(bits: int) -> Fold:
        return _both(lambda x: affine(x, bits))

    def mixed(bits: int, *, inner: bool = False, projected: bool = False) -> Fold:
        return by_side(
            lambda _, k: affine(k @ mix, bits, inner=inner, projected=projected) @ mix.mT,
            lambda _, v: affine(v @ mix, bits) @ mix.mT,
        )

    for name, bits, fold in (
        ("identity, 4 bits", 4, plain(4)),
        ("identity, 3 bits", 3, plain(3)),
        ("identity, 2 bits", 2, plain(2)),
        ("Hadamard, 4 bits", 4, mixed(4)),
        ("Hadamard, 4 bits, projected keys (`int4`)", 4, mixed(4, projected=True)),
        ("Hadamard, 3 bits", 3, mixed(3)),
        ("Hadamard, 2 bits", 2, mixed(2)),
        ("Hadamard, 2 bits, inner levels", 2, mixed(2, inner=True)),
        ("Hadamard, 2 bits, inner levels, projected keys (`int2`)", 2, mixed(2, inner=True, projected=True)),
    ):
        yield Codec("affine", name, bits + _META / learned.dim, fold)


def turboquant(learned: Learned) -> Iterator[Codec]:
    """A norm for each token, random signs, Hadamard, and the best codebook for a Gaussian."""
    signs = torch.randint(0, 2, (learned.dim,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    rotation = signs[:, None] * hadamard_matrix(learned.dim)

    def fold(bits: int, corrected: bool) -> Fold:
        return _both(lambda x: _turbo(x, rotation, bits, corrected=corrected))

    for bits in (4, 3, 2):
        meta = _NORM / learned.dim
        yield Codec("TurboQuant", f"TurboQuant, {bits} bits", bits + meta, fold(bits, False))
        yield Codec("TurboQuant", f"TurboQuant, {bits} bits, norm correction", bits + meta, fold(bits, True))


def per_channel(learned: Learned) -> Iterator[Codec]:
    """Keys by channel over 64 tokens: plain (KIVI), after Hadamard (kvfold), with token norms taken out too (OScaR)."""
    mix = hadamard_matrix(learned.dim)
    meta = (_META / _TOKENS + _META / learned.dim) / 2
    norm = _NORM / (learned.dim * learned.heads) / 2

    def kivi(bits: int) -> Fold:
        return by_side(lambda _, k: _channels(k, bits), lambda _, v: affine(v, bits))

    def without_norms(k: Tensor, bits: int) -> Tensor:
        rows = k @ mix
        norms = rows.square().sum((0, 2), keepdim=True).sqrt().clamp_min(1e-12).bfloat16().float()  # all heads together
        return (_channels(rows / norms, bits) * norms) @ mix.mT

    def oscar_norms(bits: int) -> Fold:
        return by_side(lambda _, k: without_norms(k, bits), lambda _, v: affine(v @ mix, bits) @ mix.mT)

    def ours(bits: int) -> Fold:
        return by_side(
            lambda _, k: _channels(k @ mix, bits, inner=bits == 2) @ mix.mT, lambda _, v: affine(v @ mix, bits) @ mix.mT
        )

    for bits in (4, 2):
        yield Codec("per channel", f"KIVI, {bits} bits", bits + meta, kivi(bits))
    for bits in (4, 2):
        name = f"Hadamard by channel (`int{bits},scales=channel,block=64`)"
        yield Codec("per channel", name, bits + meta, ours(bits))
    for bits in (4, 2):
        yield Codec("per channel", f"OScaR token norms, {bits} bits", bits + meta + norm, oscar_norms(bits))


def oscar(learned: Learned) -> Iterator[Codec]:
    """Eigenvectors of the queries' second moment (keys) and of the values', mixed: all dims at the same bits."""
    # With one group of dims the order after the mixing changes nothing; it is kept because the method has it.
    mix = hadamard_matrix(learned.dim)[:, bit_reversed(learned.dim)]
    keys = {i: _eigenvectors(learned.queries[i]).float() @ mix for i in learned.layers}
    attended = {i: _eigenvectors(learned.attended(i)).float() @ mix for i in learned.layers}
    plain = {i: _eigenvectors(learned.second(i, "v")).float() @ mix for i in learned.layers}

    def fold(bits: int, values: dict[int, Tensor], k_clip: float, v_clip: float) -> Fold:
        return by_side(
            lambda i, k: affine(k @ keys[i], bits, k_clip) @ keys[i].mT,
            lambda i, v: affine(v @ values[i], bits, v_clip) @ values[i].mT,
        )

    meta = _META / learned.dim
    for bits in (4, 2):
        name = f"OSCAR, {bits} bits"
        yield Codec("OSCAR", name, bits + meta, fold(bits, attended, 0.96, 0.92))
        yield Codec("OSCAR", f"{name}, plain moment of values", bits + meta, fold(bits, plain, 0.96, 0.92))
        yield Codec("OSCAR", f"{name}, not clipped", bits + meta, fold(bits, attended, 1.0, 1.0))


def whitened(learned: Learned) -> Iterator[Codec]:
    """Coordinates in which errors are equally dear, the mean of keys taken out, mixed: all dims at the same bits."""
    mix = hadamard_matrix(learned.dim)

    def fold(by: Weight) -> Callable[[int], Fold]:
        pairs = {(i, s): _whiten(learned, i, s, by) for i in learned.layers for s in SIDES}

        def code(layer: int, side: Side, x: Tensor, bits: int) -> Tensor:
            (there, back), mean = pairs[layer, side], learned.mean(layer, side)
            return affine((x - mean) @ there @ mix, bits) @ mix.mT @ back + mean

        return lambda bits: by_side(lambda i, k: code(i, "k", k, bits), lambda i, v: code(i, "v", v, bits))

    for word, at in (("query", fold("query")), ("Fisher", fold("fisher"))):
        for bits in (4, 2):
            name = f"flat transform, {word} weight, {bits} bits"
            yield Codec("whitened", name, bits + _META / learned.dim, at(bits))


def truncated(learned: Learned) -> Iterator[Codec]:
    """Low rank: the leading dims of kvfold's calibrated basis at 8 bits, the others dropped."""
    for share in (0.99, 0.95):
        yield _low_rank(learned, share)


def _low_rank(learned: Learned, share: float) -> Codec:
    formats: dict[tuple[int, Side], BandFormat] = {}
    ranks: dict[Side, list[int]] = {side: [] for side in SIDES}
    for (i, side), fitted in learned.fitted.items():
        energy = fitted["distortion"][:, -1].sum(0).cumsum(0)
        rank = int((energy < share * energy[-1]).sum()) + 1
        ranks[side].append(rank)
        formats[i, side] = BandFormat(learned.dim, ((8, -(-rank // 8) * 8),))
    bits = sum(8 * fmt.token_bytes for fmt in formats.values()) / len(formats) / learned.dim
    note = f"rank of keys {_range(ranks['k'])}, of values {_range(ranks['v'])} of {learned.dim}"
    return Codec("rank", f"rank: {share:.0%} of the energy at 8 bits", bits, native(learned, formats), note)


FAMILIES: Final[tuple[Callable[[Learned], Iterator[Codec]], ...]] = (
    flat,
    turboquant,
    per_channel,
    oscar,
    whitened,
    truncated,
)


def native(learned: Learned, formats: dict[tuple[int, Side], BandFormat]) -> Fold:
    """kvfold's own calibrated code, through its own encoder and decoder."""
    calibration = learned.calibration()
    bases = {
        (i, side): CalibratedBasis(*(torch.from_numpy(x)[None] for x in calibration.matrices(i, side, fmt.bands)))
        for (i, side), fmt in formats.items()
    }

    def code(layer: int, side: Side, x: Tensor) -> Tensor:
        fmt, basis = formats[layer, side], bases[layer, side]
        stored = kvfold_banded.encode(basis.store(x, 0), fmt)
        return basis.restore(kvfold_banded.decode(*stored, fmt, torch.float32), 0)

    return by_side(lambda i, k: code(i, "k", k), lambda i, v: code(i, "v", v))


def by_side(keys: Callable[[int, Tensor], Tensor], values: Callable[[int, Tensor], Tensor]) -> Fold:
    """A fold of one function for keys and one for values; both know the layer."""
    return lambda layer, k, v: (keys(layer, k), values(layer, v))


def affine(
    x: Tensor, bits: int, clip: float = 1.0, *, inner: bool = False, projected: bool = False, dim: int = -1
) -> Tensor:
    """A scale and a zero for all numbers along ``dim``; the range is shrunk about its middle to ``clip``. kvfold's own
    arithmetic (and meaning of ``inner`` and ``projected``), at any bits.
    """
    if clip < 1.0:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        middle, half = (low + high) / 2, (high - low) / 2 * clip
        x = torch.minimum(torch.maximum(x, middle - half), middle + half)
    codes, scale, zero = quantize(x, dim, bits, inner=inner)
    if projected:
        gain = x.square().sum(dim, keepdim=True) / ((codes * scale + zero) * x).sum(dim, keepdim=True)
        gain = torch.where((gain > 0.5) & (gain < 2.0), gain, 1.0)
        scale, zero = ((part * gain).bfloat16().float() for part in (scale, zero))
    return codes * scale + zero


@lru_cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The codebook with the least mean square error for a normal distribution."""
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    points = normal.icdf((torch.arange(2**bits).double() + 0.5) / 2**bits)
    edge = torch.tensor([float("inf")]).double()
    for _ in range(500):
        edges = torch.cat((-edge, (points[1:] + points[:-1]) / 2, edge))
        height, below = normal.log_prob(edges).exp(), normal.cdf(edges)
        points = (height[:-1] - height[1:]) / (below[1:] - below[:-1])
    return tuple(points.tolist())


def bit_reversed(dim: int) -> Tensor:
    """The permutation that reverses the bits of indices below ``dim``; all of them if that is no power of two."""
    width = dim.bit_length() - 1
    if dim != 1 << width:
        return torch.arange(dim)
    return torch.tensor([int(f"{i:0{width}b}"[::-1], 2) if width else 0 for i in range(dim)])


def _turbo(x: Tensor, rotation: Tensor, bits: int, *, corrected: bool) -> Tensor:
    norm: Tensor = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    codebook = torch.tensor(lloyd_max(bits), dtype=torch.float32) / x.shape[-1] ** 0.5
    codes = torch.bucketize((x / norm) @ rotation, (codebook[1:] + codebook[:-1]) / 2)
    points = codebook[codes]
    if corrected:
        points = points / points.norm(dim=-1, keepdim=True)
    read: Tensor = norm.bfloat16().float() * (points @ rotation.mT)
    return read


def _channels(x: Tensor, bits: int, *, inner: bool = False) -> Tensor:
    """Scale and zero for each channel and 64 tokens; the last group of a prompt may be shorter."""
    return torch.cat([affine(part, bits, inner=inner, dim=-2) for part in x.split(_TOKENS, dim=1)], 1)


def _whiten(learned: Learned, layer: int, side: Side, by: Weight) -> tuple[Tensor, Tensor]:
    """``[H, D, D]`` to coordinates with errors equally dear, sorted by variance, and back."""
    values, vectors = torch.linalg.eigh(learned.weight(layer, side, by))
    scale = values.clamp_min(values.amax(-1, keepdim=True) * _FLOOR).sqrt()[:, None]
    root, inverse = (vectors * scale) @ vectors.mT, (vectors / scale) @ vectors.mT
    mean = learned.mean(layer, side).double()
    turn = torch.linalg.eigh(root @ (learned.second(layer, side) - mean.mT @ mean) @ root)[1].flip(-1)
    return (root @ turn).float(), (turn.mT @ inverse).float()


def _eigenvectors(matrix: Tensor) -> Tensor:
    """The most important first."""
    vectors: Tensor = torch.linalg.eigh(matrix)[1]
    return vectors.flip(-1)


def _both(code: Code) -> Fold:
    return by_side(lambda _, k: code(k), lambda _, v: code(v))


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
