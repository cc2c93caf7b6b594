"""How a transformers model runs on a paged step: the registered attention function, and what a forward needs around it.

The model code is transformers' own. One attention function is registered under the name ``kvfold`` (see `switch`). In a
forward with a :class:`ModelStep` it writes the new keys and values to the cache and attends over the pages. Sequences
of any length lie in the rows of the batch (or packed in one row) without padding and without a mask.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvfold.attention.latent import LatentProjection
from kvfold.attention.pieces import AttendedKind, LayerCall
from kvfold.errors import UnsupportedError
from kvfold.geometry import LayerGeometry
from kvfold.retainer import ForwardInputs
from kvfold.step import Step
from kvfold.untraced import untraced

__all__ = [
    "CURRENT_STEP",
    "ModelStep",
    "StepCache",
    "attention_forward",
]

CURRENT_STEP: Final[ContextVar[ModelStep | None]] = ContextVar("kvfold_step", default=None)
"""The step of the forward that runs in this thread. Not every layer hands keyword arguments down to its attention."""

_HARMLESS: Final = frozenset({"position_ids", "cache_position", "logits_to_keep", "labels"})
"""Tensors that a model's forward may hand down to its attention, and that say nothing about it."""

_MEANINGS: Final = {
    "position_bias": "it adds a learned position bias to its scores",
    "indices": "it selects keys with its own indexer",
    "block_indices": "it selects blocks of keys with its own indexer",
}


_MASK_HINT: Final = (
    "give it text without token types or images that change its mask, or a 2-D mask that says what is padding; "
    "or use transformers' own cache"
)


class ModelStep:
    """One forward of a model: the paged step, and where its tokens lie in the model's ``[B, T]``.

    ``rows [N]``: index in the flattened batch of each stored token, or None when every position is one (no padding).
    ``mask_refusal``: why a mask that the model has made cannot be served; layers that are given it refuse.
    """

    def __init__(self, step: Step, *, rows: Tensor | None = None) -> None:
        self.step = step
        self.rows = rows
        self.attended: set[int] = set()
        self.mask_refusal: str | None = None
        self._updated: int | None = None
        self._given: dict[nn.Module, tuple[Any, Any]] = {}

    @untraced
    def note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of attention modules: remembers what a module is given, for retention."""
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        self._given[module] = hidden, kwargs.get("position_embeddings")

    def _inputs(self, module: nn.Module) -> ForwardInputs:
        hidden, rotary = self._given.pop(module, (None, None))
        if not isinstance(hidden, Tensor):
            return ForwardInputs(module)
        hidden = hidden.detach().to(self.step.layers.dtype)
        if isinstance(rotary, tuple) and all(isinstance(x, Tensor) and x.dim() == 3 for x in rotary):
            cos, sin = (self._rows(x.expand(hidden.shape[0], -1, -1)) for x in rotary)
            return ForwardInputs(module, self._rows(hidden), (cos, sin))
        return ForwardInputs(module, self._rows(hidden))

    def write_latent(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Stores what a latent layer hands to its cache: latents and rotary keys ``[B, 1, T, D]``. Other layers write
        later.

        The number under which a layer updates its cache is also the one it attends under: a module that runs several
        times in a forward has one for each time.
        """
        self._updated = layer
        if self._layer(layer).kind == "latent":
            self._write(layer, self._flat(k), self._flat(v))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor:
        """Attention of ``query [B, Hq, T, D]`` with fresh ``key, value [B, H, T, D]``: ``[B, T, Hq, Dv]``, zeros at
        padding.
        """
        index = self._updated if self._updated is not None else getattr(module, "layer_idx", None)
        self._updated = None
        if not isinstance(index, int):
            why = "it attends with the decoder's config, and is none of its layers"
            raise UnsupportedError(f"attention of {type(module).__name__}", why=why)
        if index in self.attended:
            raise UnsupportedError(f"attention of {type(module).__name__}", why="it attends more than once in a layer")
        self.attended.add(index)
        rows = self._flat(query), self._flat(key), self._flat(value)
        sources = [x for x in (*rows, call["s_aux"]) if x is not None and x.requires_grad and torch.is_grad_enabled()]
        exact = not sources or (call["softcap"] is None and call["s_aux"] is None and self.step.differentiable)
        with torch.set_grad_enabled(exact and torch.is_grad_enabled()), _plain_arithmetic(query.device):
            out = self._attend(module, index, query, rows, call).to(query.dtype)
        if sources and not (exact and out.requires_grad):
            out = _NoGradient.apply(out, *sources)  # type: ignore[no-untyped-call]
        if self.rows is not None:
            padded = out.new_zeros((query.shape[0] * query.shape[2], *out.shape[1:]))
            out = padded.index_copy_(0, self.rows, out)
        return out.reshape(query.shape[0], query.shape[2], *out.shape[1:])

    def _attend(
        self, module: nn.Module, index: int, query: Tensor, rows: tuple[Tensor, Tensor, Tensor], call: dict[str, Any]
    ) -> Tensor:
        """Attention of a step's rows ``[N, H, D]`` in layer ``index``, in the dtype of the pages: ``[N, Hq, Dv]``."""
        layer, dtype = self._layer(index), self.step.layers.dtype
        q, k, v = (x.to(dtype) for x in rows)
        tiles = k.shape[1] // layer.kv_heads if layer.kind not in ("latent", "none") else 1
        if tiles > 1:
            q, k, v = _gathered(q, tiles), k[:, : layer.kv_heads], v[:, : layer.kv_heads]
        latent = None
        if layer.kind == "latent":
            nope = query.shape[-1] - layer.v_dim
            latent = LatentProjection.of(module, q_heads=query.shape[1], nope=nope, rope=layer.v_dim, rank=layer.k_dim)
        elif layer.source == index:
            self._write(index, k, v)
        ask = LayerCall(
            scale=call["scaling"] if call["scaling"] is not None else query.shape[-1] ** -0.5,
            kind=cast("AttendedKind", layer.kind),
            window=layer.window,
            softcap=call["softcap"],
            sinks=call["s_aux"],
            latent=latent,
        )
        out = self.step.attend(index, q, k, v, ask, self._inputs(module))
        return _gathered(out, layer.kv_heads) if tiles > 1 else out

    @torch.no_grad()
    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        dtype = self.step.layers.dtype
        self.step.write(layer, k.detach().to(dtype), v.detach().to(dtype))

    def _layer(self, index: int) -> LayerGeometry:
        layers = self.step.layers.geometry.layers
        if index >= len(layers):
            raise UnsupportedError(f"attention of layer {index}", why=f"its config knows of {len(layers)} layers")
        return layers[index]

    def _flat(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` to the stored tokens' rows ``[N, H, D]``."""
        return self._rows(x.transpose(1, 2))

    def _rows(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` to the stored tokens' rows ``[N, ...]``."""
        flat = x.squeeze(0) if x.shape[0] == 1 else x.reshape(-1, *x.shape[2:])
        return flat if self.rows is None else flat.index_select(0, self.rows)


def _plain_arithmetic(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: attention on pages computes in the pages' dtype."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _NoGradient(torch.autograd.Function):
    """Attention through pages or kernels, which know no gradients: the values as they are, an error in backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        """``out``, as a function of ``sources``."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            "a gradient through attention on a KVCache",
            why="the past lies in pages, and kernels, soft caps and sinks on them have no backward",
            hint="run the whole text in one forward without a cache (use_cache=False), or decode under torch.no_grad()",
        )


def _gathered(x: Tensor, tiles: int) -> Tensor:
    """Heads ``[N, tiles * n, D]`` reordered from tile by tile to head by head: ``[N, n * tiles, D]``.

    A model that repeats its KV heads as a whole (``repeat``, not ``repeat_interleave``) has its query heads in that
    order.
    """
    tiled: Tensor = x.unflatten(1, (tiles, -1))
    return tiled.transpose(1, 2).flatten(1, 2)


@untraced
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
    **others: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers' ``AttentionInterface`` (shapes as there: ``[B, H, T, D]`` in,
    ``[B, T, H, D]`` out).

    A step knows which tokens are real, and models build no mask for this implementation: one that comes nevertheless
    says more than paged attention computes, or is the layer's own making. Raises UnsupportedError for it, for a forward
    without a step, and for tensors among the arguments that the paged path would have to ignore.
    """
    name, step = type(module).__name__, CURRENT_STEP.get()
    if step is None:
        hint = "pass past_key_values=KVCache(model, ...)"
        raise UnsupportedError(f"attention of {name}", why="the forward carries no cache step", hint=hint)
    if attention_mask is not None:
        why = step.mask_refusal or "it makes an attention mask of its own"
        raise UnsupportedError(f"attention of {name}", why=why, hint=_MASK_HINT)
    unknown = [key for key, value in others.items() if isinstance(value, Tensor) and key not in _HARMLESS]
    if unknown:
        why = "; ".join(_MEANINGS.get(key, f"it passes {key}, which the paged path does not know") for key in unknown)
        raise UnsupportedError(f"attention of {name}", why=why)
    call = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    return step.attend(module, query, key, value, call), None


class StepCache(Cache):
    """The cache object that a model sees in a packed forward: takes latents, hands back the new rows only.

    ``positions [N]``: of the tokens in the row.
    """

    def __init__(self, step: ModelStep, positions: Tensor) -> None:
        super().__init__(layers=[])
        self.step = step
        self._positions = positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes latents ``[1, 1, T, D]``; other layers' tensors pass through and are written by the attention
        function.
        """
        self.step.write_latent(key_states, value_states, layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """0: positions are given explicitly, and only the new rows are visible to the model code.

        A layer that asks for itself counts its own positions, as ``arange(N) + seen``: it gets the tensor ``[N]`` that
        makes them right.
        """
        if layer_idx is None:
            return 0
        rows = torch.arange(self._positions.numel(), device=self._positions.device)
        return cast("int", self._positions - rows)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0: as for the keys, only the new rows count."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The new rows only."""
        return query_length, 0
