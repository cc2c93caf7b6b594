"""H2O (arXiv 2306.14048): heavy hitters, the tokens that have drawn most attention so far, stay.

``s[h, i] = sum_t mean_g a[h, g, t, i]``: attention weights of all queries ``t`` up to now, by KV head ``h`` and the
query heads ``g`` of its group, each over what was there when it was asked. The sum is carried on with its token
(``per_token [H, columns]``) through chunks, decode steps and retention. It is a plain sum, as in the paper, so that
early tokens, which more queries have seen, have had more chances.

Weights are made in blocks of queries and never held all at once. They are of this request's queries, so the result is
the request's own. Frees all but the kept share, other tokens in every head; costs four bytes a token and KV head while
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
    """Keeps the tokens with the greatest sum of attention weights."""

    query_aware: ClassVar[bool] = True
    watches: ClassVar[int | None] = None

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Adds the weights of the new queries."""
        view, count = seen.view, seen.q.shape[0]
        columns, before = view.columns, view.columns - count
        old = view.shown.new_zeros((view.kv_heads, 0)) if notes.per_token is None else notes.per_token
        mass = torch.nn.functional.pad(old.float(), (0, columns - old.shape[1]))
        group = seen.q.shape[1] // view.kv_heads
        block = max(1, _WEIGHTS // (group * columns))
        for start in range(0, count, block):
            queries = seen.q[start : start + block]
            among = slice(0, before + start + queries.shape[0])
            for head, weights in enumerate(view.weights(queries, among=among)):
                mass[head, among] += weights.mean(0).sum(0)
        notes.per_token = mass

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """The sums."""
        if notes.per_token is None:
            raise ValueError("h2o has watched no forward of this sequence")
        return notes.per_token[:, view.candidates]
