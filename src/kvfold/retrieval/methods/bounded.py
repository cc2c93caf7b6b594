"""vAttention (arXiv 2510.05688): the error of a step's attention is bounded, by sampling what is not read for sure.

Sinks, recent tokens, the ``pages`` best pages (by their bounds, see `quest`) and a uniform ``base`` sample of the
others are read exactly; the ``R`` pages left are sampled. Page ``i`` has ``d_i = sum_t exp(score_t)`` and an output
``o_i``; ``D``, ``o`` are the whole denominator and output, as they are estimated. Reading ``b`` pages with weight
``R / b`` puts the output off by ``sum_i w_i e_i / D`` with ``e_i = d_i (o_i - o)``, whose norm stays under ``eps |o|``
with probability ``1 - delta`` (central limit) if ``b >= (z_{1 - delta / 2} s R / (eps D |o|))^2``, ``s^2`` the variance
of ``e`` among the pages sampled so far, summed over dims. Pages are drawn until ``b`` of them are read, at least
``base``, and twice as many each time.

Where we deviate: the paper bounds numerator and denominator apart and adds the errors, ``e`` is the error of their
quotient, which is what is promised. Its samples are tokens and their number follows from the base sample alone; pages
are fewer and their masses uneven, a small base sample misses the heavy ones and asks for too little (on text, 16 pages
break ``delta = 0.05`` in 5 to 16 % of heads), so that every sample is judged again by all that it has found. Stopping
early where nothing heavy was found leaves a bias, far below ``eps``. Pages are drawn without replacement (``b`` becomes
``b R / (b + R)``); a KV head reads for the neediest query of its group. Frees no memory: it reads less.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from kvfold.kernels.merge import Piece, merge
from kvfold.retrieval.method import PagesView, RetrievalMethod

__all__ = ["Bounded"]


@dataclass(frozen=True)
class Bounded(RetrievalMethod):
    """Reads as many pages as keep the relative error of the output within ``eps``, but for a share ``delta`` of heads
    and steps. What is drawn follows from ``seed``, position, layer, head and page alone.
    """

    pages: int = 16
    eps: float = 0.05
    delta: float = 0.05
    base: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eps <= 1 or not 0 < self.delta < 1:
            raise ValueError("eps must be above 0 and at most 1, delta between 0 and 1")
        if self.base < 2:
            raise ValueError("base must be at least 2: a variance needs two pages")

    @property
    def least(self) -> int:
        """Best pages and base sample."""
        return self.pages + self.base

    def attend(self, view: PagesView) -> Piece:
        """Attention over best pages and base sample, and the estimate of the others'."""
        best = view.best(self.pages)
        others, count = self._drawn(view, best)
        base, others = others[..., : self.base], others[..., self.base :]
        found, there = [view.each(base)], [base >= 0]
        known = merge([view.attend(best), _joined(*found[0])])
        left, have = (count - self.base).clamp_min(0), torch.zeros_like(count)
        total = merge([view.rest, known])
        while True:
            o, lse = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
            sampled = torch.cat(there, dim=-1)
            wanted = self._budget(total, (o, lse), sampled, (left, have))
            more = torch.where(wanted > have, torch.maximum(wanted, 2 * have), have)
            if not bool((more > have).any()):
                break
            stop = torch.minimum(more, left)
            places = _between(others, have, stop)
            found.append(view.each(places))
            there.append(places >= 0)
            have = stop
        if len(found) == 1:
            return known
        group = lse.shape[-1] // left.shape[1]
        weight = (left / have.clamp_min(1)).clamp_min(1).log().repeat_interleave(group, dim=1)
        o, lse = _joined(o[:, self.base :], lse[:, self.base :])
        return merge([known, (o, lse + weight)])

    def _drawn(self, view: PagesView, best: Tensor) -> tuple[Tensor, Tensor]:
        """The pages that are not among the ``best [n, H, k]``, in random order, -1 behind them, and how many they are:
        ``[n, H, P]``, ``[n, H]``.
        """
        n, heads, pages = view.shape
        there, device = view.there, best.device
        free = torch.cat((there, there.new_zeros(n, heads, 1)), dim=-1)
        free = free.scatter(-1, torch.where(best >= 0, best, pages), False)[..., :pages]
        # Pages are counted as they are there: lists that neighbours have made longer draw the same.
        key = there.cumsum(-1) + (torch.arange(heads, device=device) << 32)[:, None]
        draw = _mixed(key ^ _mixed(view.positions + (view.layer << 40) + (self.seed << 50))[:, None, None])
        order = draw.masked_fill(~free, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)
        count = free.sum(-1)
        gone = torch.arange(pages, device=device) >= count[..., None]
        return order.masked_fill(gone, -1), count

    def _budget(self, known: Piece, pages: Piece, there: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
        """Pages ``[n, H]`` to sample of those left. ``known``: what is read exactly, ``o [n, Hq, Dv]``; ``pages``,
        ``o [n, m, Hq, Dv]``, ``lse [n, m, Hq]``: base sample and sample, as far as they are ``there [n, H, m]``;
        ``counts``: pages left beside the base sample, and sampled of them, ``[n, H]``.
        """
        (o, lse), (left, have) = pages, counts
        heads, group = left.shape[1], lse.shape[-1] // left.shape[1]
        rows = there.transpose(1, 2).repeat_interleave(group, dim=-1)  # [n, m, Hq]
        many, rest = rows.sum(1).clamp_min(1), left.repeat_interleave(group, dim=1)
        mass = (lse - known[1].unsqueeze(1)).exp() * rows
        weighed = mass.unsqueeze(-1) * o.float()
        # The sample stands for what is left; before there is one, the base sample does.
        stands = rows.clone()
        stands[:, : self.base] &= (have == 0).repeat_interleave(group, dim=1).unsqueeze(1)
        share = rest / stands.sum(1).clamp_min(1)
        denominator = 1 + share * (mass * stands).sum(1)
        numerator = known[0].float() + share.unsqueeze(-1) * (weighed * stands.unsqueeze(-1)).sum(1)
        error = weighed - mass.unsqueeze(-1) * (numerator / denominator.unsqueeze(-1)).unsqueeze(1)
        error = (error - (error.sum(1) / many.unsqueeze(-1)).unsqueeze(1)) * rows.unsqueeze(-1)
        variance = error.square().sum((1, -1)) / (many - 1).clamp_min(1)
        factor = NormalDist().inv_cdf(1 - self.delta / 2) * rest / (self.eps * numerator.norm(dim=-1))
        budget = factor.square() * variance
        budget = (budget * rest / (budget + rest).clamp_min(1)).nan_to_num(nan=torch.inf)
        most = budget.unflatten(1, (heads, group)).amax(-1).ceil()
        return torch.minimum(most.clamp_min(self.base), left).to(torch.int64)


def _between(places: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """``places [n, H, P]`` from the ``start``-th to before the ``stop [n, H]``-th, -1 behind them: ``[n, H, m]``."""
    number = torch.arange(int((stop - start).max()), device=places.device) + start.unsqueeze(-1)
    inside = number < stop.unsqueeze(-1)
    return places.gather(-1, number.clamp_max(places.shape[-1] - 1)).masked_fill(~inside, -1)


def _joined(o: Tensor, lse: Tensor) -> Piece:
    """Pages ``o [n, m, Hq, Dv]``, ``lse [n, m, Hq]`` as one piece."""
    total = lse.logsumexp(1)
    return ((lse - total.unsqueeze(1)).exp().unsqueeze(-1) * o.float()).sum(1), total


def _mixed(x: Tensor) -> Tensor:
    """int64 numbers, not negative, that look random: the last steps of SplitMix64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ (x >> 31)) & ((1 << 62) - 1)
