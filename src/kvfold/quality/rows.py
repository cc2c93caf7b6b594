"""From the results of units to rows: the only place where the figures of an evaluation are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from kvfold.quality.contestant import Contestant
from kvfold.quality.results import ErrorMap, Generation, Row
from kvfold.quality.statistics import binned, mean, median, quantile, task_score
from kvfold.quality.units import Units

__all__ = ["make_row"]

_BINS: Final = 16


def make_row(units: Units, who: Contestant) -> Row:
    """The row of a contestant whose units are all done."""
    work, journal = units.workload, units.journal
    texts, raw = ([journal[units.text(i, each)] for i in range(len(work.passages))] for each in (who, units.reference))
    kl = _joined(texts, "kl")
    ppl, raw_ppl = (math.exp(mean(_joined(each, "nll"))) for each in (texts, raw))
    kv_bytes, raw_bytes = (sum(text["kv_bytes"] for text in each) for each in (texts, raw))
    errors = journal.get(units.errors(who))
    idle = _idle(texts)
    return Row(
        contestant=who.name,
        family=who.family,
        recipe=who.name if who.family == "kvfold" else None,
        bits_per_value=who.bits_per_value,
        kv_bytes_per_token=kv_bytes / sum(map(len, work.passages)),
        compression=raw_bytes / kv_bytes,
        kl_mean=None if idle else mean(kl),
        kl_p99=None if idle else quantile(kl, 0.99),
        top1_agreement=None if idle else mean(_joined(texts, "same")),
        ppl=None if idle else ppl,
        ppl_delta=None if idle else ppl - raw_ppl,
        positions=len(kl),
        decode_tok_s=median([text["decode_tok_s"] for text in texts]),
        tasks={task: task_score(units.scores(task, who)) for task in work.settings.tasks},
        generation=_generation(units, who) if work.prompts else None,
        kl_by_position=[] if idle else binned([text["kl"] for text in texts], work.score_from, _BINS),
        errors=None if errors is None else ErrorMap(**errors),
        idle=idle,
    )


def _generation(units: Units, who: Contestant) -> Generation:
    work, journal = units.workload, units.journal
    own, raw = journal[units.continued(who)], journal[units.continued(units.reference)]
    follows = [journal[units.follow(i, who)] for i in range(len(work.prompts))]
    kl, idle = _joined(follows, "kl"), _idle(follows)
    return Generation(
        tokens=work.settings.generation_tokens,
        passages=len(work.prompts),
        kl_mean=None if idle else mean(kl),
        kl_p99=None if idle else quantile(kl, 0.99),
        top1_agreement=None if idle else mean(_joined(follows, "same")),
        first_divergence=None if idle else median([_common(*pair) for pair in zip(own, raw, strict=True)]),
        ended_early=sum(bool(work.stop.intersection(tokens)) for tokens in raw),
        idle=idle,
    )


def _idle(results: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Methods that acted in none of the results: then its figures would be those of a cache without the method."""
    never = set.intersection(*(set(result.get("idle", ())) for result in results))
    return tuple(sorted(never))


def _joined(results: Sequence[dict[str, Any]], name: str) -> list[float]:
    return list(chain.from_iterable(result[name] for result in results))


def _common(mine: Sequence[int], raws: Sequence[int]) -> int:
    """Tokens both begin with."""
    pairs = enumerate(zip(mine, raws, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(mine), len(raws)))
