"""A whole profile: refuses what cannot work before anything is measured, observes, finds gates, and suggests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.engine.loading import check_recipe, load
from kvfold.errors import RequestError
from kvfold.geometry import Geometry
from kvfold.packed import check_model
from kvfold.quality.environment import hardware, versions
from kvfold.quality.error_map import error_map, keys_and_values
from kvfold.quality.profile.heads import LayerTally, observed_positions
from kvfold.quality.profile.lookups import Lookup, lookup_texts
from kvfold.quality.profile.results import LayerProfile, Profile
from kvfold.quality.profile.retrieval import check_counts, find_retrieval, gated_layers
from kvfold.quality.profile.suggest import suggest
from kvfold.quality.settings import check_profile_context
from kvfold.quality.tasks import read_text
from kvfold.quality.watch import Attended, watched_forward
from kvfold.quality.workload import cut_passages

__all__ = ["Plan", "observe", "profile_model", "run_profile"]

_CONTEXT: Final = 2048
Progress = Callable[[str, float], None]
"""Told what is done next, and which share of everything is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for. ``context``: tokens of a passage of the text and of a lookup (None: 2048, or what the model
    takes); ``tokens``: of text in all. ``text``: a UTF-8 file, None for the held-out text. ``command``: for the record.
    ``gates``: they are wanted, so that a model without heads to give them to is refused.
    """

    model: str
    command: str
    text: Path | None = None
    context: int | None = None
    tokens: int = 2 * _CONTEXT
    recipe: str = "int4"
    seed: int = 0
    gates: bool = False


def run_profile(plan: Plan, progress: Progress = lambda what, share: None) -> Profile:
    """The profile of the model that the plan names. Every refusal comes before the first forward."""
    text = read_text(plan.text)
    model, tokenizer = load(plan.model)
    return profile_model(model, tokenizer, plan, text, progress)


def profile_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    text: str,
    progress: Progress = lambda what, share: None,
) -> Profile:
    """The same of a model that is already there. RequestError, RecipeError or UnsupportedError for what cannot be."""
    geometry = Geometry.from_config(model.config)
    recipe = check_recipe(plan.recipe, model)
    sinks, recent = recipe.sinks, recipe.recent
    context = _context(plan.context, geometry, sinks + recent)
    count = max(1, plan.tokens // context)
    passages = cut_passages(tokenizer, text, context, count, f"profile/{plan.seed}")
    gated = gated_layers(geometry, sinks + recent)
    if plan.gates and not gated:
        why = f"no layer of {plan.model} sees more than the first {sinks} and the latest {recent} tokens"
        raise RequestError("there would be no gates to write", why=why, hint="leave --gates out")
    vocab = min(geometry.vocab, len(tokenizer))
    asks = lookup_texts(tokenizer, tokens=context, near=sinks + recent, seed=plan.seed, vocab=vocab) if gated else []
    check_model(model, geometry)
    say = _Steps(progress, count + 1, asks, sum(layer.kv_heads for layer in gated))
    layers = observe(model, passages, sinks, recent, say)
    say("quantization error")
    errors = error_map(geometry, recipe, keys_and_values(model, passages[0]))
    retrieval = find_retrieval(model, asks, passages, sinks, recent, say) if asks else None
    return Profile(
        model=Path(plan.model).resolve().name if Path(plan.model).is_dir() else plan.model,
        model_type=geometry.model_type,
        command=plan.command,
        seed=plan.seed,
        text="held-out sources of Python's standard library" if plan.text is None else plan.text.name,
        passages=count,
        tokens=context,
        queries=observed_positions(context).numel(),
        recipe=plan.recipe,
        sinks=sinks,
        recent=recent,
        layers=layers,
        stored=[layer.index for layer in geometry.layers if layer.stores],
        errors=errors,
        retrieval=retrieval,
        suggestion=suggest(plan.recipe, layers, retrieval, context),
        versions=versions(),
        hardware=hardware(model.device),
    )


def observe(
    model: PreTrainedModel,
    passages: Sequence[Sequence[int]],
    sinks: int,
    recent: int,
    progress: Callable[[str], None] = lambda what: None,
) -> list[LayerProfile]:
    """What the heads of each layer look at in ``passages``, which are of equal length."""
    tallies = {
        layer.index: LayerTally(layer, tokens=len(passages[0]), sinks=sinks, recent=recent)
        for layer in Geometry.from_config(model.config).layers
        if layer.kind not in ("none", "recurrent")
    }

    def attended(seen: Attended) -> None:
        tallies[seen.layer].add(seen)

    for number, passage in enumerate(passages, start=1):
        progress(f"passage {number} of {len(passages)}")
        watched_forward(model, passage, attended=attended)
    return [tally.result() for tally in tallies.values()]


class _Steps:
    """Counts forwards: for each text to look things up in one for the gates and one a check, which takes one more."""

    def __init__(self, progress: Progress, forwards: int, asks: Sequence[Lookup], heads: int) -> None:
        self._progress = progress
        self._total = forwards + len(asks) + (len(check_counts(heads)) * (len(asks) + 1) if asks else 0)
        self._done = 0

    def __call__(self, what: str) -> None:
        self._progress(what, self._done / self._total)
        self._done += 1


def _context(wanted: int | None, geometry: Geometry, near: int) -> int:
    limit = geometry.max_positions
    context = min(_CONTEXT, limit) if wanted is None else wanted
    if context > limit:
        why = f"the model takes {limit} positions"
        raise RequestError(f"a context of {context} tokens", why=why, hint="give a shorter --context")
    check_profile_context(context, near)
    return context
