"""A conversation in a drop-in cache is read again when its length asks for other rotary factors (longrope).

transformers' Phi-3 and its kin drop the cache at the switch and go on with one of another kind; other models with
longrope go on with keys of the wrong factors. Here the cache is emptied and stays: the whole input goes in once more,
under the same recipe. That is done where ``generate()`` prepares the inputs of a forward, for there all of them are at
hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvfold.errors import UnsupportedError
from kvfold.rotary import Lengths, RotaryLengths

__all__ = ["ReadAgain", "StoredFactors"]


class StoredFactors:
    """Which rotary factors the keys of a drop-in cache are stored under. ``length``: that of the latest forward, from
    which they follow.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.rotary = RotaryLengths.of(model)
        self.length = 0

    @property
    def lengths(self) -> Lengths:
        """What the factors follow from."""
        return Lengths.whole(self.length)

    def differ(self, coming: int) -> bool:
        """Whether a forward that gets to ``coming`` positions has other factors."""
        return self._key(self.length) != self._key(coming)

    def open(self, positions: object, held: int, new: int) -> None:
        """Notes a forward of ``new`` positions, with position ids ``positions`` if given, behind ``held`` ones in the
        cache.

        Raises UnsupportedError if those are stored under other factors than the forward has.
        """
        if not self.rotary:
            return
        coming = _length(positions, held + new)
        if held and self.differ(coming):
            raise UnsupportedError(
                f"a forward of {new} tokens that gets to position {coming}",
                why=f"the model's rotary factors change at {self.rotary.limits}, "
                f"and the {held} positions in the cache have those of another length",
                hint="call cache.reset() and pass all tokens again, as generate() does by itself",
            )
        self.length = coming

    def _key(self, length: int) -> bytes:
        return self.rotary.key(Lengths(0, length))


class ReadAgain:
    """Stands for the ``prepare_inputs_for_generation`` of a model, with the same signature. Inputs for a forward that
    has other rotary factors than the keys in its cache become those of the whole conversation; the cache is emptied.

    It lies in the model's own attributes, and belongs to the copy when the model is copied.
    """

    def __init__(self, prepare: Callable[..., dict[str, Any]]) -> None:
        functools.update_wrapper(self, prepare)
        self._prepare = prepare

    @classmethod
    def put_on(cls, model: PreTrainedModel) -> None:
        """Puts it on a model whose factors change at a limit; does nothing to others."""
        target: Any = model
        prepare = getattr(target, "prepare_inputs_for_generation", None)
        if prepare is not None and RotaryLengths.of(model).limits and not isinstance(prepare, cls):
            target.prepare_inputs_for_generation = cls(prepare)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inputs of the next forward."""
        inputs = self._prepare(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        factors = getattr(cache, "factors", None)
        if not isinstance(cache, Cache) or not isinstance(factors, StoredFactors):
            return inputs
        held = cache.get_seq_length()
        kept = inputs.get("past_key_values") is cache  # Phi-3 and its kin leave it out where they think of the switch
        if kept and not (held and factors.differ(_length(inputs.get("position_ids"), held + _columns(inputs)))):
            return inputs
        if kept:
            kwargs |= {"past_key_values": None, "next_sequence_length": None}
            inputs = self._prepare(*args, **kwargs)
        _check_whole(inputs)
        cache.reset()
        return inputs | {"past_key_values": cache}


def _columns(inputs: Mapping[str, Any]) -> int:
    """Positions that go in, padding included."""
    given = next(x for x in map(inputs.get, ("input_ids", "inputs_embeds")) if isinstance(x, Tensor))
    return int(given.shape[1])


def _length(positions: object, columns: int) -> int:
    """The length that a model reads from its position ids; without them it counts ``columns``."""
    return int(positions.max()) + 1 if isinstance(positions, Tensor) and positions.numel() else columns


def _check_whole(inputs: Mapping[str, Any]) -> None:
    columns, mask = _columns(inputs), inputs.get("attention_mask")
    length = max(
        _length(inputs.get("position_ids"), columns),
        mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0,
    )
    if length > columns:
        raise UnsupportedError(
            f"reading {length} positions again under other rotary factors",
            why=f"generate() has the token ids of {columns} of them only",
            hint="give it the ids of the whole conversation, without inputs_embeds and prefill_chunk_size",
        )
