"""KVzip (arXiv 2505.23416): what a model looks at to repeat its context stays.

The context is read, then repeated to the model behind an instruction to do so, chunk by chunk
(:mod:`kvfold.replay`). ``s[h, i] = max_{g, w} a[h, g, w, i]``: the largest attention weight that column ``i`` gets from
any query ``w`` of the repetition, of any query head ``g`` of KV head ``h``. Softmax over the sinks, the columns of the
chunk itself and the repetition so far; where an earlier retention has moved tokens, over all columns. No question is
needed, so that what is left serves any. Pages are dealt over all layers and heads of a group by their scores, as the
paper does with tokens. Frees all but the kept share, other tokens and other numbers of them in every head.

Tokens that were never repeated, such as answers, count as if they had all the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.retention.dealing import deal_by_score
from kvfold.retention.method import Notes, RetentionMethod, Seen
from kvfold.retention.view import LayerView

__all__ = ["KVzip"]

_QUERIES = 256  # of a block: what bounds the memory of weights


@dataclass(frozen=True)
class KVzip(RetentionMethod):
    """Keeps what the repetition of the context looks at."""

    replays: ClassVar[bool] = True

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Takes the largest weights of a repetition; of other forwards only that their tokens are new."""
        known = notes.per_token
        if known is None:
            known = seen.q.new_empty((seen.view.kv_heads, 0), dtype=torch.float32)
        known = torch.nn.functional.pad(known, (0, seen.view.columns - known.shape[1]), value=torch.nan)
        if seen.replay is not None:
            among = slice(*seen.replay) if seen.view.whole else slice(None)
            known = known.clone()
            # fmax: a number wins over the NaN of what was never seen.
            known[:, among] = torch.fmax(known[:, among], _largest_weights(seen, among))
        notes.per_token = known

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """The largest weight of each candidate."""
        if notes.per_token is None:
            return torch.ones(view.kv_heads, view.columns, device=view.device)[:, view.candidates]
        return notes.per_token[:, view.candidates].nan_to_num(nan=1.0)

    def deal(self, scores: Sequence[Tensor], pages: int, size: int, layers: Sequence[int]) -> Tensor:
        """By the scores of all heads together."""
        return deal_by_score(scores, pages, size)


def _largest_weights(seen: Seen, among: slice) -> Tensor:
    """``[H, n]``: the largest weight of each column of ``among``."""
    view, own, count = seen.view, seen.k, seen.q.shape[0]
    sinks = min(view.candidates.start, among.start or 0)
    if sinks:  # they are part of the softmax, and their own weights are not asked for
        own = torch.cat((view.keys(slice(0, sinks)).transpose(0, 1).to(own.dtype), own))
    before = own.shape[0] - count
    best = None
    for start in range(0, count, _QUERIES):
        stop = min(count, start + _QUERIES)
        blocks = view.weights(seen.q[start:stop], own=own[: before + stop], among=among)
        found = torch.stack([weights.amax((0, 1)) for weights in blocks])
        best = found if best is None else torch.maximum(best, found)
    if best is None:
        raise ValueError("a repetition without queries")
    return best
