"""What a paged cache answers to transformers, and to code that takes it for tensors of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NoReturn, SupportsIndex

from kvfold.errors import UnsupportedError
from kvfold.geometry import Geometry
from kvfold.hf_forward import SteppedCache

__all__ = ["PagedAnswers"]

_WHY: Final = "its keys and values lie in pages, as the recipe stores them; there are no tensors for each layer"
_HINT: Final = "copy.deepcopy(cache) makes a copy of it; to look at tensors, run transformers' DynamicCache"

_OF_TENSORS: Final = frozenset({"key_cache", "value_cache", "to_legacy_cache"})
"""Attributes of older caches of transformers."""


class _NoTensorsError(UnsupportedError, AttributeError):
    """An attribute that only a cache of tensors has: `hasattr` finds nothing, everything else says why."""


class _NoLayers(list[Any]):
    """Stands where transformers' own caches keep their layers."""

    def __getitem__(self, index: Any) -> NoReturn:
        raise UnsupportedError("the layers of a KVCache", why=_WHY, hint=_HINT)

    def __iter__(self) -> NoReturn:
        raise UnsupportedError("the layers of a KVCache", why=_WHY, hint=_HINT)


class PagedAnswers(SteppedCache):
    """The part of transformers' ``Cache`` that follows from a model's ``geometry`` and from paging alone."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(layers=_NoLayers())
        self.geometry = geometry

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of the keys of the coming step."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: bounded by memory, not by a length."""
        return -1

    @property
    def max_cache_len(self) -> int:
        """Not to be had: peft asks a cache for it when it is about to put another one, with learned keys, in its place.

        Raises UnsupportedError.
        """
        raise UnsupportedError(
            "virtual tokens of peft on a KVCache",
            why="prefix tuning and cartridges bring keys and values in a cache of their own, which takes its place",
            hint="use an adapter that changes weights (LoRA and its kin), or transformers' own cache",
        )

    @property
    def is_compileable(self) -> bool:
        """False: a step's shapes change."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: see `KVCache.crop`."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether it has a window. Masks are ours, so every layer presents itself as full."""
        return [False] * len(self.geometry.layers)

    @property
    def is_linear(self) -> list[bool]:
        """For each layer, whether it keeps a recurrent state: none does, such models are refused."""
        return [False] * len(self.geometry.layers)

    @property
    def is_dummy(self) -> list[bool]:
        """For each layer, whether it stores nothing of its own."""
        return [layer.kind == "none" or layer.source != layer.index for layer in self.geometry.layers]

    def __len__(self) -> int:
        return len(self.geometry.layers)

    # What only a cache of tensors could answer.

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> NoReturn:
        """Raises UnsupportedError: pages stay where they are."""
        raise UnsupportedError("offloading a layer of a KVCache", why=_WHY, hint="choose a recipe with fewer bits")

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> NoReturn:
        """Raises UnsupportedError: pages stay where they are."""
        raise UnsupportedError("prefetching a layer of a KVCache", why=_WHY, hint="choose a recipe with fewer bits")

    def __getitem__(self, index: int) -> NoReturn:
        raise UnsupportedError("a layer of a KVCache", why=_WHY, hint=_HINT)

    def __iter__(self) -> Iterator[Any]:
        raise UnsupportedError("iterating over a KVCache", why=_WHY, hint=_HINT)

    def __getattr__(self, name: str) -> NoReturn:
        if name in _OF_TENSORS:
            raise _NoTensorsError(f"{name} of a KVCache", why=_WHY, hint=_HINT)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UnsupportedError(
            "pickling a KVCache",
            why="its pages are memory of this process",
            hint="keep the token ids and read them again; within this process copy.deepcopy(cache) makes a copy",
        )
