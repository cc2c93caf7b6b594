"""transformers' ``QuantizedCache``: hqq, quanto, and its fp8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, lcm
from typing import Final

from benchmarks.rivals.stock import Reader, Rival
from torch import Tensor
from transformers import Cache, PreTrainedModel, QuantizedCache

from kvfold.errors import RequestError, UnsupportedError
from kvfold.quality.contestant import SCORED_TOKENS

__all__ = ["LAYOUTS", "RESIDUAL", "Fp8Rival", "QuantizedRival", "legal_multiple"]

RESIDUAL: Final = 128
"""Raw tokens at most; stock."""

LAYOUTS: Final[dict[str, dict[str, tuple[int, int]]]] = {
    "hqq": {"strided": (0, 0), "token": (1, 1), "mixed": (0, 1)},
    "quanto": {"token": (0, 0), "channel": (-1, -1), "kivi": (-1, 0)},
}
"""``(axis_key, axis_value)`` by name, the stock one first.

``token``: a group is a part of one token's head. ``channel``: one channel over as many tokens as the group has.
``strided`` (hqq's axis 0): values evenly spread over all heads and tokens, which are of one channel only where heads x
tokens is a multiple of the group. ``mixed`` and ``kivi``: keys that way, values by token.
"""


def legal_multiple(axis: int, bits: int, group: int, heads: int, width: int) -> int:
    """Heads of ``width`` numbers can be quantized if their tokens are a multiple of this: then groups come out even,
    and for hqq's axis 1 the groups that share bytes.
    """
    together, numbers = group, heads * width
    if axis == -1:
        numbers = heads
    elif axis == 1:
        together = group * 8 // bits
    return together // gcd(together, numbers)


class QuantizedRival(Rival):
    """``QuantizedCache`` with groups of integers.

    Some layouts take only lengths that are a multiple of some tokens. The rest of a longer prompt then goes in by
    itself, into the raw residual, and chunks end where the residual is full, so that it is always a legal length that
    is quantized.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, backend: str, *, bits: int, layout: str, group: int = 64
    ) -> None:
        scale_bits = 8 * model.dtype.itemsize
        super().__init__(model, name, "transformers", bits + 2 * scale_bits / group)
        self.backend = backend
        self.bits = bits
        self.group = group
        self.axes = LAYOUTS[backend][layout]
        config = model.config.get_text_config(decoder=True)
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.multiple = lcm(*(legal_multiple(axis, bits, group, heads, width) for axis in self.axes))
        if RESIDUAL % self.multiple:
            raise UnsupportedError(
                f"{name} on this model",
                why=f"it quantizes {RESIDUAL} tokens at a time and could only do multiples of {self.multiple}",
                hint="take another layout or group",
            )
        self.new_cache()

    def new_cache(self) -> Cache:
        """An empty cache. UnsupportedError for a model with layers that transformers cannot quantize."""
        key, value = self.axes
        try:
            return QuantizedCache(
                self.backend,
                self.model.config,
                nbits=self.bits,
                axis_key=key,
                axis_value=value,
                q_group_size=self.group,
                residual_length=RESIDUAL,
            )
        except ValueError as error:
            raise UnsupportedError(f"{self.name} on this model", why=str(error)) from error

    def begin(self, prompt: Sequence[int], context: int | None = None) -> tuple[Reader, Tensor]:
        """The prompt (or its context) in one forward, or as much of it as can be quantized, and then the rest."""
        first = len(prompt[:context])
        legal = first - first % self.multiple
        if not legal:
            raise RequestError(f"a prompt of {first} tokens", why=f"{self.name} quantizes multiples of {self.multiple}")
        reader = Reader(self.model, self.new_cache())
        logits = reader.read(prompt[:legal], keep=1)
        if legal < len(prompt):
            for stop in self.cuts(legal, len(prompt)) if context else [len(prompt)]:
                logits = reader.read(prompt[reader.position : stop], keep=1)
        return reader, logits[-1]

    def cuts(self, start: int, stop: int) -> Iterator[int]:
        """Every `SCORED_TOKENS` behind the part of the prompt that was quantized."""
        first = start - start % self.multiple + SCORED_TOKENS
        while first <= start:
            first += SCORED_TOKENS
        yield from range(first, stop, SCORED_TOKENS)
        yield stop


class Fp8Rival(Rival):
    """``QuantizedCache`` in 8-bit floating point: a scale for each tensor, no residual, never quantized again."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__(model, name, "transformers", 8.0)
        self.new_cache()

    def new_cache(self) -> Cache:
        """An empty cache. UnsupportedError for a model with layers that transformers cannot quantize."""
        try:
            return QuantizedCache("fp8", self.model.config)
        except ValueError as error:
            raise UnsupportedError(f"{self.name} on this model", why=str(error)) from error
