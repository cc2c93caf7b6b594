"""One family against its stock path: packed batches of unequal lengths, chunked prefill beside decodes, whole
prefill.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvfold.cache import PagedCache, SequenceWork
from kvfold.errors import KVFoldError
from kvfold.geometry import Geometry
from kvfold.packed import PackedModel, check_model
from kvfold.recipe import Recipe
from tests.conformance.families import VOCAB, build_model, tiny_config
from tests.conformance.overrides import NOT_DECODERS, STEPWISE, TOLERANCES

__all__ = [
    "LENGTHS",
    "SCHEDULE",
    "TOLERANCE",
    "Result",
    "category",
    "check_family",
    "difference",
    "packed_logits",
    "prompts",
    "stock_logits",
]

Status = Literal["passed", "refused", "failed", "skipped"]

TOLERANCE = 1e-5
"""Largest difference of a logit, in standard deviations of the family's logits (which are close to 1)."""

SCHEDULE: tuple[tuple[int, int, int], ...] = ((11, 3, 12), (1, 1, 8), *((1, 1, 1),) * 5)
"""New tokens of each of three sequences in each forward: unequal prompts (the third in two chunks), then decodes."""

LENGTHS: tuple[int, ...] = tuple(sum(column) for column in zip(*SCHEDULE, strict=True))
_REACH = 1e-2
"""Changing the first token must move later logits by this much, or the comparison would say nothing about attention."""


_CATEGORIES = {
    "keep a recurrent state": "recurrent state",
    "keeps more than keys and values": "indexer",
    "keeps no cache of keys and values": "no KV cache",
    "cross-attention": "cross-attention",
    "through transformers' attention interface": "own attention code",
    "numbers positions in its own way": "own positions",
    "an attention mask of its own": "own mask",
    "attends more than once in a layer": "attends twice",
    "does not say how many layers": "unreadable config",
}
"""What a refusal says -> its kind. The first that fits counts."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a family. ``kind``: of a refusal or skip, ``reason``: its text (or why more than 1e-5 is granted).

    ``layers``: its kinds of layers. ``error``: largest difference of a logit from stock, in standard deviations;
    ``split``: the same between whole and chunked prefill. None where nothing was compared.
    """

    family: str
    status: Status
    kind: str = ""
    reason: str = ""
    layers: str = ""
    error: float | None = None
    split: float | None = None


def check_family(name: str) -> Result:
    """Builds a tiny random model of a family and compares it with its stock path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say about tiny configs is of no interest here
        return _check(name)


def _check(name: str) -> Result:
    if name in NOT_DECODERS:
        return Result(name, "skipped", "not a decoder", NOT_DECODERS[name])
    try:
        model = build_model(tiny_config(name))
    except ImportError as error:
        return Result(name, "skipped", "needs a package", _line(error).partition(".")[0])
    layers = ""
    try:
        geometry = Geometry.from_config(model.config)
        layers = describe(geometry)
        check_model(model, geometry)
    except KVFoldError as error:
        reason = _line(error)
        return Result(name, "refused", category(reason), reason, layers)
    tokens = prompts()
    wanted = [stock_logits(model, ids) for ids in tokens]
    stepped = wanted
    if name in STEPWISE:
        fresh = [build_model(tiny_config(name)) for _ in tokens]
        stepped = [stepped_logits(fresh[i], ids, [step[i] for step in SCHEDULE]) for i, ids in enumerate(tokens)]
    chunked = packed_logits(model, geometry, tokens, SCHEDULE, block_size=8)
    whole = packed_logits(model, geometry, tokens, [LENGTHS], block_size=32)
    error = max(difference(chunked, stepped), difference(whole, wanted))
    split = None if name in STEPWISE else difference(chunked, whole)
    tolerance, why = TOLERANCES.get(name, (TOLERANCE, ""))
    changed = tokens[2].clone()
    changed[0] = (changed[0] + 1) % VOCAB
    reach = difference([stock_logits(model, changed)[1:]], [wanted[2][1:]])
    if not max(error, split or 0.0) <= tolerance:
        why = f"logits differ from stock by {error:.1e}, of whole and chunked prefill by {split or 0:.1e}"
        return Result(name, "failed", "differs", why, layers, error, split)
    if not reach >= _REACH:
        why = f"attention hardly matters to these weights ({reach:.1e})"
        return Result(name, "failed", "no reach", why, layers, error, split)
    return Result(name, "passed", "", why, layers, error, split)


def category(reason: str) -> str:
    """The kind of a refusal, from the text of its error; ``other`` if it is none that is known."""
    return next((kind for text, kind in _CATEGORIES.items() if text in reason), "other")


def prompts() -> list[Tensor]:
    """Three random sequences of unequal lengths ``[n]``; no special tokens."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]


def stock_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits ``[n, V]`` of one plain forward over ``ids [n]``."""
    with torch.inference_mode():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def stepped_logits(model: PreTrainedModel, ids: Tensor, counts: Sequence[int]) -> Tensor:
    """Logits ``[n, V]`` of a fresh model's stock forwards, ``counts`` tokens at a time, with transformers' own
    cache.
    """
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        parts = [
            model(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0]
            for part in ids.split(list(counts))
        ]
    return torch.cat(parts)


def packed_logits(
    model: PreTrainedModel,
    geometry: Geometry,
    tokens: Sequence[Tensor],
    schedule: Sequence[Sequence[int]],
    *,
    block_size: int,
) -> list[Tensor]:
    """Logits ``[n, V]`` of every token, from packed forwards of ``schedule[step][sequence]`` new tokens each."""
    recipe = Recipe(block_size=block_size)
    cache = PagedCache(geometry, recipe, dtype=torch.float32, prefix_caching=False)
    packed = PackedModel(model)
    sequences = [cache.create() for _ in tokens]
    parts: list[list[Tensor]] = [[] for _ in tokens]
    done = [0] * len(tokens)
    try:
        for counts in schedule:
            step = cache.begin([SequenceWork(seq, n) for seq, n in zip(sequences, counts, strict=True)])
            spans = [torch.arange(start, start + n) for start, n in zip(done, counts, strict=True)]
            ids = torch.cat([ids[span] for ids, span in zip(tokens, spans, strict=True)])
            logits = packed.forward(step, ids, torch.cat(spans), torch.arange(ids.numel()), counts)
            cache.commit(step)
            for part, rows in zip(parts, logits.split(list(counts)), strict=True):
                part.append(rows)
            done = [start + n for start, n in zip(done, counts, strict=True)]
    finally:
        packed.release()
    return [torch.cat(part) for part in parts]


def describe(geometry: Geometry) -> str:
    """The kinds of a model's layers and their number: ``3 sliding, 1 full; soft-cap``."""
    kinds = Counter("shared" if layer.source != layer.index else layer.kind for layer in geometry.layers)
    traits = [
        *(["soft-cap"] if any(layer.softcap for layer in geometry.layers) else []),
        *(["sink logits"] if any(layer.sinks for layer in geometry.layers) else []),
    ]
    return "; ".join([", ".join(f"{count} {kind}" for kind, count in kinds.items()), *traits])


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference of a logit in standard deviations of the wanted ones; infinite for NaN."""
    scale = float(torch.cat(list(wanted)).std().clamp_min(1e-6))
    worst = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return worst / scale if worst == worst else float("inf")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
