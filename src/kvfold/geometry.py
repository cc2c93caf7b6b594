"""The geometry of a model: which layers keep what, in which groups, and how many bytes that makes under a recipe.

A transformers config goes in, plain frozen data comes out. Two layers share a group when they live alike: same kind,
heads, dims and window. Layers that keep nothing, or read another layer's pages, have no place in a group of their
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvfold.calibration import Calibration
from kvfold.errors import ModelError
from kvfold.formats import TABLE_ENTRY_BYTES, BandFormat, PageFormat, VectorFormat, block_counts
from kvfold.layers import LayerGeometry, LayerKind, read_layers, read_refusals
from kvfold.recipe import CALIBRATION_FILE, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["UNBOUNDED", "Geometry", "LayerGeometry", "LayerGroup", "LayerKind"]

UNBOUNDED: Final = 2**31 - 1
"""``max_positions`` of a model whose config states no limit."""

_MAX_POSITIONS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "seq_length",
)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that live alike, and how their pages look raw and packed (None: nothing is ever packed).

    A block of the group is ``[layer, kv_head]`` pages side by side. ``sinks``, ``recent``: tokens kept raw at either
    end.
    """

    name: str
    layers: tuple[int, ...]
    kind: LayerKind
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None
    raw: PageFormat
    packed: PageFormat | None
    sinks: int
    recent: int

    @property
    def pages_per_block(self) -> int:
        """Pages of a block: one for each layer and KV head."""
        return len(self.layers) * self.kv_heads

    @property
    def raw_block_bytes(self) -> int:
        """Bytes of a block in the model dtype."""
        return self.pages_per_block * self.raw.page_bytes

    @property
    def packed_block_bytes(self) -> int:
        """Bytes of a sealed block; 0 when nothing is ever packed."""
        return self.pages_per_block * self.packed.page_bytes if self.packed else 0

    def sequence_bytes(self, length: int) -> int:
        """Bytes a private sequence of ``length`` stored tokens holds in this group: live blocks and their table
        entries.
        """
        counts = block_counts(
            length,
            block_size=self.raw.block_size,
            kind=self.kind,
            window=self.window,
            sinks=self.sinks,
            recent=self.recent,
            packs=self.packed is not None,
        )
        raw, packed = self.raw_block_bytes + TABLE_ENTRY_BYTES, self.packed_block_bytes + TABLE_ENTRY_BYTES
        return counts.raw * raw + counts.packed * packed


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model as its cache sees it. ``max_positions`` is :data:`UNBOUNDED` where the config states no limit.

    ``refusals``: reasons beyond the layers' kinds why it cannot be served, as :meth:`unsupported` gives them.
    """

    model_type: str
    layers: tuple[LayerGeometry, ...]
    hidden: int
    vocab: int
    max_positions: int
    refusals: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> Geometry:
        """The geometry of a transformers config; of its text decoder, when the model has more than that.

        ModelError if the config does not say how many layers or heads there are, or how wide they are.
        """
        text = config.get_text_config(decoder=True)
        return cls(
            model_type=config.model_type,
            layers=read_layers(text),
            hidden=_required(text, "hidden_size", "n_embd", "d_model", "dim"),
            vocab=_required(text, "vocab_size", "n_vocab"),
            max_positions=_max_positions(text),
            refusals=tuple(read_refusals(config, text)),
        )

    def unsupported(self, recipe: Recipe | None = None) -> list[str]:
        """Every reason why ``recipe`` (None: any recipe) cannot serve this model; empty when it can be served."""
        reasons = list(self.refusals)
        recurrent = [str(layer.index) for layer in self.layers if layer.kind == "recurrent"]
        if recurrent:
            reasons.append(f"layers {', '.join(recurrent)} keep a recurrent state, which is not paged")
        if not reasons and not any(layer.stores for layer in self.layers):
            reasons.append("no layer keeps keys and values")
        if recipe is not None and recipe.calibration is not None:
            reasons += self._calibration_refusals(recipe.calibration)
        return reasons

    def _calibration_refusals(self, path: str) -> list[str]:
        stored = [layer for layer in self.layers if layer.stores]
        latent = [str(layer.index) for layer in stored if layer.kind == "latent"]
        if latent:
            return [f"layers {', '.join(latent)} keep latents, for which there is no calibrated code"]
        if not path:
            return [f"no {CALIBRATION_FILE} lies beside its weights: make it (kvfold calibrate) or name one"]
        try:
            calibration = Calibration.load(path)
        except ModelError as error:
            return [str(error)]
        if [layer.index for layer in stored] != list(calibration.layers):
            return [f"the calibration {path} is of a model with other layers"]
        shapes = [(calibration.shape(layer.index, "k"), calibration.shape(layer.index, "v")) for layer in stored]
        if shapes != [((layer.kv_heads, layer.k_dim), (layer.kv_heads, layer.v_dim)) for layer in stored]:
            return [f"the calibration {path} is of a model with other heads"]
        return []

    def groups(self, recipe: Recipe, dtype_bytes: int = 2) -> tuple[LayerGroup, ...]:
        """The layer groups under ``recipe``, by first layer; ``dtype_bytes``: width of the model dtype."""
        groups = []
        for name, (members, packed) in self._alike(recipe, dtype_bytes).items():
            first = members[0]
            raw = VectorFormat.raw(first.k_dim, dtype_bytes), VectorFormat.raw(first.v_dim, dtype_bytes)
            bounds = _summary_dims(first, recipe)
            group = LayerGroup(
                name=name,
                layers=tuple(layer.index for layer in members),
                kind=first.kind,
                kv_heads=first.kv_heads,
                k_dim=first.k_dim,
                v_dim=first.v_dim,
                window=first.window,
                # Pages that stay raw beside packed ones are always read.
                raw=PageFormat(recipe.block_size, *raw, summary_dims=bounds if recipe.is_raw else 0),
                packed=None if recipe.is_raw else PageFormat(recipe.block_size, *packed, summary_dims=bounds),
                sinks=recipe.sinks,
                recent=recipe.recent,
            )
            groups.append(group)
        return tuple(groups)

    def layer_slot(self, recipe: Recipe) -> dict[int, tuple[int, int]]:
        """Layer index -> (group number, place within the group). A layer that shares has the place of its source."""
        slots = {
            layer: (number, place)
            for number, group in enumerate(self.groups(recipe))
            for place, layer in enumerate(group.layers)
        }
        shared = {layer.index: slots[layer.source] for layer in self.layers if layer.source in slots}
        return dict(sorted({**shared, **slots}.items()))

    def bytes_per_token(self, recipe: Recipe | None = None, dtype_bytes: int = 2) -> float:
        """Bytes one more token costs in the long run: codes, scales, padding and table entry of the layers without a
        window.

        The slope of :meth:`cache_bytes` over whole blocks. Layers with a window stop growing and add nothing.
        """
        recipe = recipe or Recipe()
        unbounded = [group for group in self.groups(recipe, dtype_bytes) if group.window is None]
        per_block = [group.packed_block_bytes or group.raw_block_bytes for group in unbounded]
        return (sum(per_block) + TABLE_ENTRY_BYTES * len(unbounded)) / recipe.block_size

    def cache_bytes(self, recipe: Recipe | None, dtype_bytes: int, lengths: Sequence[int]) -> int:
        """Bytes the memory holds for private sequences of ``lengths`` stored tokens: blocks by state, and table
        entries.
        """
        groups = self.groups(recipe or Recipe(), dtype_bytes)
        return sum(group.sequence_bytes(length) for group in groups for length in lengths)

    def _alike(self, recipe: Recipe, dtype_bytes: int) -> dict[str, tuple[list[LayerGeometry], _Packed]]:
        """Layers that store and live alike, and their packed formats, by group name; in the order of first layers."""
        alike: dict[tuple[object, ...], list[LayerGeometry]] = {}
        packed: dict[tuple[object, ...], _Packed] = {}
        formats = _packed_formats([layer for layer in self.layers if layer.stores], recipe, dtype_bytes)
        for layer in self.layers:
            if layer.stores:
                own = formats[layer.index]
                key = (layer.kind, layer.kv_heads, layer.k_dim, layer.v_dim, layer.window, own)
                alike.setdefault(key, []).append(layer)
                packed[key] = own
        return {
            name: (members, packed[key])
            for name, (key, members) in zip(_names(list(alike.values())), alike.items(), strict=True)
        }


_Packed = tuple[VectorFormat | BandFormat, VectorFormat | BandFormat]


def _summary_dims(layer: LayerGeometry, recipe: Recipe) -> int:
    """Channels whose bounds the pages of a layer carry: those of its keys, if there is a past to retrieve from."""
    if recipe.retrieval is None or layer.window is not None:
        return 0
    return layer.k_dim + layer.v_dim if layer.kind == "latent" else layer.k_dim


def _packed_formats(layers: Sequence[LayerGeometry], recipe: Recipe, dtype_bytes: int) -> dict[int, _Packed]:
    """How each layer's keys and values look packed."""
    if recipe.calibration is None:
        return {
            layer.index: (
                recipe.packed_format(layer.k_dim, recipe.k_bits, dtype_bytes, recipe.scales),
                recipe.packed_format(layer.v_dim, recipe.v_bits, dtype_bytes),
            )
            for layer in layers
        }
    calibration = Calibration.load(recipe.calibration)
    keys, values = calibration.bands("k", recipe.k_bits or 0), calibration.bands("v", recipe.v_bits or 0)
    return {
        layer.index: (BandFormat(layer.k_dim, keys[layer.index]), BandFormat(layer.v_dim, values[layer.index]))
        for layer in layers
    }


def _names(groups: Sequence[Sequence[LayerGeometry]]) -> list[str]:
    """A name for each group: as short as tells them apart."""
    firsts = [members[0] for members in groups]
    short = [_short_name(layer.kind, layer.window) for layer in firsts]
    wide = [f"{name}-{x.kv_heads}x{x.k_dim}+{x.v_dim}" for name, x in zip(short, firsts, strict=True)]
    return [
        a if short.count(a) == 1 else b if wide.count(b) == 1 else f"{a}@{layer.index}"
        for a, b, layer in zip(short, wide, firsts, strict=True)
    ]


def _short_name(kind: LayerKind, window: int | None) -> str:
    return kind if window is None else f"{kind}{window}"


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    """The first of these attributes that holds a positive number."""
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value > 0), None)


def _max_positions(text: PreTrainedConfig) -> int:
    """Positions that a model is made for. With dynamic NTK they are ``factor`` times those its config names."""
    stated = _first(text, *_MAX_POSITIONS)
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (parameters, *parameters.values()) if isinstance(kind, dict) and "rope_type" in kind]
    factors = [kind.get("factor") or 1.0 if kind["rope_type"] == "dynamic" else 1.0 for kind in kinds]
    return int(stated * max(1.0, min(factors, default=1.0))) if stated else UNBOUNDED


def _required(config: PreTrainedConfig, *names: str) -> int:
    value = _first(config, *names)
    if value is None:
        raise ModelError(f"config of {config.model_type!r}", why=f"it has none of {', '.join(names)}")
    return value
