"""Which sequences of a step begin with the same pages: those are walked once, for all their queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["CASCADE_BYTES", "SharedRun", "shared_runs"]

CASCADE_BYTES = 4 << 20
"""A run of pages is walked apart for its sharers where that saves a layer this many bytes of reading.

A further walk costs a layer a call of the kernel, its queries put together and its results merged, which what
it saves must outweigh (`kvfold bench attention --shared-prefix` times walks alone).
"""


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Sequences ``members [m]`` have the same blocks at ``[first, last)`` of their lists."""

    members: np.ndarray
    first: int
    last: int


def shared_runs(offsets: Sequence[np.ndarray], block_bytes: int) -> list[SharedRun]:
    """The runs of blocks that are worth a walk of their own, from the block lists ``offsets`` of a step's sequences.

    The lists, in lexicographic order, form a tree: what two neighbours have in common they share with all between
    them. From its root down, the blocks that all sequences below a node have in common, beyond those that a node above
    has settled, become a run if ``(sequences - 1) * blocks * block_bytes >= CASCADE_BYTES``; else they are left to the
    nodes below. A sequence's runs are in order and follow each other from its first block on. ``block_bytes``: what
    the pages of a block have for one layer to read.
    """
    if len(offsets) < 2 or len({int(x[0]) for x in offsets if x.size}) == sum(x.size > 0 for x in offsets):
        return []
    order = np.asarray(sorted(range(len(offsets)), key=lambda i: offsets[i].tobytes()))
    common = np.asarray([_common(offsets[a], offsets[b]) for a, b in pairwise(order)])
    runs: list[SharedRun] = []
    nodes = [(0, len(order), 0)]
    while nodes:
        a, b, settled = nodes.pop()
        if b - a < 2:
            continue
        inner = common[a : b - 1]
        last = int(inner.min())
        if (b - a - 1) * (last - settled) * block_bytes >= CASCADE_BYTES:
            runs.append(SharedRun(np.sort(order[a:b]), settled, last))
            settled = last
        ends = [a, *(a + 1 + np.flatnonzero(inner == last)).tolist(), b]
        nodes += [(begin, end, settled) for begin, end in pairwise(ends)]
    return runs


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading numbers two arrays have in common."""
    count = min(a.size, b.size)
    differs = a[:count] != b[:count]
    first = int(differs.argmax()) if count else 0
    return first if count and differs[first] else count
