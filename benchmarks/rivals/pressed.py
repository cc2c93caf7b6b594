"""kvpress: tokens dropped by a score, once, at the end of the prompt or of its context.

kvpress 0.5.5 was written for transformers before 5.3 and asks its hooks for ``cache_position``, which models no longer
pass on by themselves. Whatever a model is given by keyword reaches its attention layers, so the prompt's forward is
given it. kvpress's own pipeline is not used; what it does before and behind the forward is done here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from typing import Any, Final

import torch
from benchmarks.rivals.stock import Reader, Rival
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.quality.tasks import real_text
from kvfold.quality.tasks.text import passages_of

__all__ = ["HEADWISE", "PRESSES", "PressRival"]

PRESSES: Final[dict[str, Callable[[Any, float], Any]]] = {
    "random": lambda kvpress, ratio: kvpress.RandomPress(ratio),
    "knorm": lambda kvpress, ratio: kvpress.KnormPress(ratio),
    "streamingllm": lambda kvpress, ratio: kvpress.StreamingLLMPress(ratio),
    "observed-attention": lambda kvpress, ratio: kvpress.ObservedAttentionPress(ratio),
    "tova": lambda kvpress, ratio: kvpress.TOVAPress(ratio),
    "snapkv": lambda kvpress, ratio: kvpress.SnapKVPress(ratio),
    "pyramidkv": lambda kvpress, ratio: kvpress.PyramidKVPress(ratio),
    "keydiff": lambda kvpress, ratio: kvpress.KeyDiffPress(ratio),
    "expected-attention": lambda kvpress, ratio: kvpress.ExpectedAttentionPress(ratio),
    "criticalkv-snapkv": lambda kvpress, ratio: kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio)),
    "criticalkv-expected-attention": lambda kvpress, ratio: kvpress.CriticalKVPress(_plain_expected(kvpress, ratio)),
    "adakv-snapkv": lambda kvpress, ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "adakv-expected-attention": lambda kvpress, ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio)),
    "criticaladakv-snapkv": lambda kvpress, ratio: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio)),
    "criticaladakv-expected-attention": lambda kvpress, ratio: kvpress.CriticalAdaKVPress(
        _plain_expected(kvpress, ratio)
    ),
    "kvzip": lambda kvpress, ratio: kvpress.KVzipPress(ratio),
    "duo": lambda kvpress, ratio: kvpress.DuoAttentionPress(ratio, on_the_fly_scoring=True),
}
"""How a press is made of a compression ratio, by our name for it; all else as kvpress has it by default. ``duo``: the
ratio is the share of heads that see sinks and recent tokens alone, as in kvpress's own evaluation.
"""

HEADWISE: Final = frozenset(name for name in PRESSES if "ada" in name) | {"kvzip", "duo"}
"""Presses whose heads drop different numbers of tokens: kvpress masks these and frees nothing."""

_EAGER: Final = frozenset({"observed-attention"})
"""Presses that read the attention weights of the prompt's forward."""

_UNEVEN: Final = frozenset({"pyramidkv"})
"""Presses that leave layers of different lengths. transformers makes one mask for all layers, of the length of the
first one's cache, so that what follows has to go in token by token, which needs none.
"""

_PASSAGE_CHARACTERS: Final = 6000


class PressRival(Rival):
    """A press on the full cache of transformers. Compressed is the prompt, or its context; the rest stays whole.

    Without a context the press sees all of the prompt, a question at its end included. Head-wise presses only mask
    what they would drop, so their cache stays as large as the full one, and that is what is counted.
    """

    def __init__(self, model: PreTrainedModel, name: str, press: str, ratio: float) -> None:
        super().__init__(model, name, "kvpress", None)
        kvpress, self._wrapped = _kvpress()
        self._press = PRESSES[press](kvpress, ratio)
        self._eager, self._uneven = press in _EAGER, press in _UNEVEN
        self._stock: dict[str, Any] = {}

    def begin(self, prompt: Sequence[int], context: int | None = None) -> tuple[Reader, Tensor]:
        """Reads the prompt, or its context, in one forward under the press; then the rest, as it comes."""
        name = self.model.config._attn_implementation
        if name in self._wrapped:  # "eager" is not; head-wise presses refuse it themselves
            self._stock = {name: ALL_ATTENTION_FUNCTIONS[name]}
            ALL_ATTENTION_FUNCTIONS[name] = self._wrapped[name]
        reader, pressed = Reader(self.model, self.new_cache()), prompt[:context]
        with ExitStack() as stack:
            stack.enter_context(_own_texts())
            # What a press draws at random is the same for the same prompt.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(zlib.crc32(repr(list(pressed)).encode()))
            if self._eager:
                stack.enter_context(_eager(self.model))
            stack.enter_context(self._press(self.model))
            places = torch.arange(len(pressed), device=self.model.device)
            logits = reader.read(pressed, keep=1, cache_position=places)
        return reader, self.rest(reader, prompt, context, logits)

    def rest(self, reader: Reader, prompt: Sequence[int], context: int | None, logits: Tensor) -> Tensor:
        """What follows the context, in one forward where layers are of one length."""
        if not self._uneven or context is None:
            return super().rest(reader, prompt, context, logits)
        for token in prompt[context:]:
            logits = reader.read([token])
        return logits[-1]

    def cuts(self, start: int, stop: int) -> Iterator[int]:
        """As for all rivals, and token by token where layers are of different lengths."""
        return iter(range(start + 1, stop + 1)) if self._uneven else super().cuts(start, stop)

    def end(self) -> None:
        """The model is as it was: its attention, and no masks of a head-wise press."""
        _restore(self._stock)
        self._stock = {}
        for module in self.model.modules():
            vars(module).pop("masked_key_indices", None)


def _plain_expected(kvpress: Any, ratio: float) -> Any:
    """Expected attention as it is given to CriticalKV, which weighs by values itself."""
    return kvpress.ExpectedAttentionPress(ratio, use_vnorm=False)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """The model gives the weights of its attention."""
    stock = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = stock


class _Texts:
    """Stands in for BookSum, from which kvpress draws the texts that find duo's heads: no network is needed."""

    def to_pandas(self) -> Any:
        chapters = passages_of(real_text(), _PASSAGE_CHARACTERS)
        return import_module("pandas").DataFrame({"chapter": [text[:_PASSAGE_CHARACTERS] for text in chapters]})


@contextmanager
def _own_texts() -> Iterator[None]:
    """kvpress finds our texts where it would load a data set."""
    module: Any = import_module("kvpress.presses.duo_attention_press")
    stock = module.load_dataset
    module.load_dataset = lambda *_, **__: _Texts()
    try:
        yield
    finally:
        module.load_dataset = stock


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
