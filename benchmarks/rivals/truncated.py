"""Plain truncation: the first few tokens and the last ones, at the positions they had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from benchmarks.rivals.stock import Reader, Rival
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

__all__ = ["SINKS", "TruncatedRival"]

SINKS: Final = 4
"""First tokens that are kept."""


class TruncatedRival(Rival):
    """The prompt (or its context) is read whole, then all but ``1 - ratio`` of it goes: the first `SINKS` and the last
    tokens stay.

    As many stay from there on, however long the sequence becomes; in this it differs from kvpress's StreamingLLM,
    which lets the cache grow again. Layers with a window of their own are left alone.
    """

    def __init__(self, model: PreTrainedModel, name: str, ratio: float) -> None:
        super().__init__(model, name, "truncation", None)
        self.ratio = ratio

    def begin(self, prompt: Sequence[int], context: int | None = None) -> tuple[Reader, Tensor]:
        """Reads the prompt, or its context, in one forward, and truncates; then the rest."""
        kept = max(SINKS + 1, round(len(prompt[:context]) * (1 - self.ratio)))
        reader = _TruncatingReader(self.model, self.new_cache(), kept)
        logits = reader.read(prompt[:context], keep=1)
        return reader, self.rest(reader, prompt, context, logits)


class _TruncatingReader(Reader):
    """Keeps at most ``kept`` tokens between forwards."""

    def __init__(self, model: PreTrainedModel, cache: Cache, kept: int) -> None:
        super().__init__(model, cache)
        self.kept = kept

    def read(self, tokens: Sequence[int], *, keep: int = 0, **more: Tensor) -> Tensor:
        logits = super().read(tokens, keep=keep, **more)
        for layer in self.cache.layers:
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = self._ends(layer.keys), self._ends(layer.values)
        return logits

    def _ends(self, kv: Tensor) -> Tensor:
        if kv.shape[-2] <= self.kept:
            return kv
        return torch.cat([kv[..., :SINKS, :], kv[..., SINKS - self.kept :, :]], dim=-2)
