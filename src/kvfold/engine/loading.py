"""Finding and loading a model with its tokenizer, the recipes it can take, and how much memory its cache may."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvfold.engine.source import BUNDLED, Source, find_source
from kvfold.errors import ModelError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe
from kvfold.retention.build import refusals

__all__ = [
    "BUNDLED",
    "available_recipes",
    "check_recipe",
    "end_tokens",
    "load",
    "load_model",
    "parse_recipes",
]

_VOCABULARIES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "*vocab*",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "tekken.json",
    "tokenization_*.py",
)
"""Files that a tokenizer is made of, whatever its class."""


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and the tokenizer at ``path``: ``"bundled"``, a directory, or a hub id.

    ``dtype``: of the weights; None keeps the saved one. ``device``: None takes the GPU if there is one. The model is in
    evaluation mode. ModelError if there is none, or it cannot be loaded, or has no tokenizer beside it; within seconds
    if the hub does not answer.
    """
    source = find_source(path)
    _look_for_tokenizer(source.where)
    with _said_in_a_line(path):
        tokenizer = AutoTokenizer.from_pretrained(source.where, **_kept(source))
    if not tokenizer.vocab_size:  # some classes make an empty one of whatever lies there
        raise _no_tokenizer(str(path), "what is there has no vocabulary")
    return load_model(path, dtype=dtype, device=device), tokenizer


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """The model at ``path`` without a tokenizer; otherwise as `load`."""
    source = find_source(path)
    with _said_in_a_line(path):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.where, dtype="auto" if dtype is None else dtype, **_kept(source)
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # type: ignore[arg-type] # transformers' decorator hides the signature of torch's `to`
    model.eval()
    return model


def _kept(source: Source) -> dict[str, Any]:
    return {"local_files_only": True} if source.offline else {}


@contextmanager
def _said_in_a_line(path: str | Path) -> Iterator[None]:
    """ModelError with the first line of what the libraries say about ``path``."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot load the model {str(path)!r}",
            why=first_line,
            hint="name a directory with config.json, weights and tokenizer, a hub id, or 'bundled'",
        ) from error


def _look_for_tokenizer(where: str) -> None:
    """ModelError if the directory ``where`` has no file that a tokenizer is made of; a hub id is not looked at."""
    folder = Path(where)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
        raise _no_tokenizer(where, f"the directory has none of {', '.join(_VOCABULARIES)}")


def _no_tokenizer(where: str, why: str) -> ModelError:
    hint = (
        "copy the tokenizer's files there (tokenizer.save_pretrained), give one to Engine(path, tokenizer=...), "
        "or load the model yourself: Engine(model) takes prompts of token ids"
    )
    return ModelError(f"no tokenizer for the model {where!r}", why=why, hint=hint)


def parse_recipes(texts: Sequence[str], model: PreTrainedModel) -> dict[str, Recipe]:
    """The recipe of each text, in order, each text once; otherwise as `check_recipe`."""
    return {text: check_recipe(text, model) for text in texts}


def available_recipes(texts: Sequence[str], model: PreTrainedModel) -> list[str]:
    """Those of ``texts`` that ``model`` can be served with: a calibrated one needs a calibration beside the weights."""
    geometry = Geometry.from_config(model.config)
    folder = model.name_or_path
    return [text for text in texts if not _reasons(Recipe.of(text, folder), geometry, model)]


def check_recipe(recipe: Recipe | str, model: PreTrainedModel) -> Recipe:
    """``recipe`` for ``model``, its calibration located. RecipeError for a bad text, UnsupportedError for a recipe that
    cannot serve the model.
    """
    found = Recipe.of(recipe, model.name_or_path)
    geometry = Geometry.from_config(model.config)
    if reasons := _reasons(found, geometry, model):
        raise UnsupportedError(f"recipe {recipe} on {geometry.model_type}", reasons)
    return found


def _reasons(recipe: Recipe, geometry: Geometry, model: PreTrainedModel) -> list[str]:
    return recipe.supports(geometry) + refusals(recipe, geometry, model)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The tokens with which the model ends what it says: those of its generation config, and its tokenizer's."""
    found: set[int] = set()
    for ids in (getattr(model.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if isinstance(ids, int):
            found.add(ids)
        elif isinstance(ids, Iterable):
            found.update(int(token) for token in ids)
    return frozenset(found)
