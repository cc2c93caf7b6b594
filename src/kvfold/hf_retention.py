"""Retention of a drop-in cache where its method has the model repeat what it has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor
from transformers import PreTrainedModel

from kvfold.cache import PagedCache
from kvfold.errors import UnsupportedError
from kvfold.packed import PackedModel
from kvfold.replay import replay
from kvfold.rotary import Lengths

__all__ = ["refuse_repetition", "repeat"]

_REPEATED_TOKENS: Final = 512
"""Tokens of the context that are repeated at a time."""


def refuse_repetition(pages: PagedCache, inputs: Tensor, others: Sequence[str]) -> None:
    """UnsupportedError if the method of retention has tokens repeated, and a forward is given more than token ids:
    ``inputs [B, T, E]``, or tensors ``others`` beside them.
    """
    retainer = pages.retainer
    if retainer is None or not retainer.method.replays or (inputs.dim() == 2 and not others):
        return
    given = ", ".join(others) or "embeddings"
    why = f"its method has the tokens repeated, and the model is given {given}"
    hint = "give it input_ids alone, or use a method that does not repeat them"
    raise UnsupportedError(f"retention under {pages.recipe}", why=why, hint=hint)


def repeat(model: PreTrainedModel, pages: PagedCache, seq: int, tokens: Sequence[int], lengths: Lengths) -> None:
    """Has the model repeat the tokens of a sequence before retention drops some of them, under the rotary factors that
    follow from ``lengths``.
    """
    retainer = pages.retainer
    if retainer is None or not retainer.would_drop(seq):
        return
    packed = PackedModel(model)
    try:  # in small parts: a cache that grows would grow for each
        first = retainer.done_until(seq)
        replay(packed, pages, seq, tokens, first=first, chunk=_REPEATED_TOKENS, lengths=lengths)
    finally:
        packed.release()
