"""Rotary embeddings as methods need them: undone, and averaged over positions to come.

A model's own ``apply_rotary_pos_emb`` does the turning, so that its layout of pairs, whether halves or neighbours, all
dims or some, need not be known. It is linear in the vector, and in ``(cos, sin)`` on the dims it turns: the inverse is
the same function of ``(cos, -sin) / (cos^2 + sin^2)``, the mean of rotations the function of the mean ``(cos, sin)``.

Frequencies are learnt from the angles that the model passes to its layers. Those may have the eight bits of bfloat16,
but over ``n`` positions an angle is off by no more than over one, and the frequency by an ``n``-th of that.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from kvfold.errors import UnsupportedError
from kvfold.retention.modules import attention_modules

__all__ = ["Rotation", "followed", "mean_ahead", "rotary_refusals"]

_JUMP: Final = 0.1
"""An angle (radians) this far from where its frequency takes it: tokens were rolled back, or skipped."""


def rotary_refusals(model: nn.Module) -> list[str]:
    """Every reason why the rotations of a model's queries cannot be undone or foreseen."""
    reasons = set()
    for module in attention_modules(model):
        name = type(module).__name__
        takes = inspect.signature(type(module).forward).parameters
        if _function(module) is None or "position_embeddings" not in takes:
            reasons.add(f"{name} has no rotary embedding of the usual kind")
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        kinds = [x for x in (parameters, *parameters.values()) if isinstance(x, dict)]
        if any("mrope_section" in kind for kind in kinds):
            reasons.add(f"{name} turns queries by positions in several dimensions")
        if any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
            reasons.add(f"{name} turns queries by frequencies that change with the length")
    return sorted(reasons)


@dataclass(frozen=True, slots=True)
class Rotation:
    """How an attention ``module`` turns its queries: by ``function``, the ``apply_rotary_pos_emb`` of its file."""

    module: nn.Module
    function: Callable[..., Any]

    @classmethod
    def of(cls, module: nn.Module) -> Rotation:
        """That of an attention module; UnsupportedError if its file has none."""
        function = _function(module)
        if function is None:
            raise UnsupportedError(f"the rotations of {type(module).__name__}", why="it has no rotary embedding")
        return cls(module, function)

    def width(self, q: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor | None) -> int:
        """How many leading dims of a head the function takes, found with queries ``q [T, Hq, D]`` that were turned by
        ``cos, sin [T, R]``; 0 if they were not turned at all. ``hidden [T, E]``: the input of the module.

        Some functions pass on what they do not turn, others want it cut off. UnsupportedError if no width fits. That a
        layer leaves positions out shows in its projection: queries are nearer to it as they are than turned back.
        """
        dims, rotary = q.shape[-1], cos.shape[-1]
        fits = [width for width in (dims, rotary) if width <= dims and self._fits(q[-1:], cos[-1:], sin[-1:], width)]
        if not fits:
            why = f"its rotary embedding of {rotary} dims does not go with heads of {dims}"
            raise UnsupportedError(f"the rotations of {type(self.module).__name__}", why=why)
        project = getattr(self.module, "q_proj", None)
        if hidden is None or project is None:
            return fits[0]
        before = project(hidden[-4:]).float()
        if before[0].numel() != q[0].numel():
            return fits[0]
        near = torch.nn.functional.cosine_similarity
        back = self.undone(q[-4:], cos[-4:], sin[-4:], fits[0])
        plain, turned = (near(x, before.view_as(x), dim=-1).sum() for x in (q[-4:], back))
        return 0 if plain > turned else fits[0]

    def undone(self, q: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
        """``q [T, H, D]`` as it was before it was turned by ``cos, sin [T, R]``."""
        size = cos**2 + sin**2
        return self._turned(q, cos / size, -sin / size, width)

    def matrix(self, dims: int, cos: Tensor, sin: Tensor, width: int) -> Tensor:
        """``[D, D]``: what turning by ``cos, sin [R]`` (which may be means) does to a column of ``dims`` numbers."""
        unit = torch.eye(dims, device=cos.device)
        turned = self._turned(unit[:, None], cos.expand(dims, -1), sin.expand(dims, -1), width)
        return turned[:, 0].T

    def _fits(self, q: Tensor, cos: Tensor, sin: Tensor, width: int) -> bool:
        try:
            again = self._turned(self.undone(q, cos, sin, width), cos, sin, width)
        except RuntimeError:  # shapes that do not go together
            return False
        return again.shape == q.shape and torch.allclose(again, q, rtol=1e-2, atol=1e-2 * float(q.abs().max()))

    def _turned(self, q: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
        x = q[..., :width].transpose(0, 1)[None]  # [1, H, T, width], as the model has it
        single = "k" not in inspect.signature(self.function).parameters
        vectors = (x,) if single else (x, x)
        found = self.function(*vectors, cos=cos[None], sin=sin[None])
        out: Tensor = found if single else found[0]
        return torch.cat((out[0].transpose(0, 1), q[..., width:]), dim=-1)


def followed(phases: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """What is known of the angles after the next tokens' ``cos, sin [T, R]``: float64 ``[6, R]``, on the CPU.

    Rows: the angle of an anchor; the change from one position to the next; the angle of the latest token; the size of
    (cos, sin); tokens since the anchor; the greatest distance that the change was measured over.
    """
    angle = torch.atan2(sin.double(), cos.double()).cpu()
    size = (cos[-1].double() ** 2 + sin[-1].double() ** 2).sqrt().cpu()
    if phases is None:
        anchor, rate, first, span = angle[0], torch.zeros_like(angle[0]), 0, 0
    else:
        anchor, rate, first, span = phases[0], phases[1], int(phases[4, 0]) + 1, int(phases[5, 0])
    last = first + angle.shape[0] - 1
    # Doubled distances: each is short enough for what is known so far to tell whole turns.
    for step in sorted({2**e for e in range(last.bit_length()) if 2**e >= first} | {last} - {0}):
        off = torch.remainder(angle[step - first] - anchor - rate * step + math.pi, 2 * math.pi) - math.pi
        if span and float(off.abs().max()) > _JUMP:
            if angle.shape[0] > 1:
                return followed(None, cos, sin)
            anchor, last = angle[0], 0
            break
        if step >= span:
            rate, span = rate + off / step, step
    counts = [torch.full_like(rate, x) for x in (last, span)]
    return torch.stack((anchor, rate, angle[-1], size, *counts))


def mean_ahead(phases: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean ``(cos, sin)``, each ``[R]``, float32, of the next ``count`` positions."""
    angles = phases[2] + phases[1] * torch.arange(1, count + 1, dtype=phases.dtype)[:, None]
    return (angles.cos().mean(0) * phases[3]).float(), (angles.sin().mean(0) * phases[3]).float()


def _function(module: nn.Module) -> Callable[..., Any] | None:
    """The ``apply_rotary_pos_emb`` of the file that a module is defined in."""
    return getattr(sys.modules.get(type(module).__module__), "apply_rotary_pos_emb", None)
