"""The calibrated basis: for each layer and KV head, the directions in which an error costs least, sorted.

``store`` takes a key or value ``x [D]`` to ``(x - mean) @ encode [D, r]``, in units of static steps; ``restore`` takes
it back by ``decode [r, D]``. The two are not orthogonal: ``decode`` inverts ``encode`` on the kept dims. Queries go
through ``decode`` transposed, ``q . (y @ decode) = (q @ decode.T) . y``, and outputs through ``decode``, both once per
step. The mean of keys adds the same ``q . mean`` to all scores of a piece, and so to the log of its sum of
exponentials; values have none. How the matrices are found: `kvfold.calibration`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.calibration import Calibration, Side
from kvfold.formats import BandFormat, PageFormat
from kvfold.kernels.cpu.rows import Turn

__all__ = ["CalibratedBasis", "calibrated_bases"]


class CalibratedBasis:
    """The `Basis` of the layers of a group. ``encode [L, H, D, r]``, ``decode [L, H, r, D]`` and
    ``mean [L, H, D]``, float32.

    Computes in float32, whatever it is given; ``store`` and ``restore`` return float32, ``query`` and ``output`` the
    dtype of their input.
    """

    is_identity = False

    def __init__(self, encode: Tensor, decode: Tensor, mean: Tensor) -> None:
        self._encode = encode
        self._decode = decode
        self._mean = mean if bool(mean.any()) else None

    @property
    def turn(self) -> Turn:
        """See `Basis`."""
        return Turn(
            encode=self._encode.flatten(0, 1),
            decode=self._decode.flatten(0, 1),
            mean=None if self._mean is None else self._mean.flatten(0, 1),
        )

    def store(self, x: Tensor, layer: int | None) -> Tensor:
        """See `Basis`."""
        return _by_head(self._moved(x.float(), layer, -1), self._of(self._encode, layer))

    def restore(self, x: Tensor, layer: int | None) -> Tensor:
        """See `Basis`."""
        return self._moved(_by_head(x.float(), self._of(self._decode, layer)), layer, 1)

    def query(self, q: Tensor, layer: int) -> Tensor:
        """See `Basis`."""
        return self._grouped(q, self._decode[layer].mT)

    def offset(self, q: Tensor, layer: int) -> Tensor | None:
        """See `Basis`."""
        if self._mean is None:
            return None
        heads = q.float().unflatten(-2, (self._mean.shape[1], -1))
        return torch.einsum("...hgd,hd->...hg", heads, self._mean[layer]).flatten(-2)

    def output(self, o: Tensor, layer: int) -> Tensor:
        """See `Basis`."""
        return self._grouped(o, self._decode[layer])

    def _moved(self, x: Tensor, layer: int | None, sign: int) -> Tensor:
        """Pages or rows with the means of their heads added (or taken off)."""
        if self._mean is None:
            return x
        mean = self._of(self._mean, layer)
        apart = x.unflatten(0, (-1, mean.shape[0]))
        return torch.add(apart, mean if x.dim() == 2 else mean[:, None], alpha=sign).flatten(0, 1)

    @staticmethod
    def _of(matrices: Tensor, layer: int | None) -> Tensor:
        return matrices.flatten(0, 1) if layer is None else matrices[layer]

    @staticmethod
    def _grouped(x: Tensor, matrices: Tensor) -> Tensor:
        """``x [..., Hq, D] @ matrices [H, D, r]``: the query heads of a KV head share its matrix."""
        heads = x.unflatten(-2, (matrices.shape[0], -1))
        return torch.einsum("...hgd,hdr->...hgr", heads.float(), matrices).flatten(-3, -2).to(x.dtype)


def calibrated_bases(
    path: str, layers: Sequence[int], fmt: PageFormat, device: torch.device
) -> tuple[CalibratedBasis, CalibratedBasis]:
    """The bases of keys and values for the layers of a group whose packed pages are ``fmt``."""
    calibration = Calibration.load(path)

    def basis(side: Side, bands: BandFormat) -> CalibratedBasis:
        found = [calibration.matrices(layer, side, bands.bands) for layer in layers]
        encode, decode, mean = (
            torch.stack([torch.from_numpy(x) for x in each]).to(device) for each in zip(*found, strict=True)
        )
        return CalibratedBasis(encode, decode, mean)

    if not isinstance(fmt.k, BandFormat) or not isinstance(fmt.v, BandFormat):
        raise TypeError(f"{fmt} is not a format of calibrated pages")
    return basis("k", fmt.k), basis("v", fmt.v)


def _by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Pages ``[P, S, D]`` or rows ``[N, D]``, the ``M`` matrices' turn fastest, by ``matrices [M, D, r]``."""
    pages = x.unflatten(0, (-1, matrices.shape[0]))
    if x.dim() == 2:
        return torch.einsum("nhd,hdr->nhr", pages, matrices).flatten(0, 1)
    return torch.matmul(pages, matrices).flatten(0, 1)
