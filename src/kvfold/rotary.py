"""Rotary embeddings whose factors depend on the length of a sequence (longrope, dynamic NTK), in packed forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RopeGuard"]


class RopeGuard:
    """Evaluates length-dependent rotary embeddings (longrope, dynamic NTK) sequence by sequence.

    transformers chooses their frequencies from the largest position of the whole batch, so a short sequence packed
    beside a long one would silently change. A forward hook on each such module recomputes its result for every segment,
    and from fresh frequencies: dynamic ones otherwise stay as wide as the longest sequence so far made them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._segments: Sequence[int] = ()
        self._hooks = [
            module.register_forward_hook(self._per_segment, with_kwargs=True)
            for module in model.modules()
            if _length_dependent(getattr(module, "rope_type", None)) and hasattr(module, "forward")
        ]

    @contextmanager
    def over(self, segments: Sequence[int]) -> Iterator[None]:
        """``segments``: token counts of the sequences packed in the row, in order."""
        self._segments = segments
        try:
            yield
        finally:
            self._segments = ()

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _per_segment(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._segments:
            return output
        names = ("x", "position_ids", "layer_type")
        given = dict(zip(names, args, strict=False)) | kwargs
        positions = given.pop("position_ids")
        x = given.pop("x")
        parts = []
        for part in positions.split(list(self._segments), dim=-1):
            _forget_length(module)
            parts.append(module.forward(x, position_ids=part, **given))
        if isinstance(output, Tensor):
            return torch.cat(parts, dim=-2)
        return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True))


def _forget_length(module: nn.Module) -> None:
    """Sets a dynamic rotary embedding, of one or of several layer types, back to the frequencies it was made with."""
    rope_type = getattr(module, "rope_type", None)
    for prefix in [f"{name}_" for name in rope_type] if isinstance(rope_type, dict) else [""]:
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if isinstance(original, Tensor):
            getattr(module, f"{prefix}inv_freq").copy_(original)
            setattr(module, f"{prefix}max_seq_len_cached", getattr(module, "original_max_seq_len", 0))


def _length_dependent(rope_type: object) -> bool:
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in types)
