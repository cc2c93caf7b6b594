"""What a cache holds, in bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["held_bytes"]

_PLAIN = (str, bytes, int, float, type, torch.dtype, torch.device, torch.nn.Module)


def held_bytes(cache: Any) -> int:
    """Allocated bytes of every tensor that can be reached from ``cache``: raw keys and values, codes, scales, zeros.

    Found by walking the attributes of the cache, its layers and what these hold, tensors that are made of tensors
    (quanto's) included. Of a tensor the whole storage counts, for that is what stays allocated, and each storage
    counts once.
    """
    storages: dict[int, int] = {}
    _walk(cache, storages, seen=set())
    return sum(storages.values())


def _walk(thing: Any, storages: dict[int, int], seen: set[int]) -> None:
    if id(thing) in seen or isinstance(thing, _PLAIN):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if type(thing) is not Tensor and hasattr(thing, "__tensor_flatten__"):  # has no storage, but tensors inside
            for name in thing.__tensor_flatten__()[0]:
                _walk(getattr(thing, name), storages, seen)
        elif (storage := thing.untyped_storage()).nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, dict):
        for part in thing.values():
            _walk(part, storages, seen)
    elif isinstance(thing, (list, tuple, set)):
        for part in thing:
            _walk(part, storages, seen)
    elif hasattr(thing, "__dict__") and not callable(thing):
        for part in vars(thing).values():
            _walk(part, storages, seen)
