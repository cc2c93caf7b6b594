"""Tokens at random: the control that any method must beat.

``s[h, i]`` is uniform in [0, 1), from a generator seeded by ``seed`` and the layer. Frees all but the kept share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.retention.method import Notes, RetentionMethod
from kvfold.retention.view import LayerView

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(RetentionMethod):
    """Keeps random tokens, others in every head."""

    seed: int = 0

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """Uniform numbers, the same for the same seed, layer and number of candidates."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + view.layer)
        shape = view.kv_heads, view.candidates.stop - view.candidates.start
        return torch.rand(shape, generator=generator).to(view.device)
