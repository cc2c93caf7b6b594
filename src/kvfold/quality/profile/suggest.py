"""A recipe to try, from what was measured; the rule stands in docs/profile.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from kvfold.formats import sealed_until, sink_blocks
from kvfold.quality.profile.results import LEVELS, LayerProfile, Retrieval, Suggestion
from kvfold.recipe import Recipe

__all__ = ["ANSWERED", "suggest"]

ANSWERED: Final = 0.5
"""Share of answer tokens that a model must get right for its gates to mean anything."""

_ANSWERS_LOST: Final = 0.02
_KL: Final = 0.03
"""What restricted heads may cost: of the answer tokens, and nats of divergence on the text."""

_MOST: Final = 0.75
"""A larger share of heads or tokens is not worth a retention method."""

_STEP: Final = 0.05


def suggest(recipe: str, layers: Sequence[LayerProfile], retrieval: Retrieval | None, tokens: int) -> Suggestion:
    """``recipe`` with the retention that what was measured speaks for, of contexts of ``tokens`` tokens; alone if none
    does.
    """
    if retrieval is not None and (found := _heads(recipe, retrieval, tokens)) is not None:
        return found
    level = f"{LEVELS[0]:g}"
    budgets = [budget for layer in layers if layer.window is None for budget in layer.budgets[level]]
    if budgets and (keep := _rounded(sum(budgets) / len(budgets))) <= _MOST:
        why = f"heads hold {LEVELS[0]:.0%} of their mass with {keep:.0%} of the past on average, some with far less"
        return Suggestion(f"{recipe}+adakv(snapkv,keep={keep:g})", why)
    return Suggestion(recipe, "attention is spread over so many tokens that dropping some would cost quality")


def _heads(recipe: str, retrieval: Retrieval, tokens: int) -> Suggestion | None:
    """Streaming heads, if the model keeps its answers and its text with few enough full ones."""
    whole = retrieval.checks[-1]
    if whole.answers < ANSWERED:
        return None
    enough = whole
    for check in reversed(retrieval.checks):
        if check.answers < whole.answers - _ANSWERS_LOST or check.kl > _KL:
            break
        enough = check
    keep = _rounded(_tokens_kept(recipe, enough.share, tokens))
    if keep > _MOST:
        return None
    why = (
        f"{enough.full} of {whole.full} KV heads suffice to find what is far back: with no others on all tokens, "
        f"{enough.answers:.0%} of the answers' tokens are right ({whole.answers:.0%} with all), and the text's KL is "
        f"{enough.kl:.2g} nats"
    )
    return Suggestion(f"{recipe}+duo(keep={keep:g})", why)


def _tokens_kept(recipe: str, heads: float, tokens: int) -> float:
    """The share of a context's tokens that all heads together keep if this share of heads keeps all: the others still
    have the blocks of the sinks and of the recent tokens.
    """
    parsed = Recipe.parse(recipe)
    size = parsed.block_size
    first, end = sink_blocks(parsed.sinks, size), sealed_until(tokens, size, parsed.sinks, parsed.recent)
    return 1 - (1 - heads) * max(0, end - first) * size / tokens


def _rounded(share: float) -> float:
    """Up to a twentieth, and at least that."""
    return round(max(_STEP, math.ceil(share / _STEP - 1e-9) * _STEP), 2)
