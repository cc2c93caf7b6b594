"""What a prompt may be: a text, token ids, or chat messages; arrays and tensors of whole numbers count as lists of
them.

Everything else is refused by its place: which prompt, which token, which message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from kvfold.engine.request import Chat
from kvfold.errors import RequestError

__all__ = ["PlainPrompt", "plain", "several"]

PlainPrompt: TypeAlias = str | list[int] | Chat
"""A prompt in the types that Python itself has."""

_HINT = "a prompt is a text, a list of token ids, or a list of chat messages"


def several(prompts: Any) -> list[tuple[str, PlainPrompt]]:
    """One prompt or several, each with what to call it in an error. RequestError, with its place, for what is none."""
    if isinstance(prompts, Mapping):
        why = "it is a mapping" + (", as tokenizers return it" if "input_ids" in prompts else "")
        raise RequestError(
            "bad prompt", why=f"{why}, not a prompt", hint="give its input_ids" if "input_ids" in prompts else _HINT
        )
    prompts = _listed(prompts, "the prompt", dimensions=2)
    if isinstance(prompts, str | Chat) or not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        return [("the prompt", plain(prompts))]
    if len(prompts) and (isinstance(prompts[0], Mapping) or _is_number(prompts[0])):
        return [("the prompt", plain(prompts))]
    return [(f"prompt {i}", plain(prompt, f"prompt {i}")) for i, prompt in enumerate(prompts)]


def plain(prompt: Any, name: str = "the prompt") -> PlainPrompt:
    """One prompt; RequestError, which calls it ``name``, if it is none."""
    prompt = _listed(prompt, name, dimensions=1)
    if isinstance(prompt, str):
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise RequestError(f"bad text in {name}", why="it is not valid Unicode: it holds half of a surrogate pair")
        return prompt
    if isinstance(prompt, Chat):
        return prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        found = "None" if prompt is None else f"of type {type(prompt).__name__}"
        raise RequestError(f"bad prompt ({name})", why=f"it is {found}", hint=_HINT)
    if not len(prompt):
        raise RequestError(f"empty prompt ({name})", why="there is no token to go on from")
    if isinstance(prompt[0], Mapping):
        return Chat([_message(message, i, name) for i, message in enumerate(prompt)])
    return [_token(token, i, name) for i, token in enumerate(prompt)]


def _listed(value: Any, name: str, *, dimensions: int) -> Any:
    """``value``, as a list if it is an array or a tensor of whole numbers with at most so many dimensions."""
    if not hasattr(value, "tolist") or not hasattr(value, "ndim") or value.ndim == 0:
        return value
    if value.ndim > dimensions:
        hint = "give one list of token ids for each prompt" if value.ndim == 2 else _HINT
        raise RequestError(f"bad prompt ({name})", why=f"it is an array of {value.ndim} dimensions", hint=hint)
    listed = value.tolist()
    flat = [item for row in listed for item in row] if value.ndim == 2 else listed
    if any(isinstance(item, bool) or not isinstance(item, int) for item in flat):
        why = f"it is an array of {value.dtype}: token ids are whole numbers"
        raise RequestError(f"bad prompt ({name})", why=why, hint=_HINT)
    return listed


def _is_number(value: Any) -> bool:
    """Whether ``value`` stands where a token id should, right or wrong."""
    return isinstance(value, int | float) or getattr(value, "ndim", None) == 0


def _token(token: Any, place: int, name: str) -> int:
    alone = not hasattr(token, "ndim") or token.ndim == 0
    if alone and hasattr(token, "__index__") and not isinstance(token, bool):
        try:
            return int(token.__index__())
        except TypeError:  # a tensor of another type than whole numbers
            pass
    found = f"an array of shape {tuple(token.shape)}" if not alone else f"{token!r:.60} of type {type(token).__name__}"
    why = f"token {place} of {name} is {found}, not a whole number"
    raise RequestError("bad token id in a prompt", why=why, hint=_HINT)


def _message(message: Any, place: int, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        found = "no role" if isinstance(message, Mapping) else f"type {type(message).__name__}"
        why = f"message {place} of {name} has {found}"
        raise RequestError("bad chat message", why=why, hint='a message is {"role": "user", "content": "..."}')
    return dict(message)
