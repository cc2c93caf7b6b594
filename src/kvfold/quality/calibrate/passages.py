"""What a model is calibrated on: a text of the user's, or a mixture that every Python installation carries."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from kvfold.errors import RequestError
from kvfold.quality.tasks.samples import make_sample
from kvfold.quality.tasks.text import is_heldout_file, library_files, real_text

__all__ = ["calibration_passages", "task_passages"]

_TASKS = ("kv", "niah_multiquery", "vt", "copy", "niah_multikey")


def calibration_passages(
    tokenizer: PreTrainedTokenizerBase, *, text: str | None, tokens: int, length: int, seed: int
) -> list[list[int]]:
    """``tokens`` tokens in passages of ``length`` and, as many tokens, of half of it, spread evenly over ``text``.

    Without a text: Python's documentation, sources of its library (none that evaluations use), and texts to look things
    up in, in equal parts. RequestError for a text shorter than a passage.
    """
    count = max(1, tokens // length)
    encode = _encoder(tokenizer)
    if text is not None:
        return _with_halves(_windows(encode(text), count, length))
    sources = [source for name, source in library_files() if not is_heldout_file(name)]
    random.Random(seed).shuffle(sources)
    third = -(-count // 3)
    # Ten characters are more than a token nearly everywhere, so that enough remains.
    wanted = 10 * length * third
    prose = _windows(encode(real_text()[: 4 * wanted]), third, length)
    code = _windows(encode("\n\n".join(sources)[: 4 * wanted]), third, length)
    asked = task_passages(tokenizer, count=third, length=length, seed=seed)
    # Taken in turns, so that any number of passages is as mixed as it can be.
    return _with_halves([passage for group in zip(code, asked, prose, strict=True) for passage in group][:count])


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    return lambda part: list(tokenizer.encode(part, add_special_tokens=False, verbose=False))


def task_passages(tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int) -> list[list[int]]:
    """``count`` texts of about ``length`` tokens to look things up in, with a question and its answer; none of the keys
    that evaluations use.
    """
    return [_question(tokenizer, i, length, seed) for i in range(count)]


def _windows(ids: list[int], count: int, length: int) -> list[list[int]]:
    if len(ids) < length:
        raise RequestError(
            f"a text of {len(ids)} tokens to calibrate on",
            why=f"passages take {length}",
            hint="give a longer text, or a shorter --length",
        )
    step = (len(ids) - length) // count
    return [ids[i * step : i * step + length] for i in range(count)]


def _with_halves(passages: list[list[int]]) -> list[list[int]]:
    """Every second passage as two of half its length: keys at early positions are read in every context."""
    out: list[list[int]] = []
    for index, passage in enumerate(passages):
        half = len(passage) // 2
        out += [passage] if index % 2 == 0 else [passage[:half], passage[half:]]
    return out


def _question(tokenizer: PreTrainedTokenizerBase, index: int, length: int, seed: int) -> list[int]:
    encode = _encoder(tokenizer)
    sample = make_sample(
        _TASKS[index % len(_TASKS)], seed * 1000 + index, length - 16, lambda part: len(encode(part)), split="train"
    )
    if not tokenizer.chat_template:
        return encode(f"{sample.prompt}\n{sample.answer}\n")[:length]
    turns = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.answer}]
    return encode(str(tokenizer.apply_chat_template(turns, tokenize=False)))[:length]
