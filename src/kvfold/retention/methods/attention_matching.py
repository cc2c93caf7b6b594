"""Attention Matching (arXiv 2602.16284): few synthetic tokens that give what all candidates gave.

For a KV head with candidates ``k [n, D]``, ``v [n, Dv]`` and a sample of queries ``q [R, D]`` (the sequence's own, of
all query heads that read the KV head), with weights ``a[r, i] = exp(q_r.k_i + b_i) / Z_r`` over all columns, sinks and
recent tokens included, and times the query's importance, in closed form::

    s_i   = (mean_r a[r, i]^2)^(1/2)                                     scores [n]; the best t stay: keys C [t, D]
    w     = argmin_w sum_r (sum_j a[r, j] w_j - sum_i a[r, i])^2         w [t] in [e^-3, e^7]; bias += log w
    p     = a[:, C] * w, its rows scaled to the sums of those of a       [R, t]
    C_v   = argmin |p C_v - a v|^2 + ridge * |C_v - v[C]|^2              values [t, Dv]

``w`` matches the mass that the candidates have beside all other tokens, so that the fit holds beside those to come, and
``C_v`` their output. Frees all but the kept share, other tokens in every head; every kept token is encoded anew, and
takes 4 more bytes for its bias. The queries are let go once they are used.

The sample is the ``latest`` queries and at most ``spread`` more from all over the context, each as if it saw all of
it; the latest together count as much as the others. With ``latest=0`` nothing favours what was asked last. Where we
deviate: the paper's better and much slower choice of keys (orthogonal matching pursuit), its self-study conversations
and its head budgets are not there; least squares are weighted by the candidates' share of a query's attention, and
values lean towards the kept tokens' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import Tensor

from kvfold.retention.matching import References, fit_factors, fit_values, merging_refusals
from kvfold.retention.method import Merged, Notes, RetentionMethod, Seen
from kvfold.retention.sample import QuerySample
from kvfold.retention.view import LayerView

if TYPE_CHECKING:
    from kvfold.geometry import Geometry

__all__ = ["AttentionMatching"]

_FACTORS: Final = (exp(-3.0), exp(7.0))


@dataclass(frozen=True)
class AttentionMatching(RetentionMethod):
    """Fits biases and values of the tokens most attended to what sampled queries get of all candidates."""

    latest: int = 256
    spread: int = 1024
    ridge: float = 1e-2

    watches: ClassVar[int | None] = None
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.latest, self.spread) < 0 or self.latest + self.spread < 1 or self.ridge <= 0:
            raise ValueError("latest and spread count queries, at least one in all, and ridge is positive")

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """Whether the latest queries count for more than others."""
        return self.latest > 0

    def refusals(self, geometry: Geometry) -> list[str]:
        """Latent layers."""
        return merging_refusals("attention_matching", geometry)

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Samples queries."""
        self._sample.observe(seen, notes)

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """Root of the mean square of the sampled queries' weights."""
        references = self._references(view, notes)
        squares = [
            torch.stack([(2 * weights).logsumexp(0) for weights, _ in references.parts(head)]).logsumexp(0)
            for head in range(view.kv_heads)
        ]
        return (torch.stack(squares) / 2).exp()

    def merge(self, view: LayerView, notes: Notes, scores: Tensor, kept: Tensor) -> Merged:
        """See the module."""
        references = self._references(view, notes)
        self._sample.forget(notes)
        keys, values, bias = (x[:, view.candidates] for x in (view.keys(), view.values(), view.bias))
        place = kept.clamp_min(0)
        fits = [
            self._fit(references, head, values[head], place[head], kept[head] >= 0) for head in range(view.kv_heads)
        ]
        k = keys.gather(1, place[..., None].expand(-1, -1, keys.shape[-1]))
        factors = torch.stack([w for w, _ in fits])
        v = torch.stack([found for _, found in fits])
        return Merged(k, v, bias.gather(1, place) + factors.log(), torch.ones_like(kept, dtype=torch.bool))

    def _fit(
        self, references: References, head: int, values: Tensor, place: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Factors ``[t]`` and values ``[t, Dv]`` of a head for the candidates ``place [t]``, where ``there``."""
        parts = []
        for logs, _ in references.parts(head):
            weights = logs.exp()
            parts.append((weights[:, place] * there, weights.sum(1), weights @ values))
        own, mass, out = (torch.cat(x) for x in zip(*parts, strict=True))
        factors = fit_factors(own, mass, *_FACTORS)
        shares = own * factors
        shares = shares * (mass / shares.sum(1).clamp_min(torch.finfo(mass.dtype).tiny))[:, None]
        return factors, fit_values(shares, out, values[place], self.ridge)

    def _references(self, view: LayerView, notes: Notes) -> References:
        return References(view, self._sample.queries(notes), self._sample.importance(notes))

    @property
    def _sample(self) -> QuerySample:
        return QuerySample(self.latest, self.spread)
