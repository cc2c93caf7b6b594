"""What an evaluation found, as data: ``kvfold eval`` writes it, reports draw it, rivals add rows to it. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from kvfold.errors import RequestError

__all__ = ["ErrorMap", "Evaluation", "Generation", "Row", "TaskScore"]

_FORMAT: Final = 1
_MISSING: Final = "(missing)"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Mean score of ``n`` samples, 0 to 1, and its 95 % interval. ``scores``: of each sample, in their order, so that
    two contestants can be compared in pairs; results of earlier versions have none.
    """

    score: float
    low: float
    high: float
    n: int
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Long generation: raw's own greedy continuations of ``passages`` prompts, ``tokens`` tokens each.

    ``kl_mean``, ``kl_p99`` (nats) and ``top1_agreement``: those continuations teacher-forced under the contestant,
    against raw. ``first_divergence``: median number of tokens after which the contestant's own free
    greedy generation leaves raw's; ``tokens`` if it never does. ``ended_early``: passages in which raw had come to an
    end token by itself; generation went on past it. ``idle``: as in `Row`; with it, all of these are None.
    """

    tokens: int
    passages: int
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None
    first_divergence: float | None
    ended_early: int = 0
    idle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorMap:
    """Relative rms error of packed keys and values, ``[layer][kv_head]``, layers that keep their own cache only."""

    k: list[list[float]]
    v: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contestant. ``recipe``: its text, if it is one of ours.

    ``kv_bytes_per_token``: allocated bytes over tokens, at the end of the text passages; ``compression``: raw's bytes
    for the same tokens over its own. KL in nats, top-1 agreement, perplexity and its difference to raw: over
    ``positions`` teacher-forced text tokens; None if they are not measured, because methods of the recipe (``idle``)
    never acted on the text: it is too short for them. ``kl_by_position``: (first position of a bin, mean KL in it).
    """

    contestant: str
    family: str
    recipe: str | None
    bits_per_value: float | None
    kv_bytes_per_token: float
    compression: float
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None
    ppl: float | None
    ppl_delta: float | None
    positions: int
    decode_tok_s: float
    tasks: dict[str, TaskScore]
    generation: Generation | None
    kl_by_position: list[tuple[int, float]]
    errors: ErrorMap | None
    idle: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """What `as_json` gave; KeyError or TypeError if ``data`` is something else."""
        fields = dict(data)
        generation, errors = fields["generation"], fields["errors"]
        fields["tasks"] = {
            name: TaskScore(**score | {"scores": tuple(score.get("scores", ()))})
            for name, score in fields["tasks"].items()
        }
        fields["generation"] = (
            None if generation is None else Generation(**generation | {"idle": tuple(generation.get("idle", ()))})
        )
        fields["errors"] = None if errors is None else ErrorMap(**errors)
        fields["idle"] = tuple(fields.get("idle", ()))
        fields["kl_by_position"] = [(int(position), float(kl)) for position, kl in fields["kl_by_position"]]
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All rows of a run, and what is needed to run it again.

    ``settings`` holds whatever decides the figures: rows of two evaluations stand side by side only if these are equal.
    """

    command: str
    seed: int
    model: str
    settings: dict[str, object]
    versions: dict[str, str]
    hardware: dict[str, object]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"kvfold_eval": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """What `as_json` gave; KeyError, TypeError or ValueError if ``data`` is something else."""
        fields = dict(data)
        if (found := fields.pop("kvfold_eval")) != _FORMAT:
            raise ValueError(f"format {found}, not {_FORMAT}")
        fields["rows"] = [Row.from_json(row) for row in fields["rows"]]
        return cls(**fields)

    @classmethod
    def read(cls, file: Path) -> Evaluation:
        """The evaluation in ``file``; RequestError if it holds none."""
        hint = "give a file that `kvfold eval --json` wrote"
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise RequestError(f"evaluation {file}", why=error.strerror or str(error), hint=hint) from error
        except KeyError as error:
            raise RequestError(f"evaluation {file}", why=f"it has no {error.args[0]!r}", hint=hint) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestError(f"evaluation {file}", why=f"not an evaluation: {error}", hint=hint) from error

    def differences(self, other: Evaluation) -> list[str]:
        """What keeps the rows of ``other`` from standing beside these, one clause each; empty if nothing does."""
        mine, theirs = ({"seed": e.seed, "model": e.model} | e.settings for e in (self, other))
        return [
            f"{name} is {mine.get(name, _MISSING)} here and {theirs.get(name, _MISSING)} there"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name, _MISSING) != theirs.get(name, _MISSING)
        ]

    def merge(self, others: Iterable[Evaluation]) -> Evaluation:
        """These rows and the rows of ``others`` that have names of their own; RequestError if settings differ."""
        rows = {row.contestant: row for row in self.rows}
        versions = self.versions
        for other in others:
            if differences := self.differences(other):
                raise RequestError(
                    f"cannot merge the result of `{other.command}`",
                    why="; ".join(differences),
                    hint="run both with the same settings",
                )
            for row in other.rows:
                rows.setdefault(row.contestant, row)
            versions = other.versions | versions
        return replace(self, rows=list(rows.values()), versions=versions)
