"""The harness' options of a generation, as sampling parameters. Nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvfold.engine.request import SamplingParams
from kvfold.errors import RequestError

__all__ = ["sampling_params"]

# Names of one thing; the first that is set counts, as in the harness.
_MOST: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LEAST: Final = ("min_tokens", "min_new_tokens")
_STOP: Final = ("until", "stop")
_SAME: Final = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
# Beam search and several answers to one request are not what kvfold does; the value that asks for neither is no harm.
_ONLY_ONE: Final = ("num_beams", "num_return_sequences")


def sampling_params(options: Mapping[str, Any], specials: Mapping[str, int], *, max_gen_toks: int) -> SamplingParams:
    """What ``options`` (a task's ``generation_kwargs``) ask for; RequestError for what kvfold does not know.

    ``specials``: ids of special tokens by their text. A stop string that is one of them becomes a stop token, since
    special tokens do not appear in the text. ``max_gen_toks``: where the options do not say.
    """
    rest = dict(options)
    most = _first(rest, _MOST)
    least = _first(rest, _LEAST)
    stops = _stops(_first(rest, _STOP))
    temperature = _temperature(rest.pop("do_sample", None), rest.pop("temperature", None))
    named = {name: rest.pop(name) for name in _SAME if rest.get(name) is not None}
    for name in _ONLY_ONE:
        if (value := rest.pop(name, 1)) != 1:
            raise RequestError(f"generation option {name}={value!r}", why="kvfold generates one answer, without beams")
    if unknown := [name for name, value in rest.items() if value is not None]:
        known = ", ".join(("until", "do_sample", "temperature", _MOST[0], _LEAST[0], *_SAME))
        raise RequestError(f"unknown generation option {', '.join(map(repr, unknown))}", hint=f"known: {known}")
    return SamplingParams(
        max_tokens=int(max_gen_toks if most is None else most),
        min_tokens=int(least or 0),
        temperature=temperature,
        stop=tuple(text for text in stops if text not in specials),
        stop_token_ids=tuple(specials[text] for text in stops if text in specials),
        **named,
    )


def _first(options: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of ``names`` that is set; all of them are taken out of ``options``."""
    values = [options.pop(name, None) for name in names]
    return next((value for value in values if value is not None), None)


def _stops(until: Any) -> list[str]:
    """The stop strings, in order, each once; an empty one means nothing."""
    texts = [until] if isinstance(until, str) else list(until or ())
    return list(dict.fromkeys(text for text in texts if text != ""))


def _temperature(do_sample: Any, temperature: Any) -> float:
    """Greedy unless the options ask for a draw: by ``do_sample``, or by a temperature where that is not said."""
    if do_sample is None:
        return float(temperature or 0.0)
    if not do_sample:
        return 0.0
    return 1.0 if temperature is None else float(temperature)
