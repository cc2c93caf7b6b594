"""How a model comes to attend over pages for the length of a forward: the switch of its decoder's attention function.

The decoder is found by structure (`get_decoder` of transformers, and the modules under it); the towers that read images
or sound stay on their own attention. Nothing is left behind when the forward ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvfold.masks import deviation
from kvfold.modeling import CURRENT_STEP, ModelStep, attention_forward
from kvfold.untraced import untraced

__all__ = ["ATTENTION_NAME", "AttentionSwitch", "attention_configs", "decoder_of", "mask_forward"]

ATTENTION_NAME = "kvfold"
"""Name of the attention and mask functions in transformers' registries."""


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model whose layers attend on the cache: its text decoder, or all of it where there is no other."""
    decoder: object = model.get_decoder()
    if isinstance(decoder, nn.Module) and any(_is_layer(module) for module in decoder.modules()):
        return decoder
    return model


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configs that a model's decoder and its masks ask for the name of their attention function, each once."""
    found = [getattr(module, "config", None) for module in decoder_of(model).modules()]
    found.append(model.config.get_text_config(decoder=True))
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation_internal")}.values())


@untraced
def mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The function registered with transformers' ``AttentionMaskInterface``: None, as paged attention needs no mask.

    Where a mask says more than paged attention computes, something of its shape ``[B, 1, T, S]`` that holds no memory:
    a layer that is given it raises, and not every model uses every mask that it makes.
    """
    step = CURRENT_STEP.get()
    if step is None or mask_function is None:  # the attention function refuses what runs without a step
        return None
    why = deviation(
        mask_function,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        windows=frozenset(layer.window for layer in step.step.layers.geometry.layers if layer.window),
        padding=attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None,
        device=device,
        use_vmap=use_vmap,
    )
    if why is None:
        return None
    step.mask_refusal = why
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(batch_size, 1, q_length, kv_length)


class AttentionSwitch:
    """Puts a model on the ``kvfold`` attention function for the length of a forward, and back.

    A model stays exactly what it was outside of those forwards; nothing of transformers is patched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        AttentionInterface.register(ATTENTION_NAME, attention_forward)
        AttentionMaskInterface.register(ATTENTION_NAME, mask_forward)
        self.configs = attention_configs(model)
        self._layers = [module for module in decoder_of(model).modules() if _is_layer(module)]

    @contextmanager
    def active(self, step: ModelStep) -> Iterator[None]:
        """``with switch.active(step): model(...)``. Whatever is raised, here or inside, the model is as before."""
        before = [(config, config._attn_implementation_internal) for config in self.configs]
        outer = CURRENT_STEP.get()
        hooks: list[Any] = []
        try:
            CURRENT_STEP.set(step)
            for config in self.configs:
                config._attn_implementation_internal = ATTENTION_NAME
            if step.step.wants_inputs:
                for module in self._layers:
                    hooks.append(module.register_forward_pre_hook(step.note_inputs, with_kwargs=True))
            yield
        finally:
            try:
                _restore(outer, before, hooks)
            except BaseException:  # an interrupt while cleaning up: what it skipped is done again
                _restore(outer, before, hooks)
                raise


@untraced
def _restore(step: ModelStep | None, configs: list[tuple[Any, Any]], hooks: list[Any]) -> None:
    """Undoes a switch; may be done twice."""
    CURRENT_STEP.set(step)
    for config, name in configs:
        config._attn_implementation_internal = name
    for hook in hooks:
        hook.remove()


def _is_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int)
