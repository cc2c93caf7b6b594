"""What comes between looking at the arguments and the work: loading torch and transformers, quietly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

from kvfold.recipe import Recipe
from kvfold.telemetry import Settings

__all__ = ["log_to_stderr", "start"]


def log_to_stderr() -> None:
    """kvfold's own log goes to stderr, each line once; KVFoldError for a level that makes no sense."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("kvfold")
    ours.handlers[:] = [handler]
    ours.setLevel(Settings.from_env().log.upper())


def start(recipes: Iterable[Recipe] = ()) -> None:
    """Loads torch and transformers, with the threads that are asked for, and makes the methods of ``recipes``, so that
    numbers they do not take are refused before a model is loaded.
    """
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)
    threads = Settings.from_env().threads
    if threads is not None:
        torch.set_num_threads(threads)
    for recipe in recipes:
        _make_methods(recipe)


def _make_methods(recipe: Recipe) -> None:
    from kvfold.retention.build import build_method
    from kvfold.retrieval.build import build_retrieval

    if recipe.method is not None:
        build_method(recipe.method)
    if recipe.retrieval is not None:
        build_retrieval(recipe.retrieval)
