"""Recipes as contestants: everything they do goes through the paged runtime that serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from transformers import PreTrainedModel

from kvfold.engine import Engine, SamplingParams
from kvfold.engine.loading import parse_recipes
from kvfold.engine.runner import ModelRunner
from kvfold.geometry import Geometry
from kvfold.memory.capacity import budget_for
from kvfold.packed import check_model
from kvfold.quality.contestant import PREFILL_TOKENS, Forced
from kvfold.quality.forced import teacher_force
from kvfold.recipe import Recipe
from kvfold.spec import group_spec

__all__ = ["RecipeContestant", "bits_per_value", "recipe_contestants"]

_LEAST_CHUNK: Final = 512  # many short prompts go in together


class RecipeContestant:
    """A recipe on a model. Each call has a cache of its own, just large enough; between calls nothing is held."""

    family = "kvfold"

    def __init__(self, model: PreTrainedModel, name: str, recipe: Recipe) -> None:
        self.name = name
        self.model = model
        self.recipe = recipe
        self._geometry = Geometry.from_config(model.config)

    @property
    def bits_per_value(self) -> float | None:
        """Bits that a number of a packed token takes, with its share of scales and padding; None if tokens are
        dropped.
        """
        if self.recipe.retention is not None:
            return None
        return bits_per_value(self._geometry, self.recipe, self.model.dtype.itemsize)

    def force(self, tokens: Sequence[int], *, score_from: int, decode_steps: int = 0) -> Forced:
        """See `Contestant`."""
        pool = self._pool(len(tokens) + decode_steps, 1)
        runner = ModelRunner(self.model, recipe=self.recipe, kv_memory=pool, prefix_caching=False, check=False)
        try:
            return teacher_force(runner, tokens, score_from=score_from, decode_steps=decode_steps)
        finally:
            runner.release()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop: frozenset[int],
        contexts: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """See `Contestant`; all prompts at once, in one engine."""
        longest = max(map(len, prompts)) + max_tokens
        pool = self._pool(longest, len(prompts))
        ends = tuple(sorted(stop))
        params = [
            SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=ends, context_tokens=context)
            for context in (contexts if contexts is not None else [None] * len(prompts))
        ]
        with Engine(
            self.model,
            recipe=self.recipe,
            kv_memory=pool,
            max_batched_tokens=_chunk(longest),
            prefix_caching=False,
            check=False,
        ) as engine:
            outputs = engine.generate([list(prompt) for prompt in prompts], params, progress=False)
        said = [output.token_ids for output in outputs]
        return [tokens[:-1] if tokens and tokens[-1] in stop else tokens for tokens in said]

    def close(self) -> None:
        """Nothing is held."""

    def _pool(self, length: int, sequences: int) -> int:
        groups = self._geometry.groups(self.recipe, self.model.dtype.itemsize)
        specs = [group_spec(group, recipe=self.recipe) for group in groups]
        # A method of retention may have the context repeated, beside what there is.
        sequences += self.recipe.retention is not None
        return budget_for(specs, self.recipe.block_size, length=length, chunk=_chunk(length), sequences=sequences)


def _chunk(length: int) -> int:
    """Tokens of one forward: a whole prompt of this length, as far as `PREFILL_TOKENS` go."""
    return max(_LEAST_CHUNK, min(PREFILL_TOKENS, length))


def bits_per_value(geometry: Geometry, recipe: Recipe, dtype_bytes: int) -> float:
    """Bits a stored number takes in a block that is packed (raw, if none ever is)."""
    groups = geometry.groups(recipe, dtype_bytes)
    block_bytes = sum(group.packed_block_bytes or group.raw_block_bytes for group in groups)
    numbers = sum(group.pages_per_block * (group.k_dim + group.v_dim) for group in groups) * recipe.block_size
    return 8 * block_bytes / numbers


def recipe_contestants(model: PreTrainedModel, texts: Sequence[str]) -> list[RecipeContestant]:
    """``raw`` first, as the yardstick, and a contestant for each other recipe.

    The model is compared with its stock path once. RecipeError for a bad text, UnsupportedError for a recipe that
    cannot serve the model.
    """
    recipes = parse_recipes(["raw", *texts], model)
    check_model(model, Geometry.from_config(model.config))
    return [RecipeContestant(model, text, recipe) for text, recipe in recipes.items()]
