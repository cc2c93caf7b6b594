"""Which implementation of an operation runs, and why.

An operation has one reference, the truth its implementations are tested against, and any number of implementations.
Each says in a sentence why it cannot take a call. The best of those that can is chosen; nothing is chosen silently,
`OpRegistry.explain` tells the reason for every implementation that was passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from kvfold.errors import KVFoldError, UnsupportedError

__all__ = ["Implementation", "OpRegistry"]

Predicate = Callable[[Any], str | None]
"""Why an implementation cannot take a call; None if it can."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an operation. ``run(call)`` takes what the operation's callers pass to `OpRegistry.select`."""

    op: str
    name: str
    refuses: Predicate
    run: Callable[[Any], Any]
    priority: int


class OpRegistry:
    """Operations, their references and their implementations. Made by a function; never module state."""

    def __init__(self) -> None:
        self._references: dict[str, Callable[..., Any]] = {}
        self._implementations: dict[str, list[Implementation]] = {}
        self._selected: dict[tuple[str, Hashable], Implementation] = {}

    def register_reference(self, op: str, fn: Callable[..., Any]) -> None:
        """Make ``fn`` the truth of the operation ``op``. An operation has one truth."""
        if op in self._references:
            raise KVFoldError(f"cannot register a reference for {op!r}", why="it has one")
        self._references[op] = fn
        self._implementations[op] = []

    def register(self, op: str, name: str, refuses: Predicate, run: Callable[[Any], Any], *, priority: int = 0) -> None:
        """Add the implementation ``name`` of ``op``; among those that take a call, the highest ``priority`` runs it.

        Raises KVFoldError if the operation has no reference: what cannot be checked is not run.
        """
        if op not in self._references:
            raise KVFoldError(
                f"cannot register {name!r} for {op!r}",
                why="the operation has no reference",
                hint="call register_reference first",
            )
        if any(known.name == name for known in self._implementations[op]):
            raise KVFoldError(f"cannot register {name!r} for {op!r}", why="the name is taken")
        self._implementations[op].append(Implementation(op, name, refuses, run, priority))
        self._implementations[op].sort(key=lambda implementation: -implementation.priority)
        self._selected.clear()

    def ops(self) -> tuple[str, ...]:
        """The operations that have a reference."""
        return tuple(self._references)

    def reference(self, op: str) -> Callable[..., Any]:
        """The truth of ``op``."""
        self._check(op)
        return self._references[op]

    def implementations(self, op: str) -> tuple[Implementation, ...]:
        """The implementations of ``op``, best first."""
        self._check(op)
        return tuple(self._implementations[op])

    def select(self, op: str, call: Any, alike: Hashable = None) -> Implementation:
        """The implementation that runs ``call``. Raises UnsupportedError with every reason if none can.

        Calls with the same ``alike`` (None: no other call) are taken by the same implementations: they are asked once.
        """
        if alike is None:
            return self._select(op, call)
        found = self._selected.get((op, alike))
        if found is None:
            found = self._selected[op, alike] = self._select(op, call)
        return found

    def _select(self, op: str, call: Any) -> Implementation:
        self._check(op)
        for implementation in self._implementations[op]:
            if implementation.refuses(call) is None:
                return implementation
        reasons = [f"{name}: {reason}" for name, reason in self.explain(op, call)]
        raise UnsupportedError(f"nothing can run {op!r} for this call", reasons or ["it has no implementation"])

    def explain(self, op: str, call: Any) -> list[tuple[str, str]]:
        """Every implementation of ``op``, best first, with ``"chosen"`` or the reason why it does not run ``call``."""
        self._check(op)
        verdicts: list[tuple[str, str]] = []
        chosen = ""
        for implementation in self._implementations[op]:
            reason = implementation.refuses(call)
            if reason is None:
                reason = f"{chosen!r} has precedence" if chosen else "chosen"
                chosen = chosen or implementation.name
            verdicts.append((implementation.name, reason))
        return verdicts

    def _check(self, op: str) -> None:
        if op not in self._references:
            raise KVFoldError(f"unknown operation {op!r}", why=f"known are {', '.join(self._references) or 'none'}")
