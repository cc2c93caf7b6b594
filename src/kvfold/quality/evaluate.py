"""An evaluation: every contestant on the same workload, each beside the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvfold.errors import RequestError
from kvfold.geometry import Geometry
from kvfold.quality.contestant import Contestant
from kvfold.quality.journal import Journal
from kvfold.quality.results import Row
from kvfold.quality.rows import make_row
from kvfold.quality.settings import EvalSettings
from kvfold.quality.units import Units
from kvfold.quality.workload import Workload, build_workload

__all__ = [
    "EvalSettings",
    "Progress",
    "Workload",
    "build_workload",
    "check_length",
    "evaluate",
    "model_digest",
    "settled",
]

Progress = Callable[[str, float], None]
"""Is told what begins, and which share of the work is done."""

_SAMPLED: int = 64  # numbers of each weight that go into a model's digest


def evaluate(
    contestants: Sequence[Contestant],
    reference: Contestant,
    workload: Workload,
    *,
    journal: Journal | None = None,
    progress: Progress = lambda what, share: None,
) -> list[Row]:
    """The rows of ``contestants``, in their order. ``reference`` is what they are compared with, and may be among them.

    Units that ``journal`` holds already are not done again.
    """
    journal = journal if journal is not None else Journal(None, {})
    units = Units(contestants, reference, workload, journal)
    missing = [unit for unit in units.all() if unit.name not in journal]
    total, done = sum(unit.cost for unit in missing), 0
    for unit in missing:
        progress(unit.what, done / total)
        journal.add(unit.name, unit.run())
        done += unit.cost
    return [make_row(units, contestant) for contestant in contestants]


def check_length(settings: EvalSettings, model: PreTrainedModel) -> None:
    """RequestError if the model has fewer positions than the settings take."""
    limit = Geometry.from_config(model.config).max_positions
    if settings.context > limit:
        raise RequestError(
            f"a context of {settings.context} tokens",
            why=f"the model takes {limit} positions",
            hint="shorten --context",
        )
    if settings.longest > limit:
        raise RequestError(
            f"{settings.generation_tokens} generated tokens after a prompt of {settings.generation_prompt}",
            why=f"the model takes {limit} positions",
            hint="fewer --generation-tokens (0 for none), or a shorter --context",
        )


def model_digest(model: PreTrainedModel) -> str:
    """Tells models apart: their configs, and a sample of each weight."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def settled(workload: Workload, model: PreTrainedModel) -> dict[str, Any]:
    """What decides the figures, as plain data: the settings, and the digests of workload and model."""
    settings = workload.settings.as_json()
    del settings["seed"]  # has a place of its own in the result
    return settings | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "workload": workload.digest,
        "weights": model_digest(model),
    }
