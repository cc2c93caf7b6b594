"""Finding and loading a model with its tokenizer, the recipes it can take, and how much memory its cache may."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvfold.engine.source import BUNDLED, find_source
from kvfold.errors import ModelError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe
from kvfold.retention.build import refusals

__all__ = ["BUNDLED", "available_memory", "available_recipes", "check_recipe", "end_tokens", "load", "parse_recipes"]

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and the tokenizer at ``path``: ``"bundled"``, a directory, or a hub id.

    ``dtype``: of the weights; None keeps the saved one. ``device``: None takes the GPU if there is one. The model is in
    evaluation mode. ModelError if there is none, or it cannot be loaded; within seconds if the hub does not answer.
    """
    source = find_source(path)
    kept: dict[str, Any] = {"local_files_only": True} if source.offline else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.where, **kept)
        model = AutoModelForCausalLM.from_pretrained(source.where, dtype="auto" if dtype is None else dtype, **kept)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot load the model {str(path)!r}",
            why=first_line,
            hint="name a directory with config.json, weights and tokenizer, a hub id, or 'bundled'",
        ) from error
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # type: ignore[arg-type] # transformers' decorator hides the signature of torch's `to`
    return model.eval(), tokenizer


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


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now; for the CPU without swapping, and within the container's
    limit.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        limits.append(max(0, limit - used))
    return min(limits)


def _meminfo() -> int | None:
    if not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _number(file: Path) -> int | None:
    """The number in ``file``; None if there is no such file or number (``max``: no limit)."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="ascii").strip()
    return int(text) if text.isdecimal() else None
