"""What all codecs are measured by: prompts that are read exactly and then folded, and the tokens that follow.

The blocks that the runtime would seal (behind the sinks, outside the recent window) are replaced by what a codec makes
of them; the rest of the passage is then run over that cache, and its next-token distributions are compared with those
over the exact one. Codecs are simulated in float32, which is what lets one loop compare all of them; ``kvfold eval``
measures recipes in the runtime itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvfold.errors import UnsupportedError
from kvfold.formats import sealed_until, sink_blocks
from kvfold.geometry import Geometry
from kvfold.quality.tasks import heldout_text, make_sample

__all__ = [
    "PROMPT",
    "SCORED",
    "Fold",
    "Passage",
    "Prompted",
    "Score",
    "build_passages",
    "check_model",
    "prompt",
    "score",
]

Fold = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys ``[H, T, D]``, values ``[H, T, D]``) -> the same, as they are read back."""

PROMPT: Final = 1792
SCORED: Final = 256
_BLOCK, _SINKS, _RECENT = 32, 32, 64
_TASKS: Final = ("kv", "niah_multiquery", "niah_multikey", "vt")


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens; those before ``cut`` are the prompt, all others are scored."""

    kind: Literal["text", "recall"]
    tokens: tuple[int, ...]
    cut: int


@dataclass(frozen=True, slots=True)
class Prompted:
    """A passage with the exact cache of its prompt (keys and values ``[H, T, D]`` of each layer), and the exact
    log-probabilities ``[n, V]`` after each of its ``n`` scored tokens.
    """

    passage: Passage
    cache: tuple[tuple[Tensor, Tensor], ...]
    exact: Tensor


@dataclass(frozen=True, slots=True)
class Score:
    """Mean KL divergence from the exact cache, in nats, on text and on answers; share of equal first choices, text."""

    text_kl: float
    recall_kl: float
    top1: float


def check_model(model: PreTrainedModel) -> None:
    """UnsupportedError for a model whose cache is not the plain one of every layer, all alike."""
    layers = Geometry.from_config(model.config).layers
    shapes = {(layer.kind, layer.stores, layer.kv_heads, layer.k_dim, layer.v_dim) for layer in layers}
    if len(shapes) != 1 or layers[0].kind != "full" or layers[0].k_dim != layers[0].v_dim:
        raise UnsupportedError("the table of codecs", why="it takes models whose layers are all full and alike")


def build_passages(tokenizer: PreTrainedTokenizerBase, *, windows: int, questions: int, seed: int) -> list[Passage]:
    """``windows`` passages of held-out text, evenly spread, and ``questions`` of each task with their answers."""
    ids = _encode(tokenizer, heldout_text())
    length = PROMPT + SCORED
    step = (len(ids) - length) // windows
    starts = [i * step + seed % max(1, step) for i in range(windows)]
    found = [Passage("text", tuple(ids[start : start + length]), PROMPT) for start in starts]
    count = lru_cache(1 << 14)(lambda text: len(_encode(tokenizer, text)))
    asked = [(task, 1000 * seed + i) for task in _TASKS for i in range(questions)]
    return found + [_question(tokenizer, count, task, i) for task, i in asked]


def _question(tokenizer: PreTrainedTokenizerBase, count_tokens: Callable[[str], int], task: str, seed: int) -> Passage:
    sample = make_sample(task, seed, PROMPT + SCORED, count_tokens)
    asked, answered = f"{sample.prompt}\n", f"{sample.prompt}\n{sample.answer}"
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": sample.prompt}]
        asked = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        answered = asked + sample.answer
    before, tokens = _encode(tokenizer, asked), _encode(tokenizer, answered)
    # The last token of the question is the first that is read over the folded cache: it says the answer's first.
    return Passage("recall", tuple(tokens[:-1]), len(before) - 1)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@torch.inference_mode()
def prompt(model: PreTrainedModel, passage: Passage) -> Prompted:
    """Reads a passage exactly, once for all codecs."""
    ids = torch.tensor([passage.tokens], device=model.device)
    layers = model(ids[:, : passage.cut], use_cache=True).past_key_values.layers
    cache = tuple((layer.keys[0], layer.values[0]) for layer in layers)
    return Prompted(passage, cache, _continue(model, passage, cache))


@torch.inference_mode()
def score(model: PreTrainedModel, prompted: Sequence[Prompted], fold: Fold) -> Score:
    """What a codec costs. Means are over tokens of text, and over tokens of answers."""
    kl: dict[str, list[Tensor]] = {"text": [], "recall": []}
    agree: list[Tensor] = []
    for each in prompted:
        found = _continue(model, each.passage, [_folded(fold, i, *kv) for i, kv in enumerate(each.cache)])
        kl[each.passage.kind].append((each.exact.exp() * (each.exact - found)).sum(-1))
        if each.passage.kind == "text":
            agree.append((each.exact.argmax(-1) == found.argmax(-1)).double())
    text, recall = (float(torch.cat(parts).double().mean()) if parts else float("nan") for parts in kl.values())
    return Score(text, recall, float(torch.cat(agree).mean()))


def _folded(fold: Fold, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    start = sink_blocks(_SINKS, _BLOCK) * _BLOCK
    end = sealed_until(k.shape[1], _BLOCK, _SINKS, _RECENT) * _BLOCK
    new = fold(layer, k[:, start:end], v[:, start:end])
    k, v = (torch.cat((x[:, :start], y, x[:, end:]), 1) for x, y in zip((k, v), new, strict=True))
    return k, v


def _continue(model: PreTrainedModel, passage: Passage, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Log-probabilities ``[n, V]`` after the tokens from the cut on, over the given cache of those before."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(kv):
        cache.update(k[None], v[None], layer)
    rest = torch.tensor([passage.tokens[passage.cut :]], device=model.device)
    logits: Tensor = model(rest, past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1)
