"""Retrieval heads: how much each KV head needs far tokens, and what is left if only some heads keep them.

Where a text asks for something far back, at each asked position ``t`` and for each query head ``g``, with weights
``p [T]`` and output ``o [Dv]``::

    recall(t, g) = sum of p over the right tokens that are far: beyond the sinks and the recent window
    change(t, g) = |o - o'| / max(|o|, m), at most 1    o': from sinks and recent window alone
                                                        m: root mean square of |o| over the layer's query heads
    gate[layer][head] = max over query heads g of the KV head of  (mean_t recall + mean_t change) / 2

So a gate near 1 says that a head finds the right tokens and gives something else without them. A head that looks far
back but at other things stays below one half. DuoAttention (arXiv 2410.10819) trains its gates on such texts; here they
are measured in one forward a text, and then checked: the model is run with all but the best heads restricted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.gates import Gates
from kvfold.geometry import Geometry, LayerGeometry
from kvfold.quality.profile.heads import observed_positions
from kvfold.quality.profile.lookups import Lookup
from kvfold.quality.profile.results import Check, Retrieval
from kvfold.quality.profile.weights import streamed, weigh
from kvfold.quality.watch import Attended, watched_forward

__all__ = ["GateTally", "check_counts", "checked", "find_gates", "find_retrieval", "gated_layers"]

_SCORED: Final = 128
"""Positions of the text at which the divergence is taken, at most: bounds the logits that are kept."""

_CHECKS: Final = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Shares of heads that are tried."""

_Restrict = Callable[[Attended], Tensor | None]


def gated_layers(geometry: Geometry, near: int) -> tuple[LayerGeometry, ...]:
    """The layers whose heads could give tokens up: with pages of their own, and no window as narrow as ``near``."""
    return tuple(layer for layer in geometry.layers if layer.stores and (layer.window is None or layer.window > near))


class GateTally:
    """Gathers recall and change of one layer's query heads over asked positions."""

    def __init__(self, q_heads: int) -> None:
        self.recall = torch.zeros(q_heads, dtype=torch.float64)
        self.change = torch.zeros(q_heads, dtype=torch.float64)
        self.asked = 0

    def add(self, seen: Attended, text: Lookup, sinks: int, recent: int) -> None:
        """The attention of one text."""
        device = seen.q.device
        asked = torch.tensor(text.asked, device=device)
        right = torch.zeros((len(text.asked), seen.k.shape[0]), dtype=torch.bool, device=device)
        for row, places in enumerate(text.right):
            right[row, list(places)] = True
        for block in weigh(seen, asked):
            keys = torch.arange(block.p.shape[-1], device=device)
            far = (keys >= sinks) & (keys <= block.positions[:, None] - recent)
            found = block.p * (far & right[block.rows, : keys.numel()])
            self.recall[block.heads] += found.sum((1, 2)).double().cpu()
        full = seen.output[asked].float()
        size = full.norm(dim=-1)
        least = size.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        change = (full - streamed(seen, sinks, recent)[asked]).norm(dim=-1) / torch.maximum(size, least)
        self.change += change.clamp_max(1).sum(0).double().cpu()
        self.asked += len(text.asked)

    def halves(self, kv_heads: int) -> tuple[list[float], list[float]]:
        """Recall and change of each KV head: those of its query head with the greatest sum."""
        recall, change = ((x / self.asked).view(kv_heads, -1) for x in (self.recall, self.change))
        best = (recall + change).argmax(1, keepdim=True)
        first, second = (x.gather(1, best).squeeze(1).clamp(0, 1).tolist() for x in (recall, change))
        return first, second


def find_gates(
    model: PreTrainedModel,
    texts: Sequence[Lookup],
    sinks: int,
    recent: int,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[Gates, dict[int, list[float]], dict[int, list[float]]]:
    """The gates of a model, and their halves, recall and change, by layer and KV head.

    A layer whose pages others read has for each KV head the halves of the layer that needs it most.
    """
    geometry = Geometry.from_config(model.config)
    gated = {layer.index: layer for layer in gated_layers(geometry, sinks + recent)}
    tallies = {layer.index: GateTally(layer.q_heads) for layer in geometry.layers if layer.source in gated}
    for number, text in enumerate(texts, start=1):
        progress(f"retrieval heads, text {number} of {len(texts)}")

        def attended(seen: Attended, text: Lookup = text) -> None:
            if seen.layer in tallies:
                tallies[seen.layer].add(seen, text, sinks, recent)

        watched_forward(model, text.tokens, attended=attended)
    recall, change = {}, {}
    for index, layer in gated.items():
        readers = [tallies[reader.index] for reader in geometry.layers if reader.source == index]
        pairs = [list(zip(*tally.halves(layer.kv_heads), strict=True)) for tally in readers]
        best = [max(halves, key=sum) for halves in zip(*pairs, strict=True)]
        recall[index], change[index] = [pair[0] for pair in best], [pair[1] for pair in best]
    heads = {
        index: tuple(round((r + c) / 2, 4) for r, c in zip(recall[index], change[index], strict=True))
        for index in gated
    }
    gates = Gates(model_type=geometry.model_type, sinks=sinks, recent=recent, heads=heads)
    return gates, recall, change


def check_counts(heads: int) -> list[int]:
    """How many heads stay full in the checks, rising; the last check is with all of them."""
    return list(dict.fromkeys(math.ceil(share * heads) for share in _CHECKS))


def checked(
    model: PreTrainedModel,
    texts: Sequence[Lookup],
    passages: Sequence[Sequence[int]],
    gates: Gates,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Check]:
    """What the model still does with only some heads full, by `check_counts`: answers of ``texts``, and divergence from
    itself on the first of ``passages``. Restricted heads are so at every position, the prompt's included.
    """
    heads = sum(map(len, gates.heads.values()))
    positions = observed_positions(len(passages[0]))
    scored = positions[:: -(-positions.numel() // _SCORED)].tolist()

    def spoken(restrict: _Restrict | None, what: str) -> Tensor:
        progress(what)
        return watched_forward(model, passages[0], attended=restrict, keep=scored).float().log_softmax(-1)

    reference = spoken(None, "the text with all heads")
    checks = []
    for full in check_counts(heads):
        what = f"{full} of {heads} heads on all tokens"
        restrict = None if full == heads else _restriction(model, gates, full)
        right, loss = _answers(model, texts, restrict, partial(progress, what))
        divergence = 0.0
        if restrict is not None:
            divergence = float((reference.exp() * (reference - spoken(restrict, what))).sum(-1).mean())
        checks.append(Check(full, full / heads, right, loss, max(divergence, 0.0)))
    return checks


def _answers(
    model: PreTrainedModel, texts: Iterable[Lookup], restrict: _Restrict | None, say: Callable[[], None]
) -> tuple[float, float]:
    """Share of all asked tokens that are the likeliest, and their mean negative log-probability."""
    right, losses = [], []
    for text in texts:
        say()
        scores = watched_forward(model, text.tokens, attended=restrict, keep=text.asked).float().log_softmax(-1)
        wanted = torch.tensor([text.tokens[at + 1] for at in text.asked], device=scores.device)
        right.append((scores.argmax(-1) == wanted).float().cpu())
        losses.append(-scores.gather(-1, wanted[:, None]).squeeze(-1).cpu())
    return float(torch.cat(right).mean()), float(torch.cat(losses).mean())


def _restriction(model: PreTrainedModel, gates: Gates, full: int) -> _Restrict:
    """Replaces the output of heads that are not among the ``full`` best."""
    chosen = gates.full(full)
    source = {layer.index: layer.source for layer in Geometry.from_config(model.config).layers}

    def attended(seen: Attended) -> Tensor | None:
        mine = chosen.get(source[seen.layer])
        if mine is None or all(mine):
            return None
        keeps = torch.tensor(mine, device=seen.q.device).repeat_interleave(seen.q.shape[1] // len(mine))
        return torch.where(keeps[:, None], seen.output.float(), streamed(seen, gates.sinks, gates.recent))

    return attended


def find_retrieval(
    model: PreTrainedModel,
    texts: Sequence[Lookup],
    passages: Sequence[Sequence[int]],
    sinks: int,
    recent: int,
    progress: Callable[[str], None] = lambda what: None,
) -> Retrieval:
    """The gates of a model and what they are worth. ``progress`` is told of every forward."""
    gates, recall, change = find_gates(model, texts, sinks, recent, progress)
    return Retrieval(
        kind=texts[0].kind,
        texts=len(texts),
        asked=sum(len(text.asked) for text in texts),
        gates=gates,
        recall=recall,
        change=change,
        checks=checked(model, texts, passages, gates, progress),
    )
