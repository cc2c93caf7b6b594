"""The calibrated basis: for each layer and KV head, the directions in which an error costs least, sorted.

``store`` takes a key or value ``x [D]`` to ``x @ encode [D, r]``, in units of static steps; ``restore`` takes it back
by ``decode [r, D]``. The two are not orthogonal: ``decode`` inverts ``encode`` on the kept dims. Queries therefore go
through ``decode`` transposed, ``q . (y @ decode) = (q @ decode.T) . y``, and outputs through ``decode``, both once per
step. How the matrices are found: `kvfold.calibration`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.calibration import Calibration, Side
from kvfold.formats import BandFormat, PageFormat

__all__ = ["CalibratedBasis", "calibrated_bases"]


class CalibratedBasis:
    """The `Basis` of the layers of a group. ``encode [L, H, D, r]``, ``decode [L, H, r, D]``, float32.

    Computes in float32, whatever it is given; ``store`` and ``restore`` return float32, ``query`` and ``output`` the
    dtype of their input.
    """

    is_identity = False

    def __init__(self, encode: Tensor, decode: Tensor) -> None:
        self._encode = encode
        self._decode = decode

    def store(self, x: Tensor, layer: int | None) -> Tensor:
        """See `Basis`."""
        return _by_head(x.float(), self._of(self._encode, layer))

    def restore(self, x: Tensor, layer: int | None) -> Tensor:
        """See `Basis`."""
        return _by_head(x.float(), self._of(self._decode, layer))

    def query(self, q: Tensor, layer: int) -> Tensor:
        """See `Basis`."""
        return self._grouped(q, self._decode[layer].mT)

    def output(self, o: Tensor, layer: int) -> Tensor:
        """See `Basis`."""
        return self._grouped(o, self._decode[layer])

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
        pairs = [calibration.matrices(layer, side, bands.bands) for layer in layers]
        encode, decode = (
            torch.stack([torch.from_numpy(x) for x in each]).to(device) for each in zip(*pairs, strict=True)
        )
        return CalibratedBasis(encode, decode)

    if not isinstance(fmt.k, BandFormat) or not isinstance(fmt.v, BandFormat):
        raise TypeError(f"{fmt} is not a format of calibrated pages")
    return basis("k", fmt.k), basis("v", fmt.v)


def _by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Pages ``[P, S, D]`` or rows ``[N, D]``, the ``M`` matrices' turn fastest, by ``matrices [M, D, r]``."""
    pages = x.unflatten(0, (-1, matrices.shape[0]))
    if x.dim() == 2:
        return torch.einsum("nhd,hdr->nhr", pages, matrices).flatten(0, 1)
    return torch.matmul(pages, matrices).flatten(0, 1)
