"""What decides the figures of an evaluation, checked before anything heavy begins. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from kvfold.errors import RequestError
from kvfold.quality.tasks import TASKS

__all__ = ["Compressed", "EvalSettings", "check_profile_context", "parse_depths", "parse_tasks"]

_LEAST_CONTEXT: Final = 128
_LEAST_PROFILED: Final = 16
_TIMES_NEAR: Final = 4
"""A context to profile is at least so many times sinks and recent window: else nothing in it is far."""

Compressed: TypeAlias = Literal["prompt", "context"]
"""What is compressed of a task's prompt: all of it, or the context alone, before the question is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """``context``: tokens of a text passage with its timed steps, and of a task's prompt with its answer.

    ``samples``: of each task. ``depths``: where in the context the asked fact stands, taken in turns; empty: at random.
    ``text``: a UTF-8 file; None: sources of Python's standard library. ``text_windows``: passages of it, the last
    ``scored_tokens`` of each are scored. ``generation_passages`` prompts of a quarter of the context are continued by
    ``generation_tokens`` tokens (0: none). ``compress``: whoever drops tokens does so at the end of a task's prompt,
    question included (``prompt``), or at the end of its context, without having seen the question (``context``).
    RequestError, with a hint, for values that make no sense.
    """

    tasks: tuple[str, ...] = TASKS
    context: int = 2048
    samples: int = 20
    seed: int = 0
    depths: tuple[float, ...] = ()
    text: Path | None = None
    text_windows: int = 8
    scored_tokens: int = 256
    generation_tokens: int = 512
    generation_passages: int = 4
    decode_steps: int = 32
    compress: Compressed = "prompt"

    def __post_init__(self) -> None:
        _at_least("samples", self.samples, 1)
        _at_least("text_windows", self.text_windows, 1)
        _at_least("scored_tokens", self.scored_tokens, 2)
        _at_least("generation_tokens", self.generation_tokens, 0)
        _at_least("generation_passages", self.generation_passages, 1)
        _at_least("decode_steps", self.decode_steps, 0)
        _at_least("context", self.context, _LEAST_CONTEXT)
        if self.scored_tokens + self.decode_steps > self.context // 2:
            raise RequestError(
                f"a context of {self.context} tokens",
                why=f"{self.scored_tokens} scored tokens and {self.decode_steps} timed steps take more than half of it",
                hint=f"--context {2 * (self.scored_tokens + self.decode_steps)}, or fewer --scored tokens",
            )
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise RequestError(f"bad depth {depth:g}", hint="0 is the start of the context, 1 its end")
        if self.compress not in get_args(Compressed):
            raise RequestError(f"bad compress {self.compress!r}", hint="known: " + ", ".join(get_args(Compressed)))
        _known_tasks(self.tasks)

    @property
    def generation_prompt(self) -> int:
        """Tokens of a prompt that is continued."""
        return self.context // 4

    @property
    def longest(self) -> int:
        """Most positions that anything here takes."""
        generation = self.generation_prompt + self.generation_tokens if self.generation_tokens else 0
        return max(self.context, generation)

    def as_json(self) -> dict[str, Any]:
        """Plain data; of a text file only its name, for its content is known by the workload's digest. ``compress`` is
        left out where all of the prompt is compressed, so that results from before it was a setting still compare.
        """
        data = asdict(self) | {
            "tasks": list(self.tasks),
            "depths": list(self.depths),
            "text": None if self.text is None else self.text.name,
        }
        if self.compress == "prompt":
            del data["compress"]
        return data


def parse_tasks(text: str) -> tuple[str, ...]:
    """Task names separated by commas, each once; ``all`` and ``none`` are words for that."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if names == ("all",):
        return TASKS
    if names == ("none",):
        return ()
    if not names:
        raise RequestError(f"bad tasks {text!r}", why="none is named", hint="known: all, none, " + ", ".join(TASKS))
    _known_tasks(names)
    return names


def parse_depths(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise RequestError(f"bad depths {text!r}", why=str(error), hint="numbers such as 0,0.25,0.5,1") from error


def check_profile_context(context: int, near: int) -> None:
    """RequestError for a ``context`` in which hardly any token is farther than ``near``: sinks and recent window."""
    least = max(_LEAST_PROFILED, _TIMES_NEAR * near)
    if context < least:
        why = f"sinks and recent window take {near}, and hardly anything in it would be far from a query"
        hint = f"give a --context of at least {least}, or a --recipe with a smaller recent window"
        raise RequestError(f"a context of {context} tokens", why=why, hint=hint)


def _known_tasks(names: Sequence[str]) -> None:
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
            close = close or [task for task in TASKS if name.lower() in task][:1]
            known = "known: " + ", ".join(TASKS)
            hint = f"did you mean {close[0]!r}? {known}" if close else known
            raise RequestError(f"unknown task {name!r}", hint=hint)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise RequestError(f"bad {name.replace('_', ' ')} {value}", hint=f"at least {low} is needed")
