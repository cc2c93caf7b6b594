"""What calibrated codecs may know: moments of keys, values and queries, and the Fisher information, on training text.

Nothing here has seen the held-out passages. Keys, values and gradients come from `kvfold.quality.calibrate`; the
queries, which kvfold's own calibration does not use, from one more pass over the same passages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvfold.calibration import Calibration, Side
from kvfold.quality.calibrate.fit import Fitted, fit
from kvfold.quality.calibrate.observe import Moments, Observer

__all__ = ["SIDES", "Learned", "Weight", "learn", "observe"]

SIDES: tuple[Side, Side] = ("k", "v")
Weight = Literal["fisher", "query"]

_NAME, _KEYWORD = "kvfold-queries", "kvfold_queries"


@dataclass(frozen=True, slots=True)
class Learned:
    """``moments`` of keys and values, ``queries`` (second moments ``[H, D, D]``, the query heads of a KV head
    together), both by layer; ``fitted``: kvfold's own fit, by Fisher information and with the mean of keys taken out.
    """

    moments: Mapping[int, tuple[Moments, Moments]]
    queries: Mapping[int, Tensor]
    fitted: Mapping[tuple[int, Side], Fitted]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the model."""
        return tuple(self.moments)

    @property
    def heads(self) -> int:
        """KV heads of a layer."""
        return self.moments[self.layers[0]][0].vectors.shape[0]

    @property
    def dim(self) -> int:
        """Dims of a key or value."""
        return self.moments[self.layers[0]][0].vectors.shape[-1]

    def calibration(self) -> Calibration:
        """What ``kvfold calibrate`` would have written, in memory."""
        arrays = {f"{i}.{s}.{name}": x.numpy() for (i, s), parts in self.fitted.items() for name, x in parts.items()}
        return Calibration("in memory", self.layers, arrays)

    def mean(self, layer: int, side: Side) -> Tensor:
        """What kvfold takes out first, ``[H, 1, D]``: the mean of keys, nothing of values."""
        return self.fitted[layer, side]["mean"][:, None]

    def rows(self, layer: int, side: Side) -> Tensor:
        """A sample of the vectors ``[H, n, D]``; keys and values of the same tokens."""
        return torch.cat(self.moments[layer][SIDES.index(side)].rows, 1).float()

    def second(self, layer: int, side: Side) -> Tensor:
        """Second moment of the vectors ``[H, D, D]``."""
        moments = self.moments[layer][SIDES.index(side)]
        return moments.vectors.cpu() / moments.count

    def attended(self, layer: int) -> Tensor:
        """OSCAR's second moment of the values ``[H, D, D]``: tokens weighted by ``k' (Q'Q) k``."""
        k, v = self.rows(layer, "k").double(), self.rows(layer, "v").double()
        weight = ((k @ self.queries[layer]) * k).sum(-1, keepdim=True)
        return v.mT @ (v * weight / weight.sum(1, keepdim=True))

    def weight(self, layer: int, side: Side, by: Weight) -> Tensor:
        """``[H, D, D]``: how much errors matter. By queries, those of values all matter alike."""
        moments = self.moments[layer][SIDES.index(side)]
        if by == "fisher":
            return moments.gradients.cpu() / moments.count
        return self.queries[layer] if side == "k" else torch.eye(self.dim).double().expand(self.heads, -1, -1)

    def fit_by(self, layer: int, side: Side, by: Weight, *, centred: bool = True) -> Fitted:
        """kvfold's fit, with another weight in place of the Fisher information, or with the mean of keys left in."""
        if by == "fisher" and (centred or side == "v"):
            return self.fitted[layer, side]
        moments = self.moments[layer][SIDES.index(side)]
        weighted = replace(moments, gradients=self.weight(layer, side, by) * moments.count)
        return fit(weighted, centred=centred and side == "k")


def learn(model: PreTrainedModel, passages: Sequence[Sequence[int]], seed: int) -> Learned:
    """Moments, queries and kvfold's fit on ``passages``."""
    moments = observe(model, passages, seed)
    return Learned(moments, _queries(model, passages), _fit_all(moments))


def observe(
    model: PreTrainedModel, passages: Sequence[Sequence[int]], seed: int
) -> Mapping[int, tuple[Moments, Moments]]:
    """Second moments of keys, values and their gradients."""
    generator = torch.Generator().manual_seed(seed)
    observer = Observer(model)
    try:
        for passage in passages:
            observer.observe(passage, generator)
    finally:
        observer.release()
    return observer.moments


def _fit_all(moments: Mapping[int, tuple[Moments, Moments]]) -> dict[tuple[int, Side], Fitted]:
    return {
        (i, side): fit(x, centred=side == "k")
        for i, sides in moments.items()
        for side, x in zip(SIDES, sides, strict=True)
    }


@torch.inference_mode()
def _queries(model: PreTrainedModel, passages: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Second moment of the queries of each KV head ``[H, D, D]``, by layer."""
    sums: dict[int, Tensor] = {}
    with _attention_that_keeps_queries(model):
        for passage in passages:
            model(torch.tensor([list(passage)], device=model.device), use_cache=False, **{_KEYWORD: sums})
    tokens = sum(map(len, passages))
    return {layer: (total / tokens).cpu() for layer, total in sums.items()}


@contextmanager
def _attention_that_keeps_queries(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    sums: dict[int, Tensor] = kwargs.pop(_KEYWORD)
    layer = int(getattr(module, "layer_idx", 0))
    grouped = query[0].unflatten(0, (key.shape[1], -1))  # [H, query heads of one, T, D]
    flat = grouped.flatten(1, 2).double()
    sums[layer] = sums.get(layer, 0) + flat.mT @ flat / grouped.shape[1]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
