"""StreamingLLM (arXiv 2309.17453): attention sinks and a window of the latest tokens.

``s[h, i] = i``: of the candidates the latest stay; sinks and recent tokens are no candidates. The paper numbers
positions anew within the cache; here keys keep the rotary phase of the position they had. Frees all but the kept share,
the same tokens in every head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.retention.method import Notes, RetentionMethod
from kvfold.retention.view import LayerView

__all__ = ["Streaming"]


@dataclass(frozen=True)
class Streaming(RetentionMethod):
    """Keeps the latest tokens beside the sinks."""

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """The candidate's number: the later, the higher."""
        count = view.candidates.stop - view.candidates.start
        return torch.arange(count, dtype=torch.float32, device=view.device).expand(view.kv_heads, -1)
