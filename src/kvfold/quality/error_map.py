"""Where a recipe's error lies: relative rms error of packed keys and values, for each layer and head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.codecs.calibrated import calibrated_bases
from kvfold.codecs.pages import PageStore
from kvfold.formats import sealed_until, sink_blocks
from kvfold.geometry import Geometry, LayerGroup
from kvfold.quality.results import ErrorMap
from kvfold.quality.watch import watched_forward
from kvfold.recipe import Recipe

__all__ = ["error_map", "keys_and_values"]

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Layer -> its keys ``[T, Hkv, Dk]`` and values ``[T, Hkv, Dv]``."""


def keys_and_values(model: PreTrainedModel, tokens: Sequence[int]) -> KeysAndValues:
    """What the layers of ``model`` store for ``tokens`` under ``raw``, those that keep a cache of their own."""
    written: KeysAndValues = {}

    def wrote(layer: int, k: Tensor, v: Tensor) -> None:
        written[layer] = (k.clone(), v.clone())

    watched_forward(model, tokens, wrote=wrote)
    own = {layer.index for layer in Geometry.from_config(model.config).layers if layer.stores}
    return {layer: kv for layer, kv in sorted(written.items()) if layer in own}


def error_map(geometry: Geometry, recipe: Recipe, held: KeysAndValues) -> ErrorMap | None:
    """Encodes and decodes ``held`` through the recipe's own pages: the tokens that would be packed of it.

    None for a recipe that packs nothing, or if the text is too short for it to.
    """
    found: dict[int, tuple[list[float], list[float]]] = {}
    for group in geometry.groups(recipe, next(iter(held.values()))[0].dtype.itemsize):
        if group.packed is None:
            return None
        for layer in group.layers:
            errors = _layer_errors(group, layer, recipe, *held[layer])
            if errors is None:
                return None
            found[layer] = errors
    ordered = [found[layer] for layer in sorted(found)]
    return ErrorMap(k=[k for k, _ in ordered], v=[v for _, v in ordered])


def _layer_errors(
    group: LayerGroup, layer: int, recipe: Recipe, k: Tensor, v: Tensor
) -> tuple[list[float], list[float]] | None:
    if group.packed is None:
        return None
    size = recipe.block_size
    first = sink_blocks(group.sinks, size)
    blocks = sealed_until(k.shape[0], size, group.sinks, group.recent) - first
    if blocks <= 0:
        return None
    packed = slice(first * size, (first + blocks) * size)
    pages = blocks * group.kv_heads
    arena = torch.zeros(pages * group.packed.page_bytes, dtype=torch.uint8, device=k.device)
    bases = None
    if recipe.calibration:
        bases = calibrated_bases(recipe.calibration, group.layers, group.packed, k.device)
    store = PageStore(arena, group.packed, k.dtype, bases=bases, heads=group.kv_heads, layers=len(group.layers))
    address = torch.arange(pages, device=k.device) * group.packed.page_bytes
    # [T, H, D] -> [blocks * H, S, D]: pages hold one head
    wanted = [x[packed].unflatten(0, (blocks, size)).transpose(1, 2).flatten(0, 1) for x in (k, v)]
    place = group.layers.index(layer)
    store.write_pages(address, wanted[0], wanted[1], layer=place)
    errors = [
        _relative(*(x.reshape(blocks, group.kv_heads, -1).transpose(0, 1).flatten(1) for x in (want, got)))
        for want, got in zip(wanted, store.decode_pages(address, layer=place), strict=True)
    ]
    return errors[0], errors[1]


def _relative(wanted: Tensor, found: Tensor) -> list[float]:
    """``[H, n]``: for each row, the root of the error's energy over the energy."""
    wanted, found = wanted.double(), found.double()
    energy = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
    ratios: list[float] = ((found - wanted).square().sum(-1) / energy).sqrt().tolist()
    return ratios
