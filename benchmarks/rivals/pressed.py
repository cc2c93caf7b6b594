"""kvpress: tokens dropped by a score, once, at the end of the prompt.

kvpress 0.5.5 was written for transformers before 5.3 and asks its hooks for ``cache_position``, which models no longer
pass on by themselves. Whatever a model is given by keyword reaches its attention layers, so the prompt's forward is
given it. kvpress's own pipeline is not used; what it does before and behind the forward is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Final

import torch
from benchmarks.rivals.stock import Reader, Rival
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["PRESSES", "PressRival"]

PRESSES: Final[dict[str, Callable[[Any, float], Any]]] = {
    "knorm": lambda kvpress, ratio: kvpress.KnormPress(ratio),
    "snapkv": lambda kvpress, ratio: kvpress.SnapKVPress(ratio),
    "expected-attention": lambda kvpress, ratio: kvpress.ExpectedAttentionPress(ratio),
    "streamingllm": lambda kvpress, ratio: kvpress.StreamingLLMPress(ratio),
    "tova": lambda kvpress, ratio: kvpress.TOVAPress(ratio),
    "keydiff": lambda kvpress, ratio: kvpress.KeyDiffPress(ratio),
    "adakv-snapkv": lambda kvpress, ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
}
"""How a press is made of a compression ratio, by our name for it; all else as kvpress has it by default."""


class PressRival(Rival):
    """A press on the full cache of transformers. Compressed is the prompt; what is generated stays whole.

    The press sees all of the prompt, a question at its end included. Head-wise presses (AdaKV) only mask what they
    would drop, so their cache stays as large as the full one, and that is what is counted.
    """

    def __init__(self, model: PreTrainedModel, name: str, press: str, ratio: float) -> None:
        super().__init__(model, name, "kvpress", None)
        kvpress, self._wrapped = _kvpress()
        self._press = PRESSES[press](kvpress, ratio)
        self._stock: dict[str, Any] = {}

    def begin(self, prompt: Sequence[int]) -> tuple[Reader, Tensor]:
        """Reads the prompt in one forward under the press."""
        name = self.model.config._attn_implementation
        if name in self._wrapped:  # "eager" is not; head-wise presses refuse it themselves
            self._stock = {name: ALL_ATTENTION_FUNCTIONS[name]}
            ALL_ATTENTION_FUNCTIONS[name] = self._wrapped[name]
        reader = Reader(self.model, self.new_cache())
        with self._press(self.model):
            logits = reader.read(prompt, keep=1, cache_position=torch.arange(len(prompt), device=self.model.device))
        return reader, logits[-1]

    def end(self) -> None:
        """The model is as it was: its attention, and no masks of a head-wise press."""
        _restore(self._stock)
        self._stock = {}
        for module in self.model.modules():
            vars(module).pop("masked_key_indices", None)


def _restore(functions: dict[str, Any]) -> None:
    """Makes these transformers' attention functions again."""
    for name, function in functions.items():
        if ALL_ATTENTION_FUNCTIONS[name] is not function:
            del ALL_ATTENTION_FUNCTIONS[name]  # what was set last; a registered function comes to light again
        if ALL_ATTENTION_FUNCTIONS.get(name) is not function:
            ALL_ATTENTION_FUNCTIONS[name] = function


@cache
def _kvpress() -> tuple[Any, dict[str, Any]]:
    """kvpress, and its versions of transformers' attention functions.

    Importing it wraps those functions for the whole process. Here that is undone, so that nobody else's figures are
    taken through the wrapper.
    """
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    kvpress = import_module("kvpress")

    wrapped = dict(ALL_ATTENTION_FUNCTIONS.items())
    _restore(before)
    return kvpress, wrapped
