"""Where a model comes from: a folder, or the Hugging Face hub. Found out without torch, and within seconds."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Final

from kvfold.errors import ModelError

__all__ = ["BUNDLED", "Source", "find_source", "local_folder"]

BUNDLED: Final = "bundled"
"""The name of the small model that comes with the package."""

_ANSWER_SECONDS: Final = 5.0  # for one question to the hub
_MOST_SECONDS: Final = 8.0  # with the look-up of its address, which takes no timeout
_HINT: Final = "give a directory, a hub id, or 'bundled'"


@dataclass(frozen=True, slots=True)
class Source:
    """What transformers is to be given. ``offline``: the hub does not answer, and the local cache has the model."""

    where: str
    offline: bool = False


def local_folder(path: str | Path) -> str | None:
    """The folder of the model at ``path``; None for a hub id. ModelError if it can be neither. No network."""
    if str(path) == BUNDLED:
        folder = Path(str(files("kvfold").joinpath(BUNDLED)))
        if not (folder / "config.json").is_file():
            raise ModelError("the bundled model is missing", why=f"no {folder}", hint="reinstall kvfold")
        return str(folder)
    text = str(path)
    if text and Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ModelError(f"no model in {text!r}", why="the directory has no config.json", hint=_HINT)
        return text
    if text and Path(path).is_file():
        raise ModelError(f"no model at {text!r}", why="it is a file", hint="give the directory that holds config.json")
    if isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise ModelError(f"no model at {text!r}", why="no such directory", hint=_HINT)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        try_to_load_from_cache(text, "config.json")  # looks at the id before it looks anywhere
    except HFValidationError as error:
        why = "there is no such directory, and it cannot be the id of a model on the hub"
        raise ModelError(f"no model at {text!r}", why=why, hint=_HINT) from error
    return None


def find_source(path: str | Path, *, downloaded: bool = True) -> Source:
    """The model at ``path``: a folder, or a hub id that the local cache or the hub has.

    ModelError within seconds if neither has it. ``downloaded=False``: the hub is asked only for a model that is not in
    the local cache.
    """
    folder = local_folder(path)
    if folder is not None:
        return Source(folder)
    from huggingface_hub import try_to_load_from_cache

    name = str(path)
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if cached and not downloaded:
        return Source(name)
    why = _ask_hub(name, cached)
    if why and not cached:
        hint = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a directory or 'bundled'"
        raise ModelError(
            f"no model {name!r}", why=f"it is not in the local cache, and the hub does not answer: {why}", hint=hint
        )
    return Source(name, offline=bool(why))


def _ask_hub(name: str, cached: bool) -> str:
    """Asks the hub for the model ``name``: why it does not answer; empty if it has the model.

    ModelError if the hub answers that it has none, or does not give it, and the model is not ``cached``.
    """
    answers: list[str | ModelError] = []
    thread = Thread(target=lambda: answers.append(_answer(name)), daemon=True)
    thread.start()
    thread.join(_MOST_SECONDS)
    answer = answers[0] if answers else f"no answer within {_MOST_SECONDS:.0f} s"
    if isinstance(answer, ModelError):
        if not cached:
            raise answer
        return answer.why
    return answer


def _answer(name: str) -> str | ModelError:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=_ANSWER_SECONDS)
    except GatedRepoError:
        hint = "ask for access on its page, then `hf auth login`"
        return ModelError(f"no model {name!r}", why="the hub gives it only to users with access", hint=hint)
    except RepositoryNotFoundError:
        why = "there is no such directory, and the hub has no such model, or it is private"
        return ModelError(f"no model {name!r}", why=why, hint=_HINT)
    except _network_errors() as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def _network_errors() -> tuple[type[Exception], ...]:
    """Every error of the HTTP library that this version of the hub's client uses: the bases of the client's own."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
