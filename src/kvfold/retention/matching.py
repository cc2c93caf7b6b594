"""Making fewer tokens stand for more: what sample queries give to the tokens, and fits of weights and values to that.

Letters: ``R`` rows of sample queries (those of all query heads that read one KV head), ``n`` candidates, ``t`` tokens
that stand for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.retention.view import LayerView

if TYPE_CHECKING:
    from kvfold.geometry import Geometry

__all__ = ["References", "fit_factors", "fit_values", "merging_refusals"]

_SCORES = 1 << 24
"""Scores that are held at a time."""

_STEPS = 64
_TINY = 1e-30


def merging_refusals(name: str, geometry: Geometry) -> list[str]:
    """Why a method that writes tokens of its own cannot serve a model of this geometry."""
    if any(layer.kind == "latent" for layer in geometry.layers):
        return [f"{name} gives a token a key and a value of its own, which latent layers derive from one latent"]
    return []


class References:
    """Sample queries ``q [W, Hq, D]`` over all columns of a view. Each sees everything, wherever it stood, and its
    weights are taken times its ``importance [W]`` (None: 1).
    """

    def __init__(self, view: LayerView, q: Tensor, importance: Tensor | None = None) -> None:
        self.rows = q.float().unflatten(1, (view.kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # [H, R, D]
        self._importance = None if importance is None else importance.log().repeat(self.rows.shape[1] // q.shape[0])
        self._view = view
        self._keys = view.keys()
        self._bias = view.bias.masked_fill(~view.shown, -torch.inf)

    def parts(self, head: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time: the logs of their weights on the candidates ``[r, n]`` (biases in, minus infinity at
        padding), and the logs of the totals ``[r]`` of exponentials over all columns.
        """
        rows, sinks = self.rows[head], self._view.facts.sinks
        for some in torch.arange(rows.shape[0], device=rows.device).split(max(1, _SCORES // self._keys.shape[1])):
            scores = self._view.logits(rows[some], self._keys[head]) + self._bias[head]
            total = scores.logsumexp(1)
            if sinks is not None:  # rows come query head by query head
                logits = sinks.float().view(self._keys.shape[0], -1)[head]
                total = total.logaddexp(logits[some // (rows.shape[0] // logits.shape[0])])
            divisor = total if self._importance is None else total - self._importance[some]
            yield scores[:, self._view.candidates] - divisor[:, None], total

    def mean_weights(self, head: int) -> tuple[Tensor, Tensor]:
        """The logs of the candidates' mean weights ``[n]``, and of all rows' totals ``[R]``."""
        sums, totals = zip(*((weights.logsumexp(0), total) for weights, total in self.parts(head)), strict=True)
        return torch.stack(sums).logsumexp(0) - log(self.rows.shape[1]), torch.cat(totals)

    def mean_mass(self, head: int, keys: Tensor, totals: Tensor) -> Tensor:
        """The logs of the mean weights ``[t]`` that other ``keys [t, D]`` would have without biases, by the same
        totals.
        """
        logits = self._view.logits(self.rows[head], keys)
        return (logits - totals[:, None]).logsumexp(0) - log(totals.numel())


def fit_factors(a: Tensor, mass: Tensor, low: float, high: float) -> Tensor:
    """Factors ``w [t]`` in ``[low, high]`` that bring ``a @ w`` near ``mass [R]``, for weights ``a [R, t]``: least
    squares by accelerated projected gradients, a fixed number of steps from the best common factor on.

    Columns are scaled to one norm, else the few great ones set the pace; a column of zeros keeps the common factor.
    """
    if not a.shape[1]:
        return a.new_zeros(0)
    plain = a.sum(1)
    common = (plain @ mass / (plain @ plain).clamp_min(_TINY)).clamp(low, high)
    norm = a.norm(dim=0)
    norm = norm.clamp_min(1e-6 * norm.max().clamp_min(_TINY))
    scaled, least, most = a / norm, low * norm, high * norm
    direction = torch.ones_like(norm)
    for _ in range(12):  # towards the steepest direction, by which a step is bounded
        direction = torch.nn.functional.normalize(scaled.mT @ (scaled @ direction), dim=0)
    step = 1 / (1.1 * (scaled @ direction).square().sum()).clamp_min(_TINY)
    found = ahead = common * norm
    pace = 1.0
    for _ in range(_STEPS):
        before, pace_before = found, pace
        found = torch.clamp(ahead - step * (scaled.mT @ (scaled @ ahead - mass)), least, most)
        pace = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        ahead = found + (pace_before - 1) / pace * (found - before)
    factors: Tensor = found / norm
    return factors


def fit_values(a: Tensor, out: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Values ``[t, Dv]`` that bring ``a @ values`` near ``out [R, Dv]``, for weights ``a [R, t]``: ridge regression
    towards ``prior [t, Dv]``. ``ridge`` is relative to the mean of the system's diagonal, which is the smaller one of
    those among rows and among tokens.
    """
    rest = out - a @ prior
    wide = a.shape[1] > a.shape[0]
    gram = a @ a.mT if wide else a.mT @ a
    gram.diagonal().add_(ridge * gram.diagonal().mean() + _TINY)
    change: Tensor = a.mT @ torch.linalg.solve(gram, rest) if wide else torch.linalg.solve(gram, a.mT @ rest)
    return prior + change
