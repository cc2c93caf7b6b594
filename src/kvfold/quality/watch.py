"""A forward of a model through the runtime that serves, with somebody looking on: what layers write and attend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.attention.pieces import LayerCall
from kvfold.cache import PagedCache, SequenceWork, Step
from kvfold.geometry import Geometry
from kvfold.packed import PackedModel
from kvfold.recipe import Recipe
from kvfold.retainer import ForwardInputs

__all__ = ["Attended", "watched_forward"]


@dataclass(frozen=True, slots=True)
class Attended:
    """One layer's attention over a whole text: queries ``q [T, Hq, D]`` and keys as they meet (rotary embedding and
    norms applied), ``k [T, H, D]``, ``v [T, H, Dv]``, what the layer asks for, and its ``output [T, Hq, Dv]``.

    Query head ``h`` reads key head ``h // (Hq / H)``. Latent layers hand over expanded keys, one for each query head.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    call: LayerCall
    output: Tensor


class _Watched:
    """A step that shows what is written to it and attended on it."""

    wants_inputs = False

    def __init__(
        self,
        step: Step,
        wrote: Callable[[int, Tensor, Tensor], None] | None,
        attended: Callable[[Attended], Tensor | None] | None,
    ) -> None:
        self.layers = step.layers
        self._step = step
        self._wrote = wrote
        self._attended = attended

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self._wrote is not None:
            self._wrote(layer, k, v)
        self._step.write(layer, k, v)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: LayerCall, inputs: ForwardInputs | None = None
    ) -> Tensor:
        output = self._step.attend(layer, q, k, v, call, inputs)
        if self._attended is None:
            return output
        other = self._attended(Attended(layer, q, k, v, call, output))
        return output if other is None else other.to(output.dtype)


def watched_forward(
    model: PreTrainedModel,
    tokens: Sequence[int],
    *,
    wrote: Callable[[int, Tensor, Tensor], None] | None = None,
    attended: Callable[[Attended], Tensor | None] | None = None,
    keep: Sequence[int] | None = None,
) -> Tensor:
    """Runs ``tokens`` through ``model`` on a raw cache; the logits ``[len(keep), V]`` of the positions ``keep`` (None:
    the last).

    ``wrote`` is shown each layer's index with its keys and values ``[T, Hkv, D]``; ``attended`` each attention, and may
    give another output for it. Both run inside ``torch.inference_mode``.
    """
    count = len(tokens)
    geometry = Geometry.from_config(model.config)
    cache = PagedCache(geometry, Recipe(), dtype=model.dtype, device=model.device, prefix_caching=False)
    packed = PackedModel(model)
    try:
        step = _Watched(cache.begin([SequenceWork(cache.create(), count)]), wrote, attended)
        ids = torch.as_tensor(list(tokens), device=model.device)
        rows = torch.tensor([count - 1] if keep is None else list(keep), device=model.device)
        return packed.forward(cast(Step, step), ids, torch.arange(count, device=model.device), rows, [count])
    finally:
        packed.release()
