"""Fitting a layer's map: a linear one in closed form, and one with a layer between by gradient descent; the better one
on passages held out is kept.

What is fitted is the logarithm of the score, so that a head that needs a thousandth as much as another one is fitted as
well as that one. All numbers are put to mean 0 and variance 1 for the fit, and the scales folded into the map after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvfold.quality.train_retention.collect import LayerPairs
from kvfold.retention.scorer import TokenMap

__all__ = ["Fitted", "fit_layer", "log_scores"]

_LEAST_SCORE: Final = 1e-6  # weights below are as good as none, and their logarithms only noise
_RIDGES: Final = (1e-3, 3e-2, 1.0)  # of the variance of an input: the less there is to learn from, the more it takes
_BATCH: Final = 512
_EPOCHS: Final = 8
_LEAST_STEPS: Final = 1000  # of a descent, in more epochs where there is little
_PATIENCE: Final = 3  # epochs without a better loss
_RATE: Final = 4e-3


@dataclass(frozen=True, slots=True)
class Fitted:
    """The map of a layer, the name of its kind, and, for each head, how it does on held-out tokens: the share of the
    variance of the logarithms that it explains (``r2``) and Spearman's rank correlation.
    """

    map: TokenMap
    kind: str
    r2: tuple[float, ...]
    spearman: tuple[float, ...]


def log_scores(scores: Tensor) -> Tensor:
    """What is fitted to ``scores``: their natural logarithms."""
    return scores.clamp_min(_LEAST_SCORE).log()


def fit_layer(pairs: LayerPairs, held_out: Tensor, *, width: int, seed: int) -> Fitted:
    """The best map of a layer; ``held_out [n]`` of its pairs are not learnt from but decide. ``width``: of the layer
    between; 0: only a linear map is tried.
    """
    x, y = pairs.hidden[~held_out], log_scores(pairs.scores[~held_out])
    test_x, test_y = pairs.hidden[held_out].float(), log_scores(pairs.scores[held_out])
    mean, scale = _moments(x)
    centre, spread = y.mean(0), y.std(0).clamp_min(1e-6)
    standard = _Standard(mean, scale, centre, spread)
    wanted, judged = (y - centre) / spread, (test_y - centre) / spread
    maps = [("linear", standard.folded(weight, y.new_zeros(y.shape[1]))) for weight in _ridges(x, wanted, standard)]
    if width:
        own = standard.inputs(test_x), judged
        maps.append(("mlp", standard.folded(*_descend(x, wanted, standard, own, width, seed))))
    losses = [float(((found(test_x) - test_y) / spread).square().mean()) for _, found in maps]
    kind, best = maps[losses.index(min(losses))]
    guess = best(test_x)
    return Fitted(best, kind, _explained(guess, test_y), _rank_correlation(guess, test_y))


@dataclass(frozen=True, slots=True)
class _Standard:
    """Means and deviations of inputs ``[E]`` and of what is fitted ``[H]``."""

    mean: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor

    def inputs(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.scale

    def folded(self, weight: Tensor, bias: Tensor, inner: tuple[Tensor, Tensor] | None = None) -> TokenMap:
        """The map of numbers as they are, from one of standardized numbers."""
        if inner is None:
            weight = weight / self.scale
            bias = bias - weight @ self.mean
        else:
            first = inner[0] / self.scale
            inner = first, inner[1] - first @ self.mean
        return TokenMap(weight * self.spread[:, None], bias * self.spread + self.centre, inner)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[E]`` of half-precision rows, a batch at a time."""
    total, squares = (torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
    for rows in x.split(1 << 14):
        total += rows.double().sum(0)
        squares += rows.double().square().sum(0)
    mean = total / x.shape[0]
    variance = (squares / x.shape[0] - mean.square()).clamp_min(0)
    # A number that hardly varies would be blown up where it does.
    floor = float(variance.mean()) * 1e-4 + 1e-12
    return mean.float(), variance.clamp_min(floor).sqrt().float()


def _ridges(x: Tensor, y: Tensor, standard: _Standard) -> list[Tensor]:
    """Weights ``[H, E]`` with the least squares, for each of `_RIDGES`."""
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for rows, wanted in zip(x.split(1 << 14), y.split(1 << 14), strict=True):
        inputs = standard.inputs(rows).double()
        gram += inputs.T @ inputs
        cross += inputs.T @ wanted.double()
    unit = x.shape[0] * torch.eye(x.shape[1], dtype=torch.float64)
    return [torch.linalg.solve(gram + ridge * unit, cross).T.float() for ridge in _RIDGES]


def _descend(
    x: Tensor, y: Tensor, standard: _Standard, test: tuple[Tensor, Tensor], width: int, seed: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Weights of the two layers, from the epoch that did best on ``test``."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(width, x.shape[1], generator=generator) * x.shape[1] ** -0.5
    outer = torch.randn(y.shape[1], width, generator=generator) * width**-0.5
    weights = [inner, torch.zeros(width), outer, torch.zeros(y.shape[1])]
    weights = [nn.Parameter(weight) for weight in weights]
    steps = -(-x.shape[0] // _BATCH)
    epochs = max(_EPOCHS, -(-_LEAST_STEPS // steps))
    patience = max(_PATIENCE, epochs // _EPOCHS * _PATIENCE)
    optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=epochs * steps)
    best, best_loss, since = [weight.detach().clone() for weight in weights], float("inf"), 0
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(x.shape[0], generator=generator).split(_BATCH):
                optimizer.zero_grad()
                functional.mse_loss(_forward(weights, standard.inputs(x[rows])), y[rows]).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                loss = float(functional.mse_loss(_forward(weights, test[0]), test[1]))
            since += 1
            if loss < best_loss:
                best, best_loss, since = [weight.detach().clone() for weight in weights], loss, 0
            elif since >= patience:
                break
    return best[2], best[3], (best[0], best[1])


def _forward(weights: list[nn.Parameter], x: Tensor) -> Tensor:
    return functional.linear(functional.gelu(functional.linear(x, weights[0], weights[1])), weights[2], weights[3])


def _explained(guess: Tensor, wanted: Tensor) -> tuple[float, ...]:
    errors = (guess - wanted).square().mean(0)
    return tuple((1 - errors / wanted.var(0, correction=0).clamp_min(1e-12)).tolist())


def _rank_correlation(guess: Tensor, wanted: Tensor) -> tuple[float, ...]:
    ranks = [x.argsort(0).argsort(0).double() for x in (guess, wanted)]
    a, b = (x - x.mean(0) for x in ranks)
    return tuple(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)).tolist())
