"""H2O (arXiv 2306.14048): heavy hitters, the tokens that have drawn most attention so far, stay.

``s[h, i] = mean_t mean_g a[h, g, t, i]``: attention weights of the queries ``t`` up to now that could see token ``i``,
by KV head ``h`` and the query heads ``g`` of its group, each over what was there when it was asked. Sum and number of
queries are carried on with their token (``per_token [H, columns, 2]``) through chunks, decode steps and retention. The
paper takes the plain sum, by which early tokens win because more queries have seen them; the mean is better at every
budget here (``python -m benchmarks.retention --methods h2o``), and it is what others run under this name.

Weights are made in blocks of queries and never held all at once. They are of this request's queries, so the result is
the request's own. Frees all but the kept share, other tokens in every head; costs eight bytes a token and KV head while
the sequence lives, and a second pass over the keys in every forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from kvfold.retention.method import Notes, RetentionMethod, Seen
from kvfold.retention.view import LayerView

__all__ = ["H2O"]

_WEIGHTS: Final = 2**20
"""Attention weights held at once for one KV head."""


@dataclass(frozen=True)
class H2O(RetentionMethod):
    """Keeps the tokens with the greatest mean of attention weights."""

    query_aware: ClassVar[bool] = True
    watches: ClassVar[int | None] = None

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Adds the weights of the new queries."""
        view, count = seen.view, seen.q.shape[0]
        columns, before = view.columns, view.columns - count
        old = seen.q.new_zeros((view.kv_heads, 0, 2)) if notes.per_token is None else notes.per_token
        noted = torch.nn.functional.pad(old.float(), (0, 0, 0, columns - old.shape[1])).clone()
        noted[:, :before, 1] += count
        noted[:, before:, 1] = torch.arange(count, 0, -1, device=noted.device)
        group = seen.q.shape[1] // view.kv_heads
        block = max(1, _WEIGHTS // (group * columns))
        for start in range(0, count, block):
            queries = seen.q[start : start + block]
            among = slice(0, before + start + queries.shape[0])
            for head, weights in enumerate(view.weights(queries, among=among)):
                noted[head, among, 0] += weights.mean(0).sum(0)
        notes.per_token = noted

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """The means."""
        if notes.per_token is None:
            raise ValueError("h2o has watched no forward of this sequence")
        mass, queries = notes.per_token[:, view.candidates].unbind(-1)
        return mass / queries.clamp_min(1)
