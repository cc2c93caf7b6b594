"""From logits to tokens, for a whole batch at once.

All plain greedy rows cost one reduction. Other rows are worked on together where they can be: a request's draw needs
one uniform number from its own generator and arithmetic on its own row, so its tokens do not depend on its neighbours.

transformers' processors are used where they serve (repetition penalty). Its top-k, top-p and min-p warpers sort the
whole vocabulary for every row, which costs more than a small model's step; here only the candidates are sorted. The
result is the same set of tokens, except that top-k keeps exactly ``k`` where equal logits straddle the border: the
first ones.
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

_BLOCK = 64
"""Neighbours in the vocabulary whose probabilities are summed up first when a token is drawn."""


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

    @property
    def alters(self) -> bool:
        """Whether `penalise` would change the logits."""
        return bool(self._barred) or self._counts is not None

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
    highest, tokens = _likeliest(logits)
    bad = [i for i, value in enumerate(highest) if not math.isfinite(value)]
    worked = [i for i, row in enumerate(rows) if not row.plain and i not in bad]
    if worked:
        scores = logits if len(worked) == len(rows) else logits[worked]
        chosen = _work(scores, [rows[i] for i in worked])
        for i, token in zip(worked, chosen, strict=True):
            tokens[i] = token
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and i not in bad]
    reports = _logprobs(logits[asked], [tokens[i] for i in asked], [rows[i] for i in asked]) if asked else []
    return Sampled(tokens, bad, dict(zip(asked, reports, strict=True)))


def _likeliest(logits: torch.Tensor) -> tuple[list[float], list[int]]:
    """The highest of each row of ``logits`` [B, V], and the first of its places; NaN counts as the highest."""
    if logits.device.type == "cpu":
        rows = logits.numpy()
        places = rows.argmax(axis=-1)  # several times as fast as torch's
        return rows[np.arange(len(rows)), places].tolist(), places.tolist()
    highest, choice = logits.max(dim=-1)
    return highest.tolist(), choice.tolist()


def _work(logits: torch.Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Tokens of rows that are not plain, from ``logits`` float32 [R, V] (left as they are)."""
    if any(row.alters for row in rows):
        logits = logits.clone()
        for i, row in enumerate(rows):
            row.penalise(logits[i])
    highest, tokens = _likeliest(logits)
    groups: dict[tuple[int, float, float], list[int]] = {}
    for i, row in enumerate(rows):
        if not row.params.greedy:
            groups.setdefault(row.filters, []).append(i)
    for filters, members in groups.items():
        mine = logits if len(members) == len(rows) else logits[members]
        best = torch.tensor([highest[i] for i in members], device=logits.device)
        heat = torch.tensor([rows[i].params.temperature for i in members], device=logits.device)
        uniform = torch.tensor([rows[i].uniform() for i in members], dtype=torch.float64, device=logits.device)
        for i, token in zip(members, _draw(mine, best, heat, uniform, filters).tolist(), strict=True):
            tokens[i] = token
    return tokens


def _draw(
    logits: torch.Tensor,
    best: torch.Tensor,
    heat: torch.Tensor,
    uniform: torch.Tensor,
    filters: tuple[int, float, float],
) -> torch.Tensor:
    """Tokens int64 [R] from ``logits`` [R, V], whose highest are ``best`` [R], at temperatures ``heat`` [R].

    ``uniform`` [R]: the numbers that decide. ``filters``: (top_k, top_p, min_p).
    """
    top_k, top_p, min_p = filters
    if top_k <= 0 or top_k >= logits.shape[-1]:
        probabilities = _soften(logits, best, heat)
        if top_p < 1.0:
            total = _block_sums(probabilities).cumsum(dim=-1, dtype=torch.float64)[:, -1]
            return _draw_nucleus(probabilities, total, uniform, top_p, min_p, _NUCLEUS_START)
        return _invert(_above(probabilities, min_p), uniform)
    candidates, ids = _top(logits, top_k, impossible=-math.inf)
    probabilities = _soften(candidates, best, heat)
    if top_p < 1.0:
        total = probabilities.cumsum(dim=-1, dtype=torch.float64)[:, -1]
        probabilities, _ = _nucleus(probabilities, total, top_p)
    return ids.gather(1, _invert(_above(probabilities, min_p), uniform)[:, None])[:, 0]


def _top(scores: torch.Tensor, count: int, *, impossible: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest of each row of ``scores`` [R, V], highest first, and their places; of equal ones the first.

    torch's ``topk`` takes equal ones as they come, by ``count`` and by the device. ``impossible``: what no draw can
    choose, so that its order does not matter.
    """
    values, ids = scores.topk(min(count + 1, scores.shape[-1]), dim=-1)
    equal = values[:, 1:] == values[:, :-1]
    if impossible is not None:
        equal &= values[:, 1:] != impossible
    for i in equal[:, count - 1 : count].nonzero()[:, 0].tolist() if count else ():  # others equal the last one
        border = values[i, count - 1]
        above = int((values[i] > border).sum())
        ids[i, above:count] = _places(scores[i], border)[: count - above]
    values, ids = values[:, :count], ids[:, :count]
    rows = equal.any(-1).nonzero()[:, 0]
    if len(rows):
        in_order, order = ids[rows].sort(dim=-1)
        values[rows], order = values[rows].gather(1, order).sort(dim=-1, descending=True, stable=True)
        ids[rows] = in_order.gather(1, order)
    return values, ids


def _places(row: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Places int64 [n], rising, at which ``row`` [V] is ``value`` []."""
    if row.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(row.numpy() == value.numpy()))  # ten times as fast as torch's
    return (row == value).nonzero()[:, 0]


def _soften(logits: torch.Tensor, best: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Probabilities of ``logits`` [R, K] at temperatures ``heat`` [R]; the best is taken off first, lest a cold one
    overflow.
    """
    return (logits - best[:, None]).div_(heat[:, None]).softmax(dim=-1)


def _draw_nucleus(
    probabilities: torch.Tensor,
    total: torch.Tensor,
    uniform: torch.Tensor,
    top_p: float,
    min_p: float,
    width: int,
) -> torch.Tensor:
    """As `_draw` with top-p, on the ``width`` likeliest tokens; rows whose nucleus is wider go round again.

    How wide a row is looked at depends on that row alone.
    """
    width = min(width, probabilities.shape[-1])
    candidates, ids = _top(probabilities, width, impossible=0.0)
    kept, found = _nucleus(candidates, total, top_p)
    tokens = ids.gather(1, _invert(_above(kept, min_p), uniform)[:, None])[:, 0]
    if width < probabilities.shape[-1]:
        short = (found < top_p * total).nonzero()[:, 0]
        if len(short):
            rest = probabilities[short], total[short], uniform[short]
            tokens[short] = _draw_nucleus(*rest, top_p, min_p, 8 * width)
    return tokens


def _nucleus(candidates: torch.Tensor, total: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``candidates`` [R, K], highest first, zero behind the first ``top_p`` of ``total`` [R]; and the sum of all
    [R].
    """
    mass = candidates.cumsum(dim=-1, dtype=torch.float64)
    behind = mass - candidates >= top_p * total[:, None]
    behind[:, 0] = False
    return candidates.masked_fill(behind, 0.0), mass[:, -1]


def _above(candidates: torch.Tensor, min_p: float) -> torch.Tensor:
    """``candidates`` [R, K], zero where less than ``min_p`` times the highest."""
    return candidates * (candidates >= min_p * candidates.amax(dim=-1, keepdim=True)) if min_p > 0.0 else candidates


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    """Sums [R, ceil(K / 64)] of every 64 neighbours in ``weights`` [R, K]; each by itself, whatever R is."""
    sums = weights.unfold(1, _BLOCK, _BLOCK).sum(dim=-1) if weights.shape[-1] >= _BLOCK else weights[:, :0]
    rest = weights.shape[-1] % _BLOCK
    return torch.cat([sums, weights[:, -rest:].cumsum(dim=-1)[:, -1:]], dim=-1) if rest else sums


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The place in each row of ``weights`` [R, K] at which their running sum passes ``uniform`` [R] of it; int64 [R].

    First the block of 64, then the place in it: a running sum over a large vocabulary costs more than all the rest.
    """
    blocks = _block_sums(weights).cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * blocks[:, -1:]
    block = torch.searchsorted(blocks, target, right=True).clamp_(max=blocks.shape[-1] - 1)
    upper = blocks.gather(1, block)
    lower = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0.0)
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = places < weights.shape[-1]
    places.clamp_(max=weights.shape[-1] - 1)
    within = (weights.gather(1, places) * inside).cumsum(dim=-1, dtype=torch.float64)
    share = (target - lower) / (upper - lower)
    place = torch.searchsorted(within, share * within[:, -1:], right=True).clamp_(max=_BLOCK - 1)
    return places.gather(1, place)[:, 0]


def _logprobs(logits: torch.Tensor, tokens: list[int], rows: Sequence[RowSampler]) -> list[list[TokenLogprob]]:
    """For each row of ``logits`` [R, V]: the chosen token, then as many of the likeliest as it asks for."""
    scores = logits.log_softmax(dim=-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])
    ranks = ((scores > chosen).sum(dim=-1) + 1).tolist()
    wanted = [min(row.params.logprobs or 0, scores.shape[-1]) for row in rows]
    top, top_ids = _top(scores, max(wanted))
    reports = []
    for i, (values, ids) in enumerate(zip(top.tolist(), top_ids.tolist(), strict=True)):
        report = [TokenLogprob(tokens[i], float(chosen[i, 0]), int(ranks[i]))]
        likeliest = zip(ids[: wanted[i]], values[: wanted[i]], strict=True)
        report += [TokenLogprob(t, v, k) for k, (t, v) in enumerate(likeliest, 1) if t != tokens[i]]
        reports.append(report)
    return reports
