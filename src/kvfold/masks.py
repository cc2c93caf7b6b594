"""What a model's attention mask says beyond what paged attention computes.

Paged attention is causal, within a layer's window, over the real tokens. A model of transformers makes its masks from
mask functions: ``f(batch, head, query, key) -> bool``. Compositions of the known ones are read from their structure,
which costs nothing. Where a part is unknown, as an overlay that lets the tokens of an image see each other, the
function is compared with the known rest on every pair of positions of the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask

__all__ = ["MaskFunction", "deviation"]

MaskFunction = Callable[..., Any]

_TILE: Final = 1 << 22
"""Pairs of positions that are compared at a time."""

_MAKERS: Final = "transformers.masking_utils"


@dataclass(frozen=True, slots=True)
class _Reading:
    """A mask function, read. ``known``: its parts that paged attention can compute, all of which hold for a visible
    pair. ``causal``: one of them is the causal mask. ``windows``: of its windows and chunks. ``exact``: there is
    nothing else to it.
    """

    known: tuple[MaskFunction, ...] = ()
    causal: bool = False
    windows: frozenset[int] = frozenset()
    exact: bool = True

    def meet(self, other: _Reading) -> _Reading:
        """Both must hold."""
        return _Reading(
            (*self.known, *other.known),
            self.causal or other.causal,
            self.windows | other.windows,
            self.exact and other.exact,
        )


_UNKNOWN: Final = _Reading(exact=False)


def deviation(
    function: MaskFunction,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    windows: frozenset[int],
    padding: Tensor | None,
    device: torch.device | str,
    use_vmap: bool = False,
) -> str | None:
    """How a mask function differs from paged attention, in a clause; None if it does not.

    ``q_length`` queries from position ``q_offset`` on see ``kv_length`` keys from ``kv_offset`` on. ``windows``: those
    of the model's layers. ``padding [B, kv_length]``: bool, False at positions that are no tokens.
    """
    reading = _read(function)
    if not reading.causal:
        return "its mask is not causal"
    if not reading.windows <= windows or len(reading.windows) > 1:
        sizes = ", ".join(map(str, sorted(reading.windows)))
        return f"its mask has a window of {sizes} beside the causal one, and its layers have others"
    if reading.exact:
        return None
    plain = reading.known[0] if len(reading.known) == 1 else and_masks(*reading.known)
    rows = max(1, _TILE // max(1, batch_size * kv_length))
    for start in range(0, q_length, rows):
        count = min(rows, q_length - start)
        call = {"q_length": count, "q_offset": q_offset + start, "kv_length": kv_length, "kv_offset": kv_offset}
        given, wanted = (
            _grid(f, {**call, "batch_size": batch_size, "attention_mask": padding, "device": device}, use_vmap)
            for f in (function, plain)
        )
        if given is None or wanted is None:
            return "its mask is not plainly causal, and cannot be read before the forward"
        differs = (given != wanted).any(-1)
        if padding is not None:
            first = q_offset + start - kv_offset
            differs &= padding[:, None, first : first + count]
        if bool(differs.any()):
            return "its mask is not causal for these inputs: an overlay changes what tokens see"
    return None


def _grid(function: MaskFunction, call: dict[str, Any], use_vmap: bool) -> Tensor | None:
    """The value of a mask function on a grid, bool ``[B, 1, T, S]``; None if it cannot be had."""
    try:
        return sdpa_mask(mask_function=function, allow_is_causal_skip=False, use_vmap=use_vmap, **call)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None


def _read(function: MaskFunction) -> _Reading:
    if function is causal_mask_function:
        return _Reading((function,), causal=True)
    if getattr(function, "__module__", None) != _MAKERS:
        return _UNKNOWN
    maker = getattr(function, "__qualname__", "").partition(".")[0]
    given = _closure(function)
    if maker == "and_masks":
        reading = _Reading()
        for part in given["mask_functions"]:
            reading = reading.meet(_read(part))
        return reading
    if maker == "or_masks":
        parts = [part for part in given["mask_functions"] if not _never(part)]
        if len(parts) == 1:
            return _read(parts[0])
        first = next((read for read in map(_read, parts) if read.causal), _UNKNOWN)
        return _Reading(first.known, first.causal, first.windows, exact=False)
    if maker == "sliding_window_overlay":
        return _Reading((function,), windows=frozenset({int(given["sliding_window"])}))
    if maker == "chunked_overlay":
        return _Reading((function,), windows=frozenset({int(given["chunk_size"])}))
    if maker == "packed_sequence_mask_function":  # the sequences of a step see themselves only
        return _Reading((function,))
    if maker == "remap_positions_for_packed_sequence":
        inner = _read(given["mask_function"])
        return _Reading((function,), inner.causal, inner.windows, inner.exact)
    return _UNKNOWN


def _never(function: MaskFunction) -> bool:
    """Whether an overlay of blocks has no block: what processors give with text alone."""
    if getattr(function, "__module__", None) != _MAKERS:
        return False
    if not getattr(function, "__qualname__", "").startswith("blockwise_overlay."):
        return False
    return not bool((_closure(function)["block_sequence_ids"] >= 0).any())


def _closure(function: MaskFunction) -> dict[str, Any]:
    """What a nested function sees of the one that made it."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
