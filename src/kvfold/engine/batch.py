"""What the two faces share: the requests of one call, before they are added and after they have ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kvfold.engine.prompts import several
from kvfold.engine.request import Prompt, RequestOutput, SamplingParams
from kvfold.errors import RequestError

__all__ = ["Asked", "asked", "in_order", "naming", "raise_error"]


class Asked(NamedTuple):
    """One request of a call. ``request_id``: None for one that the engine chooses."""

    prompt: Prompt
    params: SamplingParams | None
    request_id: str | None
    name: str
    """What to call it in an error."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """A refusal of one of several prompts says which."""
    try:
        yield
    except RequestError as error:
        if name == "the prompt" or name in str(error):
            raise
        raise RequestError(f"{name}: {error.what}", why=error.why, hint=error.hint) from error


def asked(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    request_id: str | Sequence[str] | None,
) -> list[Asked]:
    """The requests of a call: parameters are for all prompts, or one for each; ids are one for each prompt.

    RequestError if there are more or fewer of them than prompts, and for what is no prompt.
    """
    many = several(prompts)
    wanted = params if isinstance(params, Sequence) else [params] * len(many)
    ids: Sequence[str | None] = [None] * len(many)
    if request_id is not None:
        ids = [request_id] if isinstance(request_id, str) else request_id
    for found, what in ((wanted, "sampling parameters"), (ids, "request ids")):
        if len(found) != len(many):
            raise RequestError(f"{len(found)} {what} for {len(many)} prompts", hint="give one for each prompt")
    return [Asked(one, want, each, name) for (name, one), want, each in zip(many, wanted, ids, strict=True)]


def in_order(ids: Sequence[str], done: Mapping[str, RequestOutput], *, raise_errors: bool) -> list[RequestOutput]:
    """The outputs of ``ids``; with ``raise_errors`` the error of the first that has one is raised."""
    outputs = [done[request_id] for request_id in ids]
    if raise_errors:
        for output in outputs:
            raise_error(output)
    return outputs


def raise_error(output: RequestOutput) -> None:
    """Raise the error of a request, if it has one."""
    if output.error is not None:
        raise output.error
