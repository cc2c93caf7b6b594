"""How a transformers model runs on a paged step: the registered attention function, and the load check.

The model code is transformers' own. One attention function is registered under the name ``kvfold``; a forward that carries a
:class:`ModelStep` in its keyword arguments has that function write the new keys and values to the cache and attend over
the pages. Sequences of any length lie in the rows of the batch (or packed in one row) without padding and without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from kvfold.attention.latent import LatentProjection
from kvfold.attention.pieces import AttendedKind, LayerCall
from kvfold.cache import Step
from kvfold.errors import UnsupportedError

__all__ = [
    "ATTENTION_NAME",
    "STEP_KEYWORD",
    "AttentionSwitch",
    "ModelStep",
    "RopeGuard",
    "StepCache",
    "attention_forward",
]

ATTENTION_NAME = "kvfold"
STEP_KEYWORD = "kvfold_step"


class ModelStep:
    """One forward of a model: the paged step, and where its tokens lie in the model's ``[B, T]``.

    ``rows [N]``: index in the flattened batch of each stored token, or None when every position is one (no padding).
    """

    def __init__(self, step: Step, *, rows: Tensor | None = None) -> None:
        self.step = step
        self.rows = rows

    def write_latent(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Stores what a latent layer hands to its cache: latents and rotary keys ``[B, 1, T, D]``. Other layers write later."""
        if self.step.cache.geometry.layers[layer].kind == "latent":
            self.step.write(layer, self._flat(k), self._flat(v))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor:
        """Attention of ``query [B, Hq, T, D]`` with fresh ``key, value [B, H, T, D]``: ``[B, T, Hq, Dv]``, zeros at padding."""
        index = int(module.layer_idx)  # type: ignore[arg-type]
        layer = self.step.cache.geometry.layers[index]
        k, v = self._flat(key), self._flat(value)
        latent = None
        if layer.kind == "latent":
            nope = query.shape[-1] - layer.v_dim
            latent = LatentProjection.of(module, q_heads=query.shape[1], nope=nope, rope=layer.v_dim, rank=layer.k_dim)
        elif layer.source == index:
            self.step.write(index, k, v)
        ask = LayerCall(
            scale=call["scaling"] if call["scaling"] is not None else query.shape[-1] ** -0.5,
            kind=cast("AttendedKind", layer.kind),
            window=layer.window,
            softcap=call["softcap"],
            sinks=call["s_aux"],
            latent=latent,
        )
        out = self.step.attend(index, self._flat(query), k, v, ask)
        if self.rows is not None:
            padded = out.new_zeros((query.shape[0] * query.shape[2], *out.shape[1:]))
            out = padded.index_copy_(0, self.rows, out)
        return out.reshape(query.shape[0], query.shape[2], *out.shape[1:])

    def _flat(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` to the stored tokens' rows ``[N, H, D]``."""
        flat = x.transpose(1, 2)
        flat = flat.squeeze(0) if flat.shape[0] == 1 else flat.reshape(-1, *flat.shape[2:])
        return flat if self.rows is None else flat.index_select(0, self.rows)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    kvfold_step: ModelStep | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers' ``AttentionInterface`` (shapes as there: ``[B, H, T, D]`` in, ``[B, T, H, D]`` out).

    ``attention_mask`` is not read: models build none for this implementation, and a step knows which tokens are real. Raises
    UnsupportedError for a forward without a step and for arguments that the paged path cannot honour.
    """
    name = type(module).__name__
    if kvfold_step is None:
        raise UnsupportedError(
            f"attention of {name}", why="the forward carries no cache step", hint="pass past_key_values=KVCache(model, ...)"
        )
    if position_bias is not None:
        raise UnsupportedError(f"attention of {name}", why="it adds a learned position bias to its scores")
    if indices is not None:
        raise UnsupportedError(f"attention of {name}", why="it selects keys with its own indexer")
    call = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    return kvfold_step.attend(module, query, key, value, call), None


class AttentionSwitch:
    """Puts a model on the ``kvfold`` attention function for the length of a forward, and back.

    A model stays exactly what it was outside of those forwards; nothing of transformers is patched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        AttentionInterface.register(ATTENTION_NAME, attention_forward)
        configs = {id(model.config): model.config}
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_attn_implementation_internal"):
                configs[id(config)] = config
        self._configs = list(configs.values())
        self._before: list[Any] = []

    def enter(self) -> None:
        """Switches to paged attention."""
        self._before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = ATTENTION_NAME

    def leave(self) -> None:
        """Switches back to what was set before :meth:`enter`."""
        for config, before in zip(self._configs, self._before, strict=True):
            config._attn_implementation_internal = before

    @contextmanager
    def active(self) -> Iterator[None]:
        """``with switch.active(): model(...)``."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


class StepCache(Cache):
    """The cache object that latent (MLA) models see in a packed forward: takes the latents, hands back the new rows only."""

    def __init__(self, step: ModelStep) -> None:
        super().__init__(layers=[])
        self.step = step

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes latents ``[1, 1, T, D]``; other layers' tensors pass through and are written by the attention function."""
        self.step.write_latent(key_states, value_states, layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given explicitly, and only the new rows are visible to the model code."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The new rows only."""
        return query_length, 0


class RopeGuard:
    """Evaluates length-dependent rotary embeddings (longrope, dynamic NTK) sequence by sequence.

    transformers chooses their frequencies from the largest position of the whole batch, so a short sequence packed beside a
    long one would silently change. A forward hook on each such module recomputes its result for every segment.
    """

    def __init__(self, model: nn.Module) -> None:
        self._segments: Sequence[int] = ()
        self._hooks = [
            module.register_forward_hook(self._per_segment, with_kwargs=True)
            for module in model.modules()
            if _length_dependent(getattr(module, "rope_type", None)) and hasattr(module, "forward")
        ]

    @property
    def needed(self) -> bool:
        """Whether the model has such embeddings at all."""
        return bool(self._hooks)

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
        if len(self._segments) < 2:
            return output
        names = ("x", "position_ids")
        given = dict(zip(names, args, strict=False)) | kwargs
        positions = given.pop("position_ids")
        x = given.pop("x")
        parts = [module.forward(x, position_ids=part, **given) for part in positions.split(list(self._segments), dim=-1)]
        if isinstance(output, Tensor):
            return torch.cat(parts, dim=-2)
        return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True))


def _length_dependent(rope_type: object) -> bool:
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in types)
