"""What each layer of a transformers model keeps of a token, read from the model's config alone.

``get_layer_types_and_kwargs`` of transformers says which layer is full, sliding, chunked, recurrent or shared; heads
and dims come from the config's own attributes, per layer where the config differs by layer. What no config attribute
tells is written down here once: families whose attention does not follow its own config, and families with learned
sink logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from kvfold.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["LayerGeometry", "LayerKind", "read_layers", "read_refusals"]

LayerKind = Literal["full", "sliding", "chunked", "latent", "none", "recurrent"]

_KINDS: Final[dict[str, LayerKind]] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
    "conv": "recurrent",
    "mamba": "recurrent",
    "recurrent": "recurrent",
    "hybrid": "recurrent",
    "hybrid_sliding": "recurrent",
    "moe": "none",
    "mlp": "none",
}
"""Layer type of transformers -> kind. A type that is not here is refused by its name."""

_SHARED: Final = "shared"
"""Type of a layer that reads the pages of another, in the words of this module."""

_SINK_LOGITS: Final = frozenset(
    {"deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "openai_privacy_filter"}
)
"""Model types whose attention has a learned sink logit per query head (``s_aux``) in every layer; no config says so."""

_SLIDING_SINK_LOGITS: Final = frozenset({"mimo_v2_flash"})
"""As above, in the sliding layers only."""

_NO_KV_CACHE: Final = frozenset({"openai-gpt", "reformer", "rwkv", "xlm", "xlnet", "xlstm"})
"""Causal models of transformers whose forward keeps no cache of keys and values, or one of its own making."""

_SLIDING_DOUBLE_KV_HEADS: Final = frozenset({"mimo_v2_flash"})
"""Model types whose sliding layers have twice the KV heads of the config."""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What one layer keeps.

    ``kv_heads`` x (``k_dim`` key + ``v_dim`` value numbers) a token. Latent layers keep one head of ``kv_lora_rank``
    (as key) and ``qk_rope_head_dim`` (as value) numbers: the two tensors transformers caches. ``window``: positions a
    sliding query reads, itself included, or the chunk of a chunked layer. ``softcap``: bound of the attention logits.
    ``sinks``: learned sink logits. ``source``: the layer whose keys and values it reads, its own index unless it
    shares those of another.
    """

    index: int
    kind: LayerKind
    kv_heads: int
    q_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    source: int = -1

    def __post_init__(self) -> None:
        if self.source < 0:
            object.__setattr__(self, "source", self.index)

    @property
    def stores(self) -> bool:
        """Whether the layer has pages of its own."""
        return self.kind not in ("none", "recurrent") and self.source == self.index


def read_layers(config: PreTrainedConfig) -> tuple[LayerGeometry, ...]:
    """One :class:`LayerGeometry` a layer of a (text) config, in order."""
    layers: list[LayerGeometry] = []
    for index, (layer_type, layer_config) in enumerate(_layer_types(config)):
        if layer_type == _SHARED:
            layers.append(_shared(config, layers, index))
            continue
        kind = _KINDS.get(layer_type, "none")
        window = _window(kind, layer_config)
        if kind in ("sliding", "chunked") and window is None:
            kind = "full"
        if kind == "full" and _caches_latent(layer_config):
            kind = "latent"
        layers.append(_layer(index, kind, window, config, layer_config))
    return tuple(layers)


def read_refusals(model_config: PreTrainedConfig, config: PreTrainedConfig) -> list[str]:
    """Reasons beside the layers' kinds why a paged cache cannot serve the model; ``config``: its text decoder's."""
    reasons = []
    if any(getattr(part, "is_encoder_decoder", False) for part in (model_config, config)):
        reasons.append("it is an encoder-decoder: cross-attention is not paged")
    elif getattr(config, "cross_attention_layers", None):
        reasons.append("it has cross-attention layers")
    both_ways = getattr(config, "use_bidirectional_attention", None)
    if getattr(config, "is_causal", True) is False or both_ways in (True, "all"):
        reasons.append("its attention is bidirectional")
    if config.model_type in _NO_KV_CACHE:
        return [*reasons, "its forward keeps no cache of keys and values"]
    layers = _layer_types(config)
    unknown_types = sorted({layer_type for layer_type, _ in layers} - {*_KINDS, _SHARED})
    for unknown in unknown_types:
        where = ", ".join(str(index) for index, (layer_type, _) in enumerate(layers) if layer_type == unknown)
        reasons.append(f"layers {where} are of type {unknown!r}, which keeps more than keys and values")
    if not unknown_types and any(getattr(layer_config, "index_topk", None) for _, layer_config in layers):
        reasons.append("its layers choose keys by an indexer (index_topk)")
    return reasons


def _layer_types(config: PreTrainedConfig) -> list[tuple[str, PreTrainedConfig]]:
    """(type, config) of each layer, as transformers' own caches see them; ``_SHARED`` where they store nothing."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ModelError(f"config of {config.model_type!r}", why="it does not say how many layers there are")
    if config.model_type in _NO_KV_CACHE:
        return [("mlp", config)] * config.num_hidden_layers
    try:
        types = list(get_layer_types_and_kwargs(config)[0])
    except ValueError as error:  # a config that contradicts itself
        raise ModelError(f"config of {config.model_type!r}", why=str(error)) from error
    # Releases differ: layers that share come as type "dummy", which layers without attention do too, or are left out.
    types += ["dummy"] * (config.num_hidden_layers - len(types))
    named = getattr(config, "layer_types", None) or types
    if len(named) != len(types):
        raise ModelError(f"config of {config.model_type!r}", why="its layer_types do not go with its number of layers")
    types = [
        (_SHARED if name not in ("moe", "mlp") else name) if layer_type == "dummy" else layer_type
        for layer_type, name in zip(types, named, strict=True)
    ]
    return [(layer_type, config.per_layer_config[index]) for index, layer_type in enumerate(types)]


def _window(kind: LayerKind, layer_config: PreTrainedConfig) -> int | None:
    """Window of a sliding layer, chunk of a chunked one."""
    name = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}.get(kind)
    window = getattr(layer_config, name, None) if name else None
    return int(window) if window else None


def _shared(config: PreTrainedConfig, before: Sequence[LayerGeometry], index: int) -> LayerGeometry:
    """Layer ``index`` on the pages of an earlier one: which the config names, or the last of its type that stores."""
    named: Sequence[int] | None = getattr(config, "kv_source_layers", None)
    types: Sequence[str] = config.layer_types
    alike = [layer.index for layer in before if layer.stores and types[layer.index] == types[index]]
    if not named and not alike:
        raise ModelError(
            f"config of {config.model_type!r}", why=f"layer {index} shares with a layer that does not exist"
        )
    source = before[named[index] if named else alike[-1]]
    return replace(source, index=index, source=source.index)


def _layer(
    index: int, kind: LayerKind, window: int | None, config: PreTrainedConfig, layer_config: PreTrainedConfig
) -> LayerGeometry:
    """A layer that does not share: heads and dims from its own config."""
    if kind in ("none", "recurrent"):
        return LayerGeometry(index=index, kind=kind, kv_heads=0, q_heads=0, k_dim=0, v_dim=0)
    model_type = config.model_type
    q_heads = _number(layer_config, index, "num_attention_heads", "n_head", "n_heads")
    if q_heads is None:
        raise ModelError(f"config of {model_type!r}", why="it does not say how many attention heads there are")
    if kind == "latent":
        kv_heads, k_dim, v_dim = 1, int(layer_config.kv_lora_rank), int(layer_config.qk_rope_head_dim)
    else:
        kv_heads, k_dim, v_dim = _expanded_shape(layer_config, index, q_heads)
    if kind == "sliding" and model_type in _SLIDING_DOUBLE_KV_HEADS:
        kv_heads *= 2
    softcap = getattr(layer_config, "attn_logit_softcapping", None)
    return LayerGeometry(
        index=index,
        kind=kind,
        kv_heads=kv_heads,
        q_heads=q_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        window=window,
        softcap=float(softcap) if softcap else None,
        sinks=model_type in _SINK_LOGITS or (kind == "sliding" and model_type in _SLIDING_SINK_LOGITS),
    )


def _expanded_shape(config: PreTrainedConfig, index: int, q_heads: int) -> tuple[int, int, int]:
    """(KV heads, key dim, value dim) of a layer that caches whole keys and values."""
    if getattr(config, "kv_lora_rank", None) and getattr(config, "qk_nope_head_dim", None):
        return q_heads, int(config.qk_nope_head_dim + config.qk_rope_head_dim), int(config.v_head_dim)
    hidden = _number(config, index, "hidden_size", "n_embd", "d_model", "dim")
    k_dim = _number(config, index, "head_dim", "dim_head", "kv_channels", "d_kv")
    if k_dim is None and hidden is None:
        raise ModelError(f"config of {config.model_type!r}", why="it gives neither a head dim nor a hidden size")
    if k_dim is None:
        k_dim = (hidden or 0) // q_heads
    v_dim = _number(config, index, "v_head_dim") or k_dim
    return _kv_heads(config, index, q_heads), k_dim, v_dim


def _kv_heads(config: PreTrainedConfig, index: int, q_heads: int) -> int:
    """KV heads; multi-query configs have one, those that name none have as many as query heads."""
    if getattr(config, "new_decoder_architecture", False):
        return q_heads  # the larger falcons repeat their KV heads before they cache them
    if getattr(config, "multi_query", False):
        return 1
    return _number(config, index, "num_key_value_heads", "num_kv_heads", "kv_n_heads") or q_heads


def _number(config: PreTrainedConfig, index: int, *names: str) -> int | None:
    """The first of these attributes that is set; one that lists a value for each layer gives this layer's."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple):
            value = value[index]
        if value:
            return int(value)
    return None


def _caches_latent(config: PreTrainedConfig) -> bool:
    """Whether the full layers cache the MLA latent instead of expanded keys and values.

    The config says that there is a latent, not whether it is what the modeling file caches: that changed between
    releases of transformers. Files that cache the latent have an attention class with ``expand_kv``.
    """
    if not getattr(config, "kv_lora_rank", None) or not getattr(config, "qk_rope_head_dim", None):
        return False
    package, _, module = type(config).__module__.rpartition(".")
    if not package.startswith("transformers.models.") or not module.startswith("configuration_"):
        return False
    modeling = importlib.import_module(f"{package}.modeling_{module.removeprefix('configuration_')}")
    return any(hasattr(value, "expand_kv") for value in vars(modeling).values() if isinstance(value, type))
