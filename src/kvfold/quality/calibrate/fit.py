"""From moments to bases: the transform in which errors are independent and equally dear, and the best steps in it.

With ``F`` the Fisher information of a head's vectors and ``S`` their second moment, the cost ``e' F e`` is a plain sum
of squares in coordinates ``x F^(1/2)``, and the Karhunen-Loeve transform there, the eigenvectors of
``F^(1/2) S F^(1/2)``, makes the coordinates independent: the classical transform code with a weighted error (Goyal,
IEEE SP Magazine 18(5), 2001). OSCAR (arXiv 2605.17757) rotates into the eigenvectors of the queries' second moment
and mixes them; here they stay sorted, so that each can have bits of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.calibration import WIDTHS
from kvfold.quality.calibrate.observe import Moments

__all__ = ["Fitted", "fit"]

Fitted = dict[str, Tensor]
"""The arrays of one side of one layer, by name: see `kvfold.calibration`."""

_FLOOR = 1e-6  # of the largest eigenvalue: directions that hardly matter keep a little weight
_LEAST = 1e-30  # and of heads that do not matter at all, so that nothing overflows in float32
_TRIED = {
    8: (0.03, 0.04, 0.05, 0.065, 0.08, 0.11, 0.15, 0.2),
    4: (0.28, 0.33, 0.38, 0.44, 0.52, 0.62, 0.75),
    2: (0.8, 0.9, 1.0, 1.1, 1.25, 1.45),
}
"""Steps that are tried, in standard deviations: from the best for a Gaussian to those for heavy tails."""


def fit(moments: Moments, *, centred: bool = False) -> Fitted:
    """The basis of one side of one layer, its best steps, and what they cost in nats per token.

    ``centred``: the mean comes off first. A constant part of keys changes no weight among them, and would take the
    leading dims.
    """
    rows = torch.cat(moments.rows, dim=1).float()
    means = moments.sums.cpu() / moments.count * centred
    heads = [
        _fit_head(
            moments.vectors[h].cpu() / moments.count - means[h].outer(means[h]),
            moments.gradients[h].cpu() / moments.count,
            rows[h] - means[h].float(),
        )
        | {"mean": means[h]}
        for h in range(rows.shape[0])
    ]
    return {name: torch.stack([head[name] for head in heads]).float().contiguous() for name in heads[0]}


def _fit_head(vectors: Tensor, fisher: Tensor, rows: Tensor) -> Fitted:
    root, inverse = _roots(fisher)
    variance, directions = torch.linalg.eigh(root @ vectors @ root)
    variance, directions = variance.flip(0), directions.flip(1)
    deviation = variance.clamp_min(float(variance.max()) * _FLOOR**2).clamp_min(_LEAST).sqrt()
    encode = (root @ directions) / deviation
    decode = deviation[:, None] * (directions.mT @ inverse)
    coordinates = rows @ encode.float()
    steps, squares = zip(*(_best_step(coordinates, bits) for bits in WIDTHS), strict=True)
    nothing = coordinates.square().mean(0)
    # Half of the Fisher-weighted error is the KL divergence.
    cost = torch.stack([*squares, nothing]) * deviation.square().float() / 2
    return {"encode": encode, "decode": decode, "step": torch.stack(steps), "distortion": cost}


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(max(float(values.max()) * _FLOOR, _LEAST)).sqrt()
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT


def _best_step(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """For each column of ``x [n, D]`` the step with the least mean square error ``[D]``, and that error ``[D]``."""
    half = (2**bits - 1) / 2
    errors = []
    for step in _TRIED[bits]:
        codes = (x / step + half).round().clamp(0, 2 * half)
        errors.append(((codes - half) * step - x).square().mean(0))
    least, which = torch.stack(errors).min(0)
    return torch.tensor(_TRIED[bits])[which], least
