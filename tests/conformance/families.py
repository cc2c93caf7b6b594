"""Every causal model family of the installed transformers, each as a tiny random model that still has all its kinds of
layers.

Configs are shrunk mechanically: every attribute with a known meaning gets a small value, every list with one entry per
layer is cut to a few layers that cover all its entries. What these mechanics cannot know about a family is data in
``overrides``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conformance.overrides import LAYERS, OVERRIDES, PART_SIZES, SIZES, VARIANTS

__all__ = ["VOCAB", "base_family", "build_model", "families", "tiny_config"]

VOCAB = SIZES["vocab_size"]
_COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_KEEP_NONE = frozenset(
    {
        "attention_chunk_size",
        "head_dim",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "num_key_value_heads",
        "qk_head_dim",
        "sliding_window",
        "topk_group",
    }
)
"""Sizes that are given although the default leaves them out: some defaults are no model."""


def families() -> list[str]:
    """The model types that ``AutoModelForCausalLM`` knows, and the variants of some of them, in alphabetical order."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS})


def base_family(name: str) -> str:
    """The model type of a family or of a variant (``phi3+longrope`` is ``phi3``)."""
    return name.partition("+")[0]


def tiny_config(name: str) -> PreTrainedConfig:
    """A config of family ``name`` (or of a variant) with a few small layers of every kind it has."""
    given = OVERRIDES.get(base_family(name), {}) | VARIANTS.get(name, {})
    return _shrink(CONFIG_MAPPING[base_family(name)], given)


def build_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A float32 model with weights drawn so that attention matters and logits are of the order of 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            _redraw(parameter, generator)
    model.requires_grad_(False)
    return model


def _redraw(parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Matrices get standard deviation ``1 / sqrt(fan_in)``; vectors (norms, biases, learned sinks) are shaken a
    little.
    """
    noise: Tensor = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() >= 2:
        parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    else:
        parameter.nan_to_num_(0.0).add_(noise, alpha=0.1)


def _shrink(kind: type[PreTrainedConfig], given: dict[str, Any], part: str = "") -> PreTrainedConfig:
    """A small config of class ``kind``; ``given`` wins over the mechanics, and holds dicts for the parts of a
    wrapper.
    """
    default = kind()
    parts = {
        name: _shrink(type(value), OVERRIDES.get(value.model_type, {}) | given.get(name, {}), name)
        for name, value in _parts(default)
    }
    sizes = SIZES | (PART_SIZES if part and "text" not in part else {})
    values = {name: value for name, value in sizes.items() if _wants(default, name)}
    if (
        "kv_lora_rank" in values
    ):  # latent attention: the head dim of the config is the rotary part, and no heads are shared
        values |= {"head_dim": values["qk_rope_head_dim"]} if "head_dim" in values else {}
        values |= {"num_key_value_heads": values["num_attention_heads"]} if "num_key_value_heads" in values else {}
    values |= _thinned(default, int(given.get("_layers", LAYERS)), values)
    values |= {name: value for name, value in given.items() if not name.startswith("_") and name not in parts}
    for name in given.get("_drop", ()):
        values.pop(name, None)
    return kind(**values, **parts)


def _parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    for name in getattr(type(config), "sub_configs", {}):
        value = _get(config, name)
        if isinstance(value, PreTrainedConfig):
            yield name, value


def _get(config: PreTrainedConfig, name: str) -> Any:
    """An attribute of a default config; None where it has none, or none of its own."""
    try:
        return getattr(config, name, None)
    except (AttributeError, NotImplementedError):  # computed from parts that are not there
        return None
    except RuntimeError:  # varies by layer
        return getattr(config.per_layer_config[0], name, None)


def _wants(default: PreTrainedConfig, name: str) -> bool:
    """Whether a size of this name means something to the config: it is a number there, or a limit that is off."""
    if name in type(default).attribute_map:  # the name it maps to is in the table as well
        return type(default).attribute_map[name] not in SIZES
    value = _get(default, name)
    if value is None:
        return name in _KEEP_NONE and name in vars(default)
    return isinstance(value, int | float | bool)


def _thinned(default: PreTrainedConfig, layers: int, values: dict[str, Any]) -> dict[str, Any]:
    """Layer count, and every list with one entry per layer cut to the chosen layers."""
    name = next((name for name in _COUNT_NAMES if name in values), None)
    count = _get(default, name) if name else None
    if name is None or not isinstance(count, int):
        return {}
    lists = {
        key: value
        for key, value in vars(default).items()
        if isinstance(value, list | tuple) and len(value) == count and not key.startswith("_")
    }
    rows = list(zip(*lists.values(), strict=True)) or [()] * count
    chosen: list[int] = []
    for index, row in enumerate(rows):
        if str(row) not in {str(rows[other]) for other in chosen}:
            chosen.append(index)
    if len(chosen) > layers:
        chosen = chosen[:layers]
    rest = [index for index in range(count) if index not in chosen]
    chosen = sorted([*chosen, *rest[: layers - len(chosen)]])
    cut = {key: [_small(key, value[index]) for index in chosen] for key, value in lists.items()}
    if "sliding_window" in values and set(cut.get("layer_types", ())) == {
        "full_attention"
    }:  # it has windows, off by default
        cut["layer_types"] = [("full_attention", "sliding_attention")[place % 2] for place in range(len(chosen))]
    return cut | {other: len(chosen) for other in _COUNT_NAMES if other in values}


def _small(key: str, value: Any) -> Any:
    return SIZES[key] if key in SIZES and value else value
