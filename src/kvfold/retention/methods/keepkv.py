"""KeepKV (arXiv 2504.09936): what is dropped is merged into what stays, and votes for it.

For a KV head with keys ``k [n, D]``, values ``v [n, Dv]`` and votes ``p [n]`` (1 for a token of its own; a token counts
as ``p exp(q.k)``), reference queries ``q [R, D]`` with softmax totals ``Z [R]`` over all columns, and a dropped token
``e`` whose nearest kept token (cosine of keys) is ``c``, at least ``similarity`` away from it, cluster ``C`` = ``c``
and all such ``e``::

    w_i  = mean_r p_i exp(q_r.k_i) / Z_r              weights of candidates [n]
    k_C  = sum_C w_i k_i / sum_C w_i                  v_C = sum_C w_i v_i / sum_C w_i
    log p_C = log(sum_C w_i) - log(mean_r exp(q_r.k_C) / Z_r),  at most log(sum_C p_i)

``log p_C`` is the token's logit bias. With one reference query, the cluster's weight and its part of the output are
exactly what its tokens gave together (zero perturbation), and ``p_C`` lies between the mean and the sum of the votes;
identical keys have the sum. Others are dropped, or stay as they are.

Where we deviate: the paper keeps ``p_C = sum_C p_i`` and stretches the merged key so that the reference query's score
comes right, which is unstable where scores are near 0 and changes every other query's score in proportion; here the key
is the mean and the votes are set. Clusters are merged at once instead of pair by pair, and the reference is the mean
over the latest ``latest`` queries of all query heads that read the KV head. Frees all but the kept share, other tokens
in every head; merged tokens are encoded anew, and a kept token takes 4 more bytes for its bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvfold.retention.matching import References, merging_refusals
from kvfold.retention.method import Composed, Merged, Notes, RetentionMethod, Seen
from kvfold.retention.methods.snapkv import SnapKV
from kvfold.retention.sample import QuerySample
from kvfold.retention.view import LayerView

if TYPE_CHECKING:
    from kvfold.geometry import Geometry

__all__ = ["KeepKV"]

_PRODUCTS = 1 << 24  # similarities that are held at a time


@dataclass(frozen=True)
class KeepKV(Composed):
    """Merges dropped tokens into the most similar kept ones of the ``inner`` method; below ``similarity`` they go."""

    inner: RetentionMethod = field(default_factory=SnapKV)
    similarity: float = 0.8
    latest: int = 256

    watches: ClassVar[int | None] = None
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not -1 <= self.similarity <= 1 or self.latest < 1:
            raise ValueError("similarity is a cosine, from -1 to 1, and latest is positive")
        if self.inner.merges:
            raise ValueError("the inner method merges, too")

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """Always: what is merged is weighed by the latest queries."""
        return True

    def refusals(self, geometry: Geometry) -> list[str]:
        """Those of the inner one; and latent layers, whose keys are not free to be averaged apart from their values."""
        return [*self.inner.refusals(geometry), *merging_refusals("keepkv", geometry)]

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Remembers the latest queries."""
        self.inner.observe(seen, notes)
        QuerySample(self.latest, 0).observe(seen, notes)

    def merge(self, view: LayerView, notes: Notes, scores: Tensor, kept: Tensor) -> Merged:
        """See the module."""
        references = References(view, QuerySample(self.latest, 0).queries(notes))
        QuerySample.forget(notes)
        there = scores > -torch.inf
        heads = [self._head(view, references, head, there[head], kept[head]) for head in range(view.kv_heads)]
        k, v, bias, fresh = (torch.stack(x) for x in zip(*heads, strict=True))
        return Merged(k, v, bias, fresh)

    def _head(
        self, view: LayerView, references: References, head: int, there: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, biases ``[m]`` of one head's kept tokens, and which of them are clusters."""
        k, v, votes = (x[head] for x in (view.keys(view.candidates), view.values(view.candidates), view.bias))
        votes, size = votes[view.candidates], kept.numel() + 1
        cluster = self._clusters(k, there, kept)
        weight, totals = references.mean_weights(head)
        weight = weight.where(there, -torch.inf)
        most = weight.new_full((size,), -torch.inf).scatter_reduce(0, cluster, weight, "amax")
        share = (weight - most[cluster]).nan_to_num(0.0).exp().masked_fill(~there, 0.0)  # of the cluster's heaviest
        total, voters, count = (
            share.new_zeros(size).index_add(0, cluster, x)[:-1] for x in (share, votes.exp(), there.float())
        )
        share = (share / torch.cat((total, total.new_ones(1)))[cluster])[:, None]
        merged_k, merged_v = (x.new_zeros(size, x.shape[1]).index_add(0, cluster, share * x)[:-1] for x in (k, v))
        bias = most[:-1] + total.log() - references.mean_mass(head, merged_k, totals)
        fresh = count > 1
        bias = torch.minimum(bias, voters.log()).where(fresh, votes[kept.clamp_min(0)])
        return merged_k, merged_v, bias, fresh

    def _clusters(self, k: Tensor, there: Tensor, kept: Tensor) -> Tensor:
        """Which of the ``kept [m]`` tokens each candidate ``[n]`` goes into; ``m``: into none."""
        own = kept[kept >= 0]
        unit = torch.nn.functional.normalize(k, dim=-1)
        cluster = torch.full(there.shape, kept.numel(), dtype=torch.int64, device=k.device)
        if own.numel():
            for some in torch.arange(k.shape[0], device=k.device).split(max(1, _PRODUCTS // own.numel())):
                like, nearest = (unit[some] @ unit[own].mT).max(dim=1)
                cluster[some] = nearest.where((like >= self.similarity) & there[some], kept.numel())
            cluster[own] = torch.arange(own.numel(), device=k.device)
        return cluster
