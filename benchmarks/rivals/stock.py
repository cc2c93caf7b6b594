"""A stock model with a cache of transformers: the reference, and what all rivals have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from benchmarks.rivals.held import held_bytes
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvfold.quality.contestant import SCORED_TOKENS, Forced

__all__ = ["FullCache", "Reader", "Rival"]


class Reader:
    """One sequence on its way through a model: what it has read lies in ``cache``.

    Positions are counted here, for a cache that drops tokens does not know them.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self.model = model
        self.cache = cache
        self.position = 0

    def read(self, tokens: Sequence[int], *, keep: int = 0, **more: Tensor) -> Tensor:
        """Logits ``[T, V]`` behind the tokens; only the last ``keep`` of them, if that is not 0."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        positions = torch.arange(self.position, self.position + len(tokens), device=ids.device)
        out = self.model(
            input_ids=ids,
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            **more,
        )
        self.position += len(tokens)
        logits: Tensor = out.logits[0]
        return logits


class Rival:
    """What a rival says about itself, and the loops that all share. Subclasses say what the cache is."""

    def __init__(self, model: PreTrainedModel, name: str, family: str, bits_per_value: float | None) -> None:
        self.model = model
        self.name = name
        self.family = family
        self.bits_per_value = bits_per_value

    # -- what a subclass may change

    def new_cache(self) -> Cache:
        """An empty cache."""
        return DynamicCache(config=self.model.config)

    def begin(self, prompt: Sequence[int], context: int | None = None) -> tuple[Reader, Tensor]:
        """Reads the prompt in one forward, or its first ``context`` tokens in one and the rest behind what is kept of
        them; the last logits.
        """
        reader = Reader(self.model, self.new_cache())
        logits = reader.read(prompt[:context], keep=1)
        return reader, self.rest(reader, prompt, context, logits)

    def rest(self, reader: Reader, prompt: Sequence[int], context: int | None, logits: Tensor) -> Tensor:
        """Reads what follows the context; the last logits, which are of ``logits`` if nothing does."""
        if context is not None and context < len(prompt):
            logits = reader.read(prompt[context:], keep=1)
        return logits[-1]

    def cuts(self, start: int, stop: int) -> Iterator[int]:
        """Where the forwards end that read ``start`` to ``stop``."""
        yield from range(start + SCORED_TOKENS, stop, SCORED_TOKENS)
        yield stop

    def end(self) -> None:
        """A sequence is over."""

    # -- the protocol

    @torch.inference_mode()
    def force(self, tokens: Sequence[int], *, score_from: int, decode_steps: int = 0) -> Forced:
        """See `kvfold.quality.contestant.Contestant`."""
        try:
            reader, _ = self.begin(tokens[:score_from])
            logits, start = [], score_from
            for stop in self.cuts(score_from, len(tokens)):
                logits.append(reader.read(tokens[start:stop]).float())
                start = stop
            kv_bytes = held_bytes(reader.cache)
            speed = _decode_speed(reader, int(logits[-1][-1].argmax()), decode_steps)
        finally:
            self.end()
        return Forced(logits=torch.cat(logits), kv_bytes=kv_bytes, decode_tok_s=speed)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop: frozenset[int],
        contexts: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """See `kvfold.quality.contestant.Contestant`; one prompt after the other."""
        parts = contexts if contexts is not None else [None] * len(prompts)
        return [self._continue(prompt, part, max_tokens, stop) for prompt, part in zip(prompts, parts, strict=True)]

    def close(self) -> None:
        """Nothing is held between calls."""

    def _continue(self, prompt: Sequence[int], context: int | None, max_tokens: int, stop: frozenset[int]) -> list[int]:
        said: list[int] = []
        try:
            reader, logits = self.begin(prompt, context)
            while (token := int(logits.argmax())) not in stop:
                said.append(token)
                if len(said) == max_tokens:
                    break
                logits = reader.read([token])[-1]
        finally:
            self.end()
        return said


class FullCache(Rival):
    """transformers' own full cache: the reference that rivals are compared with."""

    def __init__(self, model: PreTrainedModel, name: str = "transformers-full") -> None:
        super().__init__(model, name, "transformers", 8.0 * model.dtype.itemsize)


def _decode_speed(reader: Reader, token: int, steps: int) -> float:
    """Tokens per second of greedy steps, from the median step, as kvfold's own are timed."""
    times: list[float] = []
    for _ in range(steps):
        begin = time.perf_counter()
        token = int(reader.read([token])[-1].argmax())
        times.append(time.perf_counter() - begin)
    return 1.0 / sorted(times)[steps // 2] if times else 0.0
