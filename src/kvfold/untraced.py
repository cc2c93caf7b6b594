"""Functions that torch.compile must not trace: they call kernels by address, and change what a graph holds fixed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["skipped", "untraced"]

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` runs as it stands, and so does all that it calls: a break in the graph of its caller.

    The guard of torch costs every call and all calls within it, so it stands only where a graph is being traced.
    """
    guarded: Callable[P, R] = torch.compiler.disable(function)

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        return guarded(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return plain


def skipped(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As :func:`untraced` for the function alone: what it calls may be traced. ``reason``: what a whole graph that
    meets it is told.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        plain: Callable[P, R] = torch.compiler.disable(function, recursive=False, reason=reason)
        return plain

    return decorate
