"""Where the time of a step goes: clocks around its parts, put on for a few steps of their own and taken off again.

A clock costs a few microseconds, and on a GPU it waits for the work it measures; the steps whose seconds count are
timed without any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from kvfold.bench.stream import wait_for

__all__ = ["Account", "Part", "Shares", "TimedAttention", "replaced", "shares", "timed_linears"]

Part = Literal["linear", "attention", "write"]


class Account:
    """Seconds by part. Parts do not nest."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[Part, float] = {"linear": 0.0, "attention": 0.0, "write": 0.0}
        self._device = device

    def timed(self, part: Part, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, its time counted as that of ``part``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            result = work(*args, **kwargs)
            self.seconds[part] += self.now() - begin
            return result

        return run

    def now(self) -> float:
        """The clock, once all work given to the device is done."""
        wait_for(self._device)
        return time.perf_counter()


@contextmanager
def replaced(holder: object, **methods: Callable[..., Any]) -> Iterator[None]:
    """Methods of one object, by other functions; its class is left alone."""
    for name, function in methods.items():
        setattr(holder, name, function)
    try:
        yield
    finally:
        for name in methods:
            delattr(holder, name)


@contextmanager
def timed_linears(model: nn.Module, account: Account) -> Iterator[None]:
    """Counts the time of all linear layers of a model."""
    began = 0.0

    def start(*_: object) -> None:
        nonlocal began
        began = account.now()

    def stop(*_: object) -> None:
        account.seconds["linear"] += account.now() - began

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                for handle in (module.register_forward_pre_hook(start), module.register_forward_hook(stop)):
                    hooks.callback(handle.remove)
        yield


class TimedAttention(TorchFunctionMode):
    """Counts the time of torch's own attention, whoever calls it."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self._timed = account.timed("attention", scaled_dot_product_attention)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """See torch."""
        chosen = self._timed if func is scaled_dot_product_attention else func
        return chosen(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of a step's time; they add up to 1. ``other``: norms, rotary embedding, activations, the books, Python.

    ``write`` stores the new rows and seals; ``sealing`` is the part of it that seals, spread over the steps between
    two seals.
    """

    linear: float
    attention: float
    write: float
    other: float
    sealing: float


def shares(plain: Account, total: float, steps: int, seal: float, seal_every: int) -> Shares:
    """What ``plain`` counted in ``steps`` steps of ``total`` seconds that did not seal, and ``seal`` seconds once in
    ``seal_every`` steps.
    """
    sealing = steps * seal / seal_every
    whole = total + sealing
    linear, attention, write = (plain.seconds[part] / whole for part in ("linear", "attention", "write"))
    write += sealing / whole
    return Shares(linear, attention, write, 1.0 - linear - attention - write, sealing / whole)
