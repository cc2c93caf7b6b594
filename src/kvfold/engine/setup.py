"""What an engine needs to start: how long a sequence may be, how much memory the cache gets, and its scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.available import available_memory, check_available
from kvfold.engine.intake import Intake, Room
from kvfold.engine.loading import end_tokens
from kvfold.engine.runner import ModelRunner
from kvfold.engine.scheduler import Scheduler
from kvfold.errors import RequestError
from kvfold.formats import parse_bytes
from kvfold.geometry import Geometry
from kvfold.memory.capacity import budget_for
from kvfold.recipe import Recipe
from kvfold.spec import group_spec

__all__ = ["asked_budget", "context_length", "default_budget", "make_intake", "make_scheduler"]

_SHARE: Final = 4
"""By default the cache takes at most one part in so many of the memory that is available."""


def asked_budget(kv_memory: str | int | None, model: PreTrainedModel | str | Path) -> int | None:
    """Bytes that are asked for; None if none are. BudgetError for what is no size, and for more than there is where the
    model is, or where it would be loaded.
    """
    if kv_memory is None:
        return None
    asked = parse_bytes(kv_memory)
    loaded = None if isinstance(model, (str, Path)) else model.device
    check_available(asked, loaded or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return asked


def context_length(geometry: Geometry, max_length: int | None) -> int:
    """The most tokens of a sequence: the model's context, or ``max_length``, which must not be longer."""
    if max_length is None:
        return geometry.max_positions
    if not 1 < max_length <= geometry.max_positions:
        raise RequestError(
            f"bad max_length={max_length!r}",
            why=f"a whole number from 2 to the model's context of {geometry.max_positions} is needed",
        )
    return max_length


def make_scheduler(runner: ModelRunner, *, repeatable: bool | None, **options: Any) -> Scheduler:
    """The scheduler of a runner's cache; ``options``: the others of `Scheduler`."""
    books, retainer = runner.manager, runner.cache.retainer
    if repeatable is None:
        repeatable = any(group.seals for group in books.groups)
    watches = 0 if retainer is None else retainer.method.watches
    return Scheduler(books, rule=runner.cache.recipe.rule, watches=watches, repeatable=repeatable, **options)


def make_intake(
    runner: ModelRunner,
    tokenizer: PreTrainedTokenizerBase | None,
    context: int,
    *,
    seed: int,
    max_batched_tokens: int,
    max_sequences: int,
) -> Intake:
    """What makes requests for a runner's model, with sequences of at most ``context`` tokens."""
    return Intake(
        tokenizer,
        runner.geometry.vocab,
        context,
        Room(runner.manager, context, max_batched_tokens),
        max_sequences,
        end_ids=end_tokens(runner.model, tokenizer),
        seed=seed,
        rotary=runner.rotary,
    )


def default_budget(
    model: PreTrainedModel, geometry: Geometry, recipe: Recipe, context: int, chunk: int, max_sequences: int
) -> int:
    """Bytes for ``max_sequences`` full contexts, read in steps of ``chunk``, or what may be taken of the memory there
    is.
    """
    chunk = min(chunk, context)
    share = available_memory(model.device) // _SHARE
    specs = [group_spec(group, recipe=recipe) for group in geometry.groups(recipe, model.dtype.itemsize)]
    return min(share, budget_for(specs, recipe.block_size, length=context, chunk=chunk, sequences=max_sequences))
