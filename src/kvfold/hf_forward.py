"""A model's ``forward`` while a drop-in cache may come with it: it opens a paged step, switches the model, and closes
both, whatever happens in between.

:class:`CachedForward` stands in the place of ``model.forward``. A forward without a cache of ours goes straight on;
copies and pickles of the model do not carry it.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvfold.errors import ModelError, UnsupportedError
from kvfold.modeling import ModelStep
from kvfold.switch import AttentionSwitch
from kvfold.untraced import skipped, untraced

__all__ = ["CachedForward", "SteppedCache", "padding_mask", "runnable_model"]

_NO_GRAPH: Final = (
    "kvfold's KVCache cannot be part of a whole graph: compile without fullgraph=True, or run this forward without it"
)


_TEXT: Final = frozenset(
    "input_ids inputs_embeds attention_mask position_ids cache_position token_type_ids mm_token_type_ids labels "
    "logits_to_keep".split()
)
"""Tensors of a forward that are its text, or say something about it."""


class SteppedCache(Cache, ABC):
    """A cache that is told when a forward of its model begins and ends."""

    @abstractmethod
    def open_step(
        self,
        model: PreTrainedModel,
        inputs: Tensor,
        attention_mask: object,
        others: Sequence[str],
        positions: object,
    ) -> ModelStep:
        """Reserves room for the new positions of a forward of ``model``: ``inputs [B, T]``, or ``[B, T, E]``.

        ``others``: names of tensors beside the text, such as images. ``positions``: the position ids, if given.
        """

    @abstractmethod
    def close_step(self, *, failed: bool) -> None:
        """Commits the open step, or drops it when the forward failed; nothing, when none is open."""

    @property
    @abstractmethod
    def in_forward(self) -> bool:
        """Whether a step is open."""


class CachedForward:
    """The ``forward`` of a model, around the one it had before. One for each model, shared by all its caches.

    ``checked``: the model's paged path was compared with its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._forward: Callable[..., Any] = model.forward
        self._switch = AttentionSwitch(model)
        self._signature = _signature(model)
        self.checked = False
        functools.update_wrapper(self, self._forward, updated=())

    @classmethod
    def on(cls, model: PreTrainedModel) -> CachedForward:
        """That of ``model``, put there on first use."""
        forward = model.__dict__.get("forward")
        if not isinstance(forward, cls) or forward._model is not model:
            forward = model.forward = cls(model)
        return forward

    @classmethod
    def has_checked(cls, model: PreTrainedModel) -> bool:
        """Whether the paged path of ``model`` was compared with its own before."""
        forward = model.__dict__.get("forward")
        return isinstance(forward, cls) and forward.checked

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy or pickle of the model gets the forward that this one stands for, not this one."""
        forward = self._forward
        if isinstance(forward, MethodType) and forward.__self__ is self._model:
            return getattr, (self._model, forward.__name__)
        return _itself, (forward,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward; with a cache of ours among its arguments, over the pages of that cache."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, SteppedCache):
                return self._over_pages(value, args, kwargs)
        return self._forward(*args, **kwargs)

    @skipped(_NO_GRAPH)
    def _over_pages(self, cache: SteppedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if cache.in_forward:  # a wrapper around this one has opened its step already
            return self._forward(*args, **kwargs)
        try:
            step = self._open(cache, args, kwargs)
            with self._switch.active(step):
                output = self._forward(*args, **kwargs)
            cache.close_step(failed=False)
        except BaseException:
            cache.close_step(failed=True)
            raise
        return output

    @untraced
    def _open(self, cache: SteppedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelStep:
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        inputs = next((x for x in map(given.get, ("input_ids", "inputs_embeds")) if isinstance(x, Tensor)), None)
        if inputs is None:
            raise ModelError("a forward without input_ids or inputs_embeds")
        self._refuse_attentions(given.get("output_attentions"))
        others = [name for name, value in given.items() if isinstance(value, Tensor) and name not in _TEXT]
        return cache.open_step(self._model, inputs, given.get("attention_mask"), others, given.get("position_ids"))

    def _refuse_attentions(self, asked: object) -> None:
        """Raises UnsupportedError if the forward is to give attention weights, by argument or by config."""
        if asked is None:
            asked = any(getattr(c, "output_attentions", False) for c in (self._model.config, *self._switch.configs))
        if asked:
            raise UnsupportedError(
                "output_attentions=True with a KVCache",
                why="attention over pages never holds its weights",
                hint="leave it out, or run that forward with transformers' own cache and attn_implementation='eager'",
            )


def padding_mask(mask: object, batch: int, columns: int) -> Tensor:
    """A forward's attention mask as bool ``[batch, columns]``, on the CPU. UnsupportedError if it is anything but a 2-D
    mask of ones and zeros, which says what is padding.
    """
    hint = f"pass a 2-D mask of {batch} rows and {columns} columns, 1 for tokens and 0 for padding, or none"
    why = "a KVCache attends causally, and takes from a mask what is padding and nothing else"
    if not isinstance(mask, Tensor):
        raise UnsupportedError(f"an attention mask that is a {type(mask).__name__}", why=why, hint=hint)
    if tuple(mask.shape) != (batch, columns):
        raise UnsupportedError(f"an attention mask of shape {tuple(mask.shape)}", why=why, hint=hint)
    bits = mask.to("cpu", torch.bool)
    if mask.dtype != torch.bool and bool((mask.to("cpu") != bits).any()):
        raise UnsupportedError("an attention mask of other values than 0 and 1", why=why, hint=hint)
    return bits


def runnable_model(model: object) -> PreTrainedModel:
    """The transformers model that ``model`` is, or is compiled from. ModelError or UnsupportedError, with what to pass
    instead, for everything else.
    """
    original = getattr(model, "_orig_mod", None)  # torch.compile
    if isinstance(model, nn.Module) and isinstance(original, nn.Module):
        model = original
    if isinstance(model, PreTrainedModel):
        return model
    what = f"KVCache for a {type(model).__name__}"
    if any(kind.__module__.startswith("peft.") and kind.__name__ == "PeftModel" for kind in type(model).__mro__):
        learned = getattr(getattr(model, "active_peft_config", None), "peft_type", "")
        if any(name in str(learned) for name in ("PREFIX_TUNING", "CARTRIDGE")):
            raise UnsupportedError(
                what,
                why="the keys and values of its virtual tokens come in a cache of their own",
                hint="use an adapter that changes weights (LoRA and its kin), or transformers' own cache",
            )
        why = "it wraps the transformers model that runs"
        raise ModelError(what, why=why, hint="pass model.get_base_model(), and call or generate with the PeftModel")
    why, inner = "it is not a transformers model", getattr(model, "module", None)
    if isinstance(model, nn.Module) and isinstance(inner, PreTrainedModel):
        why, hint = "it wraps a transformers model", "pass model.module, and run that"
    else:
        hint = "pass a model that AutoModelForCausalLM.from_pretrained returns"
    raise ModelError(what, why=why, hint=hint)


def _signature(model: PreTrainedModel) -> inspect.Signature:
    """Of the model's forward; of its class's where a wrapper hides the names."""
    signature = inspect.signature(model.forward)
    if {"input_ids", "inputs_embeds"} & set(signature.parameters):
        return signature
    whole = inspect.signature(type(model).forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward
