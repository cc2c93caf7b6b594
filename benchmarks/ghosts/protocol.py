"""Prompts read exactly, their tokens ranked by a retention method head by head, and what follows run over a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from benchmarks.codecs.protocol import Passage, Prompted
from benchmarks.codecs.protocol import prompt as read_exactly
from benchmarks.ghosts.plans import Coded, Plan
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvfold.clause import Clause
from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.formats import sealed_until, sink_blocks
from kvfold.recipe import Recipe
from kvfold.retention.build import build_method
from kvfold.retention.method import Composed, Notes
from kvfold.retention.view import LayerView

__all__ = ["Costs", "Ranked", "cost", "rank", "shuffled"]

_RECIPE = Recipe()  # sinks, recent tokens and blocks as the runtime has them


@dataclass(frozen=True, slots=True)
class Ranked:
    """A passage, and for each method and layer the order ``[H, n]`` of its candidates ``[first, end)``, best first."""

    prompted: Prompted
    first: int
    end: int
    orders: Mapping[str, Sequence[Tensor]]

    def best(self, method: str, layer: int, ranks: slice) -> tuple[Tensor, Tensor]:
        """Exact keys and values ``[H, m, D]`` of the candidates of these ranks."""
        place = self.orders[method][layer][:, ranks, None]
        k, v = (x[:, self.first : self.end].gather(1, place.expand(-1, -1, x.shape[-1]))
                for x in self.prompted.cache[layer])  # fmt: skip
        return k, v

    def around(self, layer: int, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A layer's cache with ``parts`` in the place of the candidates."""
        k, v = (
            torch.cat((x[:, : self.first], *(part[side] for part in parts), x[:, self.end :]), dim=1)
            for side, x in enumerate(self.prompted.cache[layer])
        )
        return k, v


@dataclass(frozen=True, slots=True)
class Costs:
    """Mean KL divergence from the whole exact cache in nats, on text and on answers; the answers' mean negative
    log-likelihood, and the share of answers of which every token is the most likely one.
    """

    text_kl: float
    recall_kl: float
    answer_nll: float
    answers_right: float


@dataclass(frozen=True)
class _Noting(Composed):
    """What ``inner`` does, its scores noted layer by layer."""

    scores: dict[int, Tensor] = field(default_factory=dict)

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        self.scores[view.layer] = self.inner.score(view, notes)
        return self.scores[view.layer]


@torch.inference_mode()
def rank(model: PreTrainedModel, passage: Passage, methods: Sequence[str]) -> Ranked:
    """Reads a passage's prompt, and lets each method score it in the runtime."""
    size = _RECIPE.block_size
    first = sink_blocks(_RECIPE.sinks, size) * size
    end = sealed_until(passage.cut, size, _RECIPE.sinks, _RECIPE.recent) * size
    orders = {method: _order(model, passage, method) for method in methods}
    return Ranked(read_exactly(model, passage), first, end, orders)


def _order(model: PreTrainedModel, passage: Passage, method: str) -> list[Tensor]:
    recipe = Recipe.parse(f"raw+{method}(keep=0.1)")
    runner = ModelRunner(model, recipe=recipe, kv_memory=64 << 20, prefix_caching=False, check=False)
    try:
        retainer = runner.cache.retainer
        if retainer is None:
            raise RuntimeError("a recipe with retention has a retainer")
        retainer.method = noting = _Noting(build_method(Clause(method)))
        seq = runner.create()
        runner.execute([SeqWork(seq=seq, tokens=passage.tokens[: passage.cut], start=0, salt=b"", sample=True)])
        runner.cache.retain(seq)
        return [scores.argsort(dim=1, descending=True, stable=True) for _, scores in sorted(noting.scores.items())]
    finally:
        runner.release()


@torch.inference_mode()
def cost(
    model: PreTrainedModel, ranked: Sequence[Ranked], method: str, plan: Plan, codes: Mapping[str, Coded]
) -> Costs:
    """What is lost when only the plan's tokens are there of the candidates, in its formats."""
    kl: dict[str, list[Tensor]] = {"text": [], "recall": []}
    surprise, right = [], []
    for each in ranked:
        passage, exact = each.prompted.passage, each.prompted.exact
        layers = range(len(each.prompted.cache))
        found = _continue(model, each, [_kept(each, method, layer, plan, codes) for layer in layers])
        kl[passage.kind].append((exact.exp() * (exact - found)).sum(-1))
        if passage.kind == "recall":
            answer = torch.tensor(passage.tokens[passage.cut + 1 :])
            surprise.append(-found[:-1].gather(1, answer[:, None])[:, 0])
            right.append((found[:-1].argmax(-1) == answer).all().double())
    text, recall = (float(torch.cat(parts).double().mean()) for parts in kl.values())
    return Costs(text, recall, float(torch.cat(surprise).double().mean()), float(torch.stack(right).mean()))


def _kept(ranked: Ranked, method: str, layer: int, plan: Plan, codes: Mapping[str, Coded]) -> tuple[Tensor, Tensor]:
    """A layer's cache ``[H, m, D]``: what is never dropped as it is, and the plan's tokens as they are read back."""
    parts, begin = [], 0
    for word, pages in plan.parts:
        tokens = pages * codes[word].size
        parts.append(codes[word].read_back(layer, *ranked.best(method, layer, slice(begin, begin + tokens))))
        begin += tokens
    return ranked.around(layer, parts)


@torch.inference_mode()
def shuffled(model: PreTrainedModel, ranked: Ranked, method: str) -> float:
    """What all tokens, exact but in the method's order, cost in nats: nothing, or the protocol is wrong."""
    layers = range(len(ranked.prompted.cache))
    found = _continue(model, ranked, [ranked.around(i, [ranked.best(method, i, slice(None))]) for i in layers])
    exact = ranked.prompted.exact
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def _continue(model: PreTrainedModel, ranked: Ranked, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Log-probabilities ``[n, V]`` after the tokens from the cut on, at the positions they have had."""
    passage, cache = ranked.prompted.passage, DynamicCache()
    for layer, (k, v) in enumerate(kv):
        cache.update(k[None], v[None], layer)
    rest = torch.tensor([passage.tokens[passage.cut :]])
    positions = torch.arange(passage.cut, len(passage.tokens))[None]
    logits: Tensor = model(rest, position_ids=positions, past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1)
