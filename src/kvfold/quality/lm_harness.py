"""kvfold as a model of EleutherAI's lm-evaluation-harness: its tasks, run through the runtime that serves.

`run_lm_eval` measures recipes on the harness' tasks. ``python -m kvfold.quality.lm_harness`` is the harness' own
command line with the model ``kvfold`` in it; the harness has no entry points through which a package could add one.
"""

from __future__ import annotations

import difflib
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.engine.loading import BUNDLED, load, parse_recipes
from kvfold.errors import KVFoldError, RequestError, UnsupportedError
from kvfold.quality.lm_model import HarnessModel, torch_dtype
from kvfold.recipe import Recipe
from kvfold.telemetry import Stopwatch

__all__ = ["main", "model_class", "register", "require_lm_eval", "run_lm_eval"]

NAME: Final = "kvfold"
"""The model's name in the harness."""

_KEPT: Final = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
"""What of the harness' outcome is about the tasks, not about the machine."""

Say = Callable[[str], None]


def require_lm_eval() -> str:
    """The harness' version; UnsupportedError if it is not installed."""
    try:
        from lm_eval import __version__
    except ImportError as error:
        raise UnsupportedError(
            "EleutherAI's harness cannot be imported", why=str(error), hint="pip install 'kvfold[lm-eval]'"
        ) from error
    return str(__version__)


@cache
def model_class() -> type[HarnessModel]:
    """The harness' model class."""
    require_lm_eval()
    from lm_eval.api.model import TemplateLM

    class KVFoldLM(HarnessModel, TemplateLM):  # type: ignore[misc] # the harness has no types
        """`HarnessModel` with the harness' own way from texts to tokens."""

    return KVFoldLM


def register() -> None:
    """Makes the model known to the harness as ``kvfold``. Doing it twice is no error."""
    require_lm_eval()
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=model_class())


def run_lm_eval(
    model: str | Path | PreTrainedModel,
    recipes: Sequence[str],
    tasks: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    chat: bool = False,
    seed: int = 0,
    model_args: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """The harness' ``tasks`` (names, or patterns such as ``mmlu_*``) under each of ``recipes``, as plain data.

    ``model``: ``bundled``, a directory, a hub id, or a loaded model with its ``tokenizer``. ``limit``: documents of a
    task. ``include_path``: a folder with tasks of one's own. ``chat``: prompts in the model's chat template.
    ``model_args``: further arguments of `HarnessModel`, ``dtype`` among them. ``metadata``: what tasks ask for that
    make their own texts (RULER: ``max_seq_lengths``); the tokenizer's name is in it already. ``say`` is told what is
    happening.

    Refused before anything is measured: a missing harness, unknown tasks, data that cannot be had, bad recipes.
    """
    version = require_lm_eval()
    if limit is not None and limit < 1:
        raise RequestError(f"bad limit={limit!r}", why="at least one document of a task is needed")
    arguments = {"seed": seed, **(model_args or {})}
    weights = torch_dtype(arguments.pop("dtype", None))
    for text in recipes:
        Recipe.parse(text)
    source = tokenizer.name_or_path if tokenizer is not None else _where(model)
    manager, names = _find_tasks(tasks, include_path, {"tokenizer": source, **(metadata or {})})
    say(f"loading {', '.join(names)}")
    loaded = _load_tasks(manager, names)
    if isinstance(model, (str, Path)):
        name = str(model)
        model, own = load(model, dtype=weights)
        tokenizer = tokenizer or own
    else:
        name = str(model.config._name_or_path)
    outcome: dict[str, Any] = {}
    for i, text in enumerate(parse_recipes(recipes, model)):
        say(f"{text}: {', '.join(names)}")
        face = model_class()(model, text, tokenizer=tokenizer, **{"check": i == 0, **arguments})
        outcome[text] = _evaluate(face, loaded, limit=limit, num_fewshot=num_fewshot, chat=chat, seed=seed)
    return {
        "lm_eval": version,
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tasks": names,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat": chat,
        "seed": seed,
        "recipes": outcome,
    }


def main() -> None:
    """The harness' own command line, with the model ``kvfold``."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except KVFoldError as error:
        sys.exit(f"error: {error}")


def _where(model: str | Path | PreTrainedModel) -> str:
    """What a tokenizer can be loaded from by its name."""
    if isinstance(model, PreTrainedModel):
        return str(model.config._name_or_path)
    return str(files("kvfold").joinpath(BUNDLED)) if str(model) == BUNDLED else str(model)


def _find_tasks(
    tasks: Sequence[str], include_path: str | Path | None, metadata: dict[str, Any]
) -> tuple[Any, list[str]]:
    """The harness' task manager, and the names that ``tasks`` stand for."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise RequestError("no task is named", hint="gsm8k, for one")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise RequestError(f"no folder {str(include_path)!r}", hint="name one with the YAML files of your tasks")
        manager = TaskManager(include_path=str(include_path), include_defaults=False, metadata=metadata)
        if set(tasks) <= set(manager.all_subtasks):  # the harness' own tasks are many: ten seconds of reading
            return manager, list(dict.fromkeys(tasks))
    manager = TaskManager(include_path=None if include_path is None else str(include_path), metadata=metadata)
    found = {task: manager.match_tasks([task]) for task in tasks}
    if missing := [task for task, names in found.items() if not names]:
        close = [name for task in missing for name in difflib.get_close_matches(task, manager.all_tasks, n=3)]
        raise RequestError(
            f"the harness knows no task {', '.join(map(repr, missing))}",
            hint=(f"did you mean {', '.join(close)}? " if close else "") + "`lm-eval ls tasks` lists all; a folder "
            "with tasks of your own is named with --lm-eval-path",
        )
    return manager, list(dict.fromkeys(name for names in found.values() for name in sorted(names)))


def _load_tasks(manager: Any, names: list[str]) -> Any:
    """The tasks with their data."""
    try:
        return manager.load(names)
    except ImportError as error:
        raise UnsupportedError(
            f"a package that one of {', '.join(names)} needs is missing",
            why=str(error),
            hint="the harness has extras for it, such as `pip install 'lm-eval[ruler]'`",
        ) from error
    except (OSError, LookupError, ValueError) as error:
        raise RequestError(
            f"cannot load {', '.join(names)}",
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            hint="most tasks take their data from the Hugging Face hub: it must be reachable once, or the data lie in "
            "the cache of `datasets`; without a hub, name tasks of your own with --lm-eval-path",
        ) from error


def _evaluate(
    face: HarnessModel, loaded: Any, *, limit: int | None, num_fewshot: int | None, chat: bool, seed: int
) -> dict[str, Any]:
    """One recipe on the tasks: as the harness' `simple_evaluate` does, less what it collects about the machine."""
    from lm_eval import evaluate

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    watch = Stopwatch()
    results = evaluate(
        lm=face,
        task_dict=loaded,
        limit=limit,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    seconds = watch.seconds
    kept = {name: results[name] for name in _KEPT if name in results}
    return {
        **_plain(kept),
        "kv_peak_bytes": face.peak_bytes,
        "idle": list(face.idle or ()),
        "seconds": seconds,
    }


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers of numpy as Python's, and None for one that is not finite."""
    from lm_eval.utils import handle_non_serializable

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(one) for key, one in item.items()}
        if isinstance(item, list):
            return [finite(one) for one in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return finite(json.loads(json.dumps(value, default=handle_non_serializable)))


if __name__ == "__main__":
    main()
