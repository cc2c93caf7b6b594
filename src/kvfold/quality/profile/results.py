"""What a profile found, as data: ``kvfold profile`` writes it, the page and the terminal show it. No torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from kvfold.gates import Gates
from kvfold.layers import LayerKind
from kvfold.quality.results import ErrorMap

__all__ = [
    "LEVELS",
    "SHARES",
    "Check",
    "LayerProfile",
    "LookupKind",
    "Profile",
    "Retrieval",
    "Suggestion",
    "distance_edges",
]

_FORMAT: Final = 1

SHARES: Final = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
"""Shares of the past at which it is measured how much of the mass the top tokens hold."""

LEVELS: Final = (0.95, 0.99)
"""Parts of a head's mass for which it is said how many tokens hold them."""


LookupKind = Literal["question", "repeat"]
"""A question about a document, or random tokens a second time."""


def distance_edges(tokens: int) -> tuple[int, ...]:
    """Where bins of distances begin: 0 (a token itself), then the powers of two below ``tokens``."""
    return (0, *(2**power for power in range(max(1, (tokens - 1).bit_length()))))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """One layer that attends. ``source``: the layer whose keys and values it reads, its own unless it shares.

    Means over the observed queries, for each query head ``[Hq]``: ``sinks`` the mass on the first tokens, ``nowhere``
    what a learned sink logit takes, ``local`` the mass on the recent window (first tokens aside), ``entropy`` of the
    weights in nats. ``distance``: for each bin of `distance_edges` the mass on tokens so far back, first tokens aside,
    mean over heads.

    Of the past (the first half of the text; what is newer is always kept): ``newer``, the mean mass on what is newer;
    ``held_once``, the part of the mass held if one set of the top tokens is kept for all queries, at each of `SHARES`;
    ``held_anew``: if each query may choose its own. ``budgets``: for each of `LEVELS` the share of the past that holds
    so much, for each KV head.
    """

    layer: int
    source: int
    kind: LayerKind
    window: int | None
    q_heads: int
    kv_heads: int
    sinks: list[float]
    nowhere: list[float]
    local: list[float]
    entropy: list[float]
    distance: list[float]
    newer: float
    held_once: list[float]
    held_anew: list[float]
    budgets: dict[str, list[float]]

    @property
    def effective(self) -> list[float]:
        """For each query head, the tokens it looks at as if evenly: e to the power of its entropy."""
        return [math.exp(value) for value in self.entropy]


@dataclass(frozen=True, slots=True)
class Check:
    """What is left with ``full`` KV heads (those of the highest gates) on all tokens, the others on sinks and recent
    window. ``share``: of all gated heads. ``answers``: share of the answers' tokens that are still the likeliest;
    ``loss``: their mean negative log-probability; ``kl``: divergence on the text from the model as it is. Nats.
    """

    full: int
    share: float
    answers: float
    loss: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """How heads were found that find things far back. ``kind``: of the ``texts`` they were asked in, with ``asked``
    answer tokens in all. ``recall``, ``change``: the two halves of a gate, by layer and KV head. ``checks``: from no
    head to all.
    """

    kind: LookupKind
    texts: int
    asked: int
    gates: Gates
    recall: dict[int, list[float]]
    change: dict[int, list[float]]
    checks: list[Check]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A recipe to try, and why."""

    recipe: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """All of it. ``queries``: observed queries of a passage. ``sinks``, ``recent``: the recipe's, in tokens.

    ``errors``: relative rms error of the recipe's packed keys and values, None if it packs nothing. ``retrieval`` is
    None where no layer has tokens to give up.
    """

    model: str
    model_type: str
    command: str
    seed: int
    text: str
    passages: int
    tokens: int
    queries: int
    recipe: str
    sinks: int
    recent: int
    layers: list[LayerProfile]
    stored: list[int]
    errors: ErrorMap | None
    retrieval: Retrieval | None
    suggestion: Suggestion
    versions: dict[str, str]
    hardware: dict[str, object]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self)
        if self.retrieval is not None:
            plain["retrieval"]["gates"] = self.retrieval.gates.as_json()
        edges = list(distance_edges(self.tokens))
        return {"kvfold_profile": _FORMAT, **plain, "distance_edges": edges, "shares": list(SHARES)}
