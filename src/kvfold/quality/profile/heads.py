"""Where each head's attention goes: statistics of its weights, gathered block by block.

Observed are queries of the second half of a text, the *present*. The first half is the *past*: what an eviction would
have to choose from once the text so far is read.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from kvfold.layers import LayerGeometry
from kvfold.quality.profile.results import LEVELS, SHARES, LayerProfile, distance_edges
from kvfold.quality.profile.weights import Weights, weigh
from kvfold.quality.watch import Attended

__all__ = ["QUERIES", "LayerTally", "observed_positions"]

QUERIES: Final = 256
"""Queries of a passage that are observed, at most."""


def observed_positions(tokens: int) -> Tensor:
    """Positions ``[n]`` of the observed queries: up to `QUERIES`, evenly over the second half of the text, its last
    token among them.
    """
    half = tokens // 2
    count = min(QUERIES, tokens - half)
    return half + torch.arange(1, count + 1) * (tokens - half) // count - 1


class LayerTally:
    """Gathers the statistics of one layer over passages of ``tokens`` tokens each."""

    def __init__(self, layer: LayerGeometry, *, tokens: int, sinks: int, recent: int) -> None:
        self.layer = layer
        self.tokens, self.sinks, self.recent = tokens, sinks, recent
        self.positions = observed_positions(tokens)
        self.past = tokens // 2
        heads, edges = layer.q_heads, len(distance_edges(tokens))
        self._sums = {name: torch.zeros(heads, dtype=torch.float64) for name in _PER_HEAD}
        self._distance = torch.zeros(edges, dtype=torch.float64)
        self._anew = torch.zeros(len(SHARES), dtype=torch.float64)
        self._once: list[Tensor] = []
        self._budgets: list[Tensor] = []

    def add(self, seen: Attended) -> None:
        """The attention of one passage."""
        received = torch.zeros(self.layer.kv_heads, self.past, dtype=torch.float64)
        newer = torch.zeros(self.layer.kv_heads, dtype=torch.float64)
        share = self.layer.q_heads // self.layer.kv_heads
        for block in weigh(seen, self.positions.to(seen.q.device)):
            self._add_heads(block)
            past = block.p[..., : self.past]
            total = block.p.sum((1, 2)).double().cpu()
            for place, mass in enumerate(past.sum(1).double().cpu()):
                head = (block.heads.start + place) // share
                received[head] += mass
                newer[head] += total[place] - mass.sum()
            self._anew += self._held_anew(block, past)
        held = held_once(received, newer)
        places = torch.tensor([_count(share, self.past) for share in SHARES])
        self._once.append(held[:, places].mean(0))
        self._budgets.append(torch.stack([(held < level - _ROUNDING).sum(1) / self.past for level in LEVELS]))

    def result(self) -> LayerProfile:
        """The means over all that was added."""
        queries = len(self._once) * self.positions.numel()
        heads = {name: (total / queries).tolist() for name, total in self._sums.items()}
        budgets = torch.stack(self._budgets).mean(0).tolist()
        anew = (self._anew / queries / self.layer.q_heads).tolist()
        return LayerProfile(
            layer=self.layer.index,
            source=self.layer.source,
            kind=self.layer.kind,
            window=self.layer.window,
            q_heads=self.layer.q_heads,
            kv_heads=self.layer.kv_heads,
            **heads,
            distance=(self._distance / queries / self.layer.q_heads).tolist(),
            newer=anew[0],
            held_once=torch.stack(self._once).mean(0).tolist(),
            held_anew=anew,
            budgets={f"{level:g}": row for level, row in zip(LEVELS, budgets, strict=True)},
        )

    def _add_heads(self, block: Weights) -> None:
        """Sinks, window, entropy and distances of a block, whose first tokens count as sinks only."""
        p = block.p
        back = block.positions[:, None] - torch.arange(p.shape[-1], device=p.device)
        far = p[..., self.sinks :]
        behind = back[:, self.sinks :]
        found = {
            "sinks": p[..., : self.sinks].sum(-1),
            "nowhere": block.nowhere,
            "local": (far * ((behind >= 0) & (behind < self.recent))).sum(-1),
            "entropy": torch.special.entr(p / (1 - block.nowhere).clamp_min(_ROUNDING)[..., None]).sum(-1),
        }
        for name, values in found.items():
            self._sums[name][block.heads] += values.sum(-1).double().cpu()
        edges = torch.tensor(distance_edges(self.tokens)[1:], device=p.device)
        bins = torch.bucketize(behind.clamp_min(0), edges, right=True)
        mass = far.sum(0).double()
        sums = torch.zeros(edges.numel() + 1, dtype=torch.float64, device=p.device)
        self._distance += sums.scatter_add_(0, bins.flatten(), mass.flatten()).cpu()

    def _held_anew(self, block: Weights, past: Tensor) -> Tensor:
        """Sums ``[len(SHARES)]`` over heads and queries of the mass each query would hold with tokens of its own."""
        total = block.p.sum(-1).clamp_min(_ROUNDING)
        held = past.sort(-1, descending=True).values.cumsum(-1)
        newer = (total - past.sum(-1)).clamp_min(0)
        counts = [_count(share, self.past) for share in SHARES]
        parts = [newer if not count else newer + held[..., count - 1] for count in counts]
        return torch.stack([(part / total).sum().double().cpu() for part in parts])


def held_once(received: Tensor, newer: Tensor) -> Tensor:
    """``[Hkv, P + 1]``: the part of a head's mass that is held with its 0 to P top tokens of the past, and all newer.

    ``received [Hkv, P]``: mass on each token of the past; ``newer [Hkv]``: on what is newer; over all queries of all
    query heads of a KV head.
    """
    top = received.sort(1, descending=True).values.cumsum(1)
    total = (newer + received.sum(1)).clamp_min(_ROUNDING)[:, None]
    return torch.cat((newer[:, None], newer[:, None] + top), dim=1) / total


def _count(share: float, past: int) -> int:
    """Tokens that a share of the past is, rounded up."""
    return min(past, math.ceil(share * past - _ROUNDING))


_PER_HEAD: Final = ("sinks", "nowhere", "local", "entropy")
_ROUNDING: Final = 1e-9
