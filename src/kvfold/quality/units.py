"""The work of an evaluation, cut into units that are finished one by one and never done twice.

A unit's result is plain data under a name of its own. The reference comes first on each passage, and the logits of only
one passage are held for comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from kvfold.errors import NumericsError
from kvfold.geometry import Geometry
from kvfold.quality.contestant import Contestant, Forced
from kvfold.quality.error_map import KeysAndValues, error_map, keys_and_values
from kvfold.quality.forwards import scored_tokens
from kvfold.quality.journal import Journal
from kvfold.quality.metrics import divergence, surprise
from kvfold.quality.recipes import RecipeContestant
from kvfold.quality.tasks import score
from kvfold.quality.workload import Question, Workload

__all__ = ["Unit", "Units"]

_BATCH: Final = 8
"""Questions answered at once."""

_STEP_COST: Final = 20
"""What a step that generates costs, in tokens of a prompt; for the estimate of the time that is left."""


@dataclass(frozen=True, slots=True)
class Unit:
    """``run`` makes the result that is kept under ``name``; ``what``: for people; ``cost``: about so many tokens."""

    name: str
    what: str
    cost: int
    run: Callable[[], Any]


class Units:
    """All units of an evaluation, and where the results of finished ones are."""

    def __init__(
        self, contestants: Sequence[Contestant], reference: Contestant, workload: Workload, journal: Journal
    ) -> None:
        self.reference = reference
        self.everyone = [reference, *(c for c in contestants if c.name != reference.name)]
        self.answering = list(contestants)
        self.workload = workload
        self.journal = journal
        self._held: tuple[str, Tensor] | None = None
        self._kv: KeysAndValues | None = None

    # -- what there is to do

    def all(self) -> Iterator[Unit]:
        """In the order in which they are to be done: a unit may need the results of those before it."""
        work = self.workload
        for i, passage in enumerate(work.passages):
            for who in self.everyone:
                steps = work.settings.decode_steps + _single_steps(who, len(passage) - work.score_from)
                cost = len(passage) + steps * _STEP_COST
                yield Unit(self.text(i, who), f"{who.name}: text {i + 1}", cost, partial(self._text, i, who))
        for task in work.settings.tasks:
            for start in range(0, work.settings.samples, _BATCH):
                yield from self._asked(task, start)
        if work.prompts:
            yield from self._generation()
        for who in self.everyone:
            if isinstance(who, RecipeContestant) and who in self.answering and not who.recipe.is_raw:
                yield Unit(self.errors(who), f"{who.name}: error map", 1000, partial(self._errors, who))

    def _asked(self, task: str, start: int) -> Iterator[Unit]:
        asked = [q for q in self.workload.questions if q.sample.task == task][start : start + _BATCH]
        room = min(max(q.max_tokens for q in asked), self.workload.settings.context - max(len(q.prompt) for q in asked))
        cost = sum(len(q.prompt) for q in asked) + room * _STEP_COST
        for who in self.answering:
            run = partial(self._answers, asked, room, who)
            yield Unit(self.answers(task, start, who), f"{who.name}: {task}", cost, run)

    def _generation(self) -> Iterator[Unit]:
        prompts, tokens = self.workload.prompts, self.workload.settings.generation_tokens
        cost = sum(map(len, prompts)) + tokens * _STEP_COST
        for who in self.everyone:
            yield Unit(self.continued(who), f"{who.name}: generates", cost, partial(self._continued, who))
        for i in range(len(prompts)):
            for who in self.everyone:
                what = f"{who.name}: raw's continuation {i + 1}"
                steps = tokens + _single_steps(who, tokens) * _STEP_COST
                yield Unit(self.follow(i, who), what, steps, partial(self._follow, i, who))

    # -- names of results

    def text(self, i: int, who: Contestant) -> str:
        """Passage ``i`` of the text, teacher-forced."""
        return f"text/{i}/{who.name}"

    def answers(self, task: str, start: int, who: Contestant) -> str:
        """Scores of the samples from ``start`` on."""
        return f"task/{task}/{start}/{who.name}"

    def continued(self, who: Contestant) -> str:
        """Its own continuations of all prompts."""
        return f"continued/{who.name}"

    def follow(self, i: int, who: Contestant) -> str:
        """The reference's continuation ``i``, teacher-forced."""
        return f"follow/{i}/{who.name}"

    def errors(self, who: Contestant) -> str:
        """The error map."""
        return f"errors/{who.name}"

    def scores(self, task: str, who: Contestant) -> list[float]:
        """Scores of all samples of a task."""
        starts = range(0, self.workload.settings.samples, _BATCH)
        return [value for start in starts for value in self.journal[self.answers(task, start, who)]]

    # -- doing it

    def _text(self, i: int, who: Contestant) -> dict[str, Any]:
        passage, first = self.workload.passages[i], self.workload.score_from
        steps = self.workload.settings.decode_steps
        forced = _forced(who, passage, first, steps)
        found = self._compare(f"text/{i}", who, forced.logits, passage, first)
        nll = surprise(forced.logits, passage[first + 1 :]).tolist()
        seen = {"nll": nll, "kv_bytes": forced.kv_bytes, "decode_tok_s": forced.decode_tok_s}
        return found | seen | {"idle": list(forced.idle)}

    def _answers(self, asked: Sequence[Question], room: int, who: Contestant) -> list[float]:
        contexts = [q.context_tokens for q in asked] if self.workload.settings.compress == "context" else None
        prompts, stop = [q.prompt for q in asked], self.workload.stop
        said = who.generate(prompts, max_tokens=room, stop=stop, contexts=contexts)
        return [
            score(q.sample, self.workload.decode(tokens[: q.max_tokens])) for q, tokens in zip(asked, said, strict=True)
        ]

    def _continued(self, who: Contestant) -> list[list[int]]:
        tokens = self.workload.settings.generation_tokens
        return who.generate(self.workload.prompts, max_tokens=tokens, stop=frozenset())

    def _follow(self, i: int, who: Contestant) -> dict[str, Any]:
        prompt = self.workload.prompts[i]
        tokens = [*prompt, *self.journal[self.continued(self.reference)][i]]
        forced = _forced(who, tokens, len(prompt), 0)
        return self._compare(f"follow/{i}", who, forced.logits, tokens, len(prompt)) | {"idle": list(forced.idle)}

    def _compare(self, what: str, who: Contestant, logits: Tensor, tokens: Sequence[int], first: int) -> dict[str, Any]:
        """KL and agreement at each position, against the reference's logits, which are held or made again."""
        if who is self.reference:
            self._held = (what, logits)
        elif self._held is None or self._held[0] != what:
            self._held = None
            self._held = (what, _forced(self.reference, tokens, first, 0).logits)
        kl, same = divergence(self._held[1].to(logits.device), logits)
        return {"kl": kl.tolist(), "same": same.int().tolist()}

    def _errors(self, who: RecipeContestant) -> dict[str, Any] | None:
        if self._kv is None:
            self._kv = keys_and_values(who.model, self.workload.passages[0])
        found = error_map(Geometry.from_config(who.model.config), who.recipe, self._kv)
        return None if found is None else asdict(found)


def _single_steps(who: Contestant, scored: int) -> int:
    """Forwards of one token that scoring takes."""
    return scored if isinstance(who, RecipeContestant) and scored_tokens(who.recipe) == 1 else 0


def _forced(who: Contestant, tokens: Sequence[int], score_from: int, steps: int) -> Forced:
    forced = who.force(tokens, score_from=score_from, decode_steps=steps)
    if not bool(torch.isfinite(forced.logits).all()):
        raise NumericsError(
            f"logits of {who.name} are not finite", hint="leave it out, or load the model in a wider dtype"
        )
    return forced
