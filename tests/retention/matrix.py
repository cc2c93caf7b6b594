"""Every method on every kind of model and every width: it holds the laws, or it is refused with its reasons.

One function, `judge`, is both the matrix test and the source of ``docs/composition.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvfold.engine import Engine, SamplingParams
from kvfold.errors import UnsupportedError
from kvfold.geometry import Geometry
from kvfold.recipe import known_methods
from kvfold.retention.scorer import Scorer, TokenMap
from tests.conformance.families import VOCAB, build_model, tiny_config

__all__ = ["FAMILIES", "LAWS", "WORDS", "Verdict", "judge", "methods"]

FAMILIES: Mapping[str, str] = {
    "Llama": "llama",
    "Gemma 3 (sliding)": "gemma3_text",
    "gpt-oss (sinks, sliding)": "gpt_oss",
    "DeepSeek-V3 (MLA)": "deepseek_v3",
}
"""What a column is called -> the family of transformers it is a tiny random model of."""

WORDS = ("raw", "int8", "int4", "int2")
LAWS: Mapping[str, str] = {
    "all": "keeping or reading all gives the tokens of the plain recipe",
    "freed": "at most the share of blocks that was asked for is left, slack counted",
    "again": "the same requests give the same tokens again",
    "chunks": "whole and chunked prompts, alone and beside others, give the same tokens (`raw`, float32)",
    "prefix": "a shared prefix gives what a private one gives (`raw`, float32)",
    "forks": "completions of one prompt share what was kept, and part",
    "budget": "never more bytes than the budget",
    "idle": "when all has ended no block is referenced, and the books are in order",
}

_INNER = {"adakv": "snapkv", "criticalkv": "snapkv"}
_BUDGET = 400_000
_PROMPTS = (88, 61)
_GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a method, a family and a width: the reasons it was refused for, or the laws that do not hold."""

    refused: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


def methods() -> list[tuple[str, str]]:
    """(axis, word) of all methods there are."""
    return [(axis, word) for axis in ("retention", "retrieval") for word in known_methods(axis)]


@cache
def _model(family: str) -> PreTrainedModel:
    return build_model(tiny_config(FAMILIES[family]))


def _prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in _PROMPTS]


def _clause(axis: str, word: str, family: str, folder: Path, *, everything: bool) -> str:
    inner = [_INNER[word]] if word in _INNER else []
    if word in ("duo", "learned"):
        inner = [str(_file(word, family, folder))]
    if axis == "retention":
        return f"{word}({','.join([*inner, 'keep=1' if everything else 'keep=0.5'])})"
    return f"{word}({','.join([*inner, 'pages=64' if everything else 'pages=3'])})"


def _file(word: str, family: str, folder: Path) -> Path:
    """The file that a method brings along, made for the family's tiny model."""
    geometry = Geometry.from_config(_model(family).config)
    path = folder / f"{word}-{FAMILIES[family]}"
    if word == "duo":
        full = [layer for layer in geometry.layers if layer.stores and layer.window is None]
        gates = {str(x.index): [(x.index + head) % 3 / 2 for head in range(x.kv_heads)] for x in full}
        data = {"format": "kvfold-gates", "version": 1, "model_type": geometry.model_type, "gates": gates}
        path.write_text(json.dumps(data | {"sinks": 4, "recent": 8}), encoding="utf-8")
    else:
        full = [layer for layer in geometry.layers if layer.stores and layer.window is None]
        drawn = torch.Generator().manual_seed(0)
        maps = {
            x.index: TokenMap(torch.randn(x.kv_heads, geometry.hidden, generator=drawn), torch.zeros(x.kv_heads))
            for x in full
        }
        Scorer(str(path), geometry.model_type, maps).save(torch.float32, {})
    return path


def judge(axis: str, word: str, family: str, width: str, folder: Path) -> Verdict:
    """Runs everything there is to say about one cell. ``folder``: for files that methods bring along."""
    base = f"{width},block=4,recent=8"
    clause = _clause(axis, word, family, folder, everything=False)
    try:
        with _engine(family, f"{base}+{clause}"):
            pass
    except UnsupportedError as error:
        return Verdict(refused=tuple(error.reasons))
    everything = f"{base}+{_clause(axis, word, family, folder, everything=True)}"
    plain, whole = (_said(family, recipe, 512) for recipe in (base, everything))
    broken = [] if whole == plain else ["all"]
    broken += _broken(axis, family, f"{base}+{clause}", raw=width == "raw")
    return Verdict(broken=tuple(broken))


def _broken(axis: str, family: str, recipe: str, *, raw: bool) -> list[str]:
    broken = []
    prompts = _prompts()
    with _engine(family, recipe, caching=True) as engine:
        first = _texts(engine, prompts)
        stats = engine.stats()
        if axis == "retention" and (not stats["retention_runs"] or not _freed(stats)):
            broken.append("freed")
        second = _texts(engine, prompts)
        engine.generate(prompts, SamplingParams(n=2, seed=1, temperature=1.0, max_tokens=6), progress=False)
        if engine.stats()["kv_peak_bytes"] > _BUDGET:
            broken.append("budget")
        if not _idle(engine):
            broken.append("idle")
    if raw and second != first:
        broken.append("prefix")
    private = _said(family, recipe, 512)
    if private != _said(family, recipe, 512):
        broken.append("again")
    if raw and not (private == first == _said(family, recipe, 16) == _alone(family, recipe)):
        broken.append("chunks")
    return broken


def _freed(stats: Mapping[str, int | float]) -> bool:
    """Half of the tokens were asked for, and a block more may be there for what is left over."""
    runs = int(stats["retention_runs"])
    return stats["retention_blocks_after"] <= stats["retention_blocks_before"] / 2 + runs


def _engine(family: str, recipe: str, *, tokens: int = 512, caching: bool = False) -> Engine:
    return Engine(
        _model(family),
        recipe=recipe,
        kv_memory=_BUDGET,
        max_batched_tokens=tokens,
        max_sequences=8,
        prefix_caching=caching,
        check=False,
    )


def _texts(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(list(prompts), _GREEDY, progress=False)]


def _said(family: str, recipe: str, tokens: int) -> list[list[int]]:
    with _engine(family, recipe, tokens=tokens) as engine:
        return _texts(engine, _prompts())


def _alone(family: str, recipe: str) -> list[list[int]]:
    said = []
    for prompt in _prompts():
        with _engine(family, recipe) as engine:
            said += _texts(engine, [prompt])
    return said


def _idle(engine: Engine) -> bool:
    books = engine._runner.manager
    books.check()
    retainer = engine._runner.cache.retainer
    return books.bytes_in_use() == 0 and books.sequences() == () and (retainer is None or retainer.nbytes() == 0)
