"""From logits to tokens, for a whole batch at once.

All plain greedy rows cost one reduction. Other rows are worked on together where they can be: a request's draw needs
one uniform number from its own generator and arithmetic on its own row, so its tokens do not depend on its neighbours.

transformers' processors are used where they serve (repetition penalty). Its top-k, top-p and min-p warpers sort the
whole vocabulary for every row, which costs more than a small model's step; here only the candidates are sorted. The
result is the same set of tokens, except that top-k keeps exactly ``k`` where equal logits straddle the border.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from kvfold.engine.request import SamplingParams

__all__ = ["RowSampler", "Sampled", "TokenLogprob", "sample"]

_NUCLEUS_START = 256
"""Candidates sorted first for top-p; a row whose nucleus is larger is sorted again, eight times as wide."""


class TokenLogprob(NamedTuple):
    """Token id, its log-probability, and its rank in the vocabulary (1: the likeliest)."""

    token: int
    logprob: float
    rank: int


@dataclass(slots=True)
class Sampled:
    """The outcome for a batch of rows."""

    tokens: list[int]
    """One for each row; without meaning where the row is in ``bad``."""
    bad: list[int] = field(default_factory=list)
    """Rows whose logits hold NaN or infinity, or are all minus infinity."""
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    """For the rows that ask: the chosen token first, then the likeliest ones."""


class _TokenCounts:
    """The distinct tokens of one row's prompt and completion, and how often each was generated."""

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._slot = {token: slot for slot, token in enumerate(distinct)}
        self._ids: npt.NDArray[np.int64] = np.zeros(max(64, 2 * len(distinct)), dtype=np.int64)
        self._ids[: len(distinct)] = distinct
        self._counts: npt.NDArray[np.float32] = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def copy(self) -> _TokenCounts:
        twin = _TokenCounts(())
        twin._slot, twin._ids, twin._counts = dict(self._slot), self._ids.copy(), self._counts.copy()
        return twin

    def seen(self, device: torch.device) -> torch.Tensor:
        """Distinct tokens of prompt and completion, int64 [U]."""
        return torch.from_numpy(self._ids[: len(self._slot)]).to(device)

    def generated(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct generated tokens, int64 [U], and how often, float32 [U]."""
        used = len(self._slot)
        hit = self._counts[:used] > 0
        return torch.from_numpy(self._ids[:used][hit]).to(device), torch.from_numpy(self._counts[:used][hit]).to(device)


class RowSampler:
    """How one completion samples: parameters made ready, its generator, its token counts.

    ``plain`` rows (greedy, no penalty, nothing barred) need no other state and no `accept`.
    """

    __slots__ = ("_barred", "_counts", "_generated", "_min_tokens", "_penalty", "_random", "params", "plain")

    def __init__(
        self, params: SamplingParams, *, prompt: Sequence[int] = (), end_ids: Sequence[int] = (), seed: int = 0
    ) -> None:
        """``prompt``: token ids the repetition penalty counts in. ``end_ids``: tokens barred for ``min_tokens``."""
        self.params = params
        self._random = None if params.greedy else random.Random(seed)
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
            if params.repetition_penalty != 1.0
            else None
        )
        counted = self._penalty is not None or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._counts = _TokenCounts(prompt) if counted else None
        self._min_tokens = params.min_tokens
        self._generated = 0
        self._barred: list[int] = list(end_ids) if params.min_tokens > 0 else []
        self.plain = params.greedy and not counted and not self._barred

    @property
    def filters(self) -> tuple[int, float, float]:
        """(top_k, top_p, min_p); rows with equal filters are worked on together."""
        return max(self.params.top_k, 0), self.params.top_p, self.params.min_p

    def uniform(self) -> float:
        """The row's next draw from [0, 1)."""
        return self._random.random() if self._random is not None else 0.0

    def accept(self, token: int) -> None:
        """The row's completion has grown by ``token``."""
        self._generated += 1
        if self._barred and self._generated >= self._min_tokens:
            self._barred = []
            self.plain = self.params.greedy and self._counts is None
        if self._counts is not None:
            self._counts.add(token)

    def fork(self, seed: int) -> RowSampler:
        """A row in the same state with a generator of its own."""
        twin = RowSampler(self.params, seed=seed)
        twin._counts = None if self._counts is None else self._counts.copy()
        twin._barred, twin._generated, twin.plain = list(self._barred), self._generated, self.plain
        return twin

    def penalise(self, scores: torch.Tensor) -> None:
        """Bar end tokens and apply the penalties to ``scores`` float32 [V], in place."""
        if self._barred:
            scores[self._barred] = -math.inf
        if self._counts is None:
            return
        if self._penalty is not None:
            seen = self._counts.seen(scores.device)
            scores.copy_(self._penalty(seen[None], scores[None])[0])
        presence, frequency = self.params.presence_penalty, self.params.frequency_penalty
        if presence or frequency:
            ids, counts = self._counts.generated(scores.device)
            scores[ids] -= counts * frequency + presence


def sample(logits: torch.Tensor, rows: Sequence[RowSampler]) -> Sampled:
    """Choose a token for each row of ``logits`` float32 [B, V] (left as they are)."""
    best, choice = logits.max(dim=-1)  # a NaN anywhere in a row is its maximum
    tokens: list[int] = choice.tolist()
    bad = [i for i, value in enumerate(best.tolist()) if not math.isfinite(value)]
    worked = [i for i, row in enumerate(rows) if not row.plain and i not in bad]
    if worked:
        chosen = _work(_rows_of(logits, worked, len(rows)), [rows[i] for i in worked])
        for i, token in zip(worked, chosen, strict=True):
            tokens[i] = token
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and i not in bad]
    reports = _logprobs(logits[asked], [tokens[i] for i in asked], [rows[i] for i in asked]) if asked else []
    return Sampled(tokens, bad, dict(zip(asked, reports, strict=True)))


def _rows_of(logits: torch.Tensor, which: list[int], total: int) -> torch.Tensor:
    """A private copy of the rows ``which``."""
    return logits.clone() if len(which) == total else logits[which]


def _work(scores: torch.Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Tokens of rows that are not plain. ``scores`` float32 [R, V] is overwritten."""
    for i, row in enumerate(rows):
        row.penalise(scores[i])
    best, choice = scores.max(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if not drawn:
        return list(map(int, choice.tolist()))
    # Greedy rows among them are divided by one and thrown away: cheaper than taking the others apart.
    heat = torch.tensor([row.params.temperature or 1.0 for row in rows], device=scores.device)
    scores.sub_(best[:, None]).div_(heat[:, None])
    uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=scores.device)
    groups: dict[tuple[int, float, float], list[int]] = {}
    for i in drawn:
        groups.setdefault(rows[i].filters, []).append(i)
    for filters, members in groups.items():
        if len(members) == len(rows):
            return list(map(int, _draw(scores, uniform, *filters).tolist()))
        choice[members] = _draw(scores[members], uniform[members], *filters)
    return list(map(int, choice.tolist()))


def _draw(scores: torch.Tensor, uniform: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Tokens int64 [R] drawn from ``scores`` [R, V] (highest is 0) after the three filters."""
    vocab = scores.shape[-1]
    if 0 < top_k < vocab:
        candidates, ids = scores.topk(top_k, dim=-1)
        if top_p < 1.0:
            candidates = _nucleus(candidates, candidates.logsumexp(dim=-1, keepdim=True), top_p)[0]
    elif top_p < 1.0:
        return _draw_nucleus(scores, uniform, top_p, min_p, _NUCLEUS_START)
    else:
        candidates, ids = scores, None
    picked = _invert(_above(candidates, min_p), uniform)
    return picked if ids is None else ids.gather(1, picked[:, None])[:, 0]


def _draw_nucleus(scores: torch.Tensor, uniform: torch.Tensor, top_p: float, min_p: float, width: int) -> torch.Tensor:
    """As `_draw` with top-p alone, on the ``width`` likeliest tokens; rows for which they do not do go round again."""
    width = min(width, scores.shape[-1])
    candidates, ids = scores.topk(width, dim=-1)
    kept, mass = _nucleus(candidates, scores.logsumexp(dim=-1, keepdim=True), top_p)
    tokens = ids.gather(1, _invert(_above(kept, min_p), uniform)[:, None])[:, 0]
    if width < scores.shape[-1]:
        short = (mass < top_p).nonzero()[:, 0]
        if len(short):
            tokens[short] = _draw_nucleus(scores[short], uniform[short], top_p, min_p, 8 * width)
    return tokens


def _nucleus(candidates: torch.Tensor, log_total: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``candidates`` [R, K], highest first, without those behind the first ``top_p`` of probability; and the mass of
    all.
    """
    probability = (candidates - log_total).exp()
    mass = probability.cumsum(dim=-1, dtype=torch.float64)
    behind = mass - probability >= top_p
    behind[:, 0] = False
    return candidates.masked_fill(behind, -math.inf), mass[:, -1]


def _above(candidates: torch.Tensor, min_p: float) -> torch.Tensor:
    """``candidates`` [R, K] (highest is 0) without those less than ``min_p`` times as likely as the highest."""
    return candidates.masked_fill(candidates < math.log(min_p), -math.inf) if min_p > 0.0 else candidates


def _invert(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The place in each row of ``scores`` [R, K] at which the cumulated probability passes ``uniform`` [R]; int64
    [R].
    """
    cumulated = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp_(max=scores.shape[-1] - 1)


def _logprobs(logits: torch.Tensor, tokens: list[int], rows: Sequence[RowSampler]) -> list[list[TokenLogprob]]:
    """For each row of ``logits`` [R, V]: the chosen token, then as many of the likeliest as it asks for."""
    scores = logits.log_softmax(dim=-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])
    ranks = ((scores > chosen).sum(dim=-1) + 1).tolist()
    wanted = [min(row.params.logprobs or 0, scores.shape[-1]) for row in rows]
    top, top_ids = scores.topk(max(wanted), dim=-1)
    reports = []
    for i, (values, ids) in enumerate(zip(top.tolist(), top_ids.tolist(), strict=True)):
        report = [TokenLogprob(tokens[i], float(chosen[i, 0]), int(ranks[i]))]
        likeliest = zip(ids[: wanted[i]], values[: wanted[i]], strict=True)
        report += [TokenLogprob(t, v, k) for k, (t, v) in enumerate(likeliest, 1) if t != tokens[i]]
        reports.append(report)
    return reports
