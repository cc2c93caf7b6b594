"""What can be measured: anything that keeps a cache for a model, be it a recipe of ours or a rival's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

__all__ = ["PREFILL_TOKENS", "SCORED_TOKENS", "Contestant", "Forced"]

PREFILL_TOKENS: Final = 8192
"""Tokens of one forward while a prompt goes in: nearly every prompt in one, as ``generate()`` does it."""

SCORED_TOKENS: Final = 32
"""Tokens of one forward behind the prompt. A chunk attends to its past as it is stored, so small chunks see nearly what
decoding sees.
"""


@dataclass(frozen=True, slots=True)
class Forced:
    """What came of tokens that were given, not generated.

    ``logits [N, V]``, float32: row ``i`` is the distribution after ``tokens[score_from + i]``. ``kv_bytes``: what the
    cache held allocated at the end of the tokens. ``decode_tok_s``: from the median of the timed greedy steps behind
    them; 0 if there were none. ``idle``: methods of the recipe that never acted on these tokens, for which the logits
    therefore say nothing (see `kvfold.quality.forwards`).
    """

    logits: Tensor
    kv_bytes: int
    decode_tok_s: float
    idle: tuple[str, ...] = ()


class Contestant(Protocol):
    """Something that keeps a cache for a model."""

    @property
    def name(self) -> str:
        """Unique in a run: ``int4``, ``transformers-hqq-4bit``, ``kvpress-snapkv-0.75``, ``truncation-0.75``."""

    @property
    def family(self) -> str:
        """Who made it: ``kvfold``, ``transformers``, ``kvpress``, ``truncation``."""

    @property
    def bits_per_value(self) -> float | None:
        """Bits that a number of a packed token takes in the long run, scales counted, raw windows not; None if it drops
        tokens.
        """

    def force(self, tokens: Sequence[int], *, score_from: int, decode_steps: int = 0) -> Forced:
        """``tokens[:score_from]`` is the prompt, goes in as one prefill (kvfold: in chunks of `PREFILL_TOKENS`), and is
        compressed at its end; the rest goes in in chunks of `SCORED_TOKENS` (kvfold: see `kvfold.quality.forwards`),
        attending to the cache as it is stored.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop: frozenset[int],
        contexts: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Greedy continuations of at most ``max_tokens`` tokens: the new ones, without the stop token. With an empty
        ``stop`` each has exactly ``max_tokens``.

        ``contexts``: so many tokens at the beginning of each prompt are its context, which is compressed by itself,
        before what follows is read; None: all of each prompt is.
        """

    def close(self) -> None:
        """Gives back what it holds."""
