"""Runs one planned step: reserve, one packed forward, commit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.cache import PagedCache, SequenceWork
from kvfold.errors import NumericsError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.memory.manager import CacheManager
from kvfold.packed import PackedModel, check_model
from kvfold.recipe import Recipe
from kvfold.replay import replay
from kvfold.retention.build import refusals
from kvfold.rotary import Lengths, RotaryLengths

__all__ = ["ModelRunner", "Ran", "SeqWork", "not_finite"]


@dataclass(frozen=True, slots=True)
class SeqWork:
    """New ``tokens`` of sequence ``seq``, the first at position ``start``; ``sample``: the last one's logits are
    wanted; ``watched``: retention will run on the sequence, after them or later. ``lengths``: what its rotary factors
    follow from (None: the tokens so far, and as its prompt those of its first item); only sequences of the same ones
    find its blocks under ``salt``, see `RotaryLengths.salted`.
    """

    seq: int
    tokens: Sequence[int]
    start: int
    salt: bytes
    sample: bool
    watched: bool = True
    lengths: Lengths | None = None


class Ran(NamedTuple):
    """What one forward gave: float32 ``logits [n, V]`` of the items that sample, and the places in the work of those
    whose logits are not finite (``broken``), sampled or not.
    """

    logits: Tensor
    broken: frozenset[int]


class ModelRunner:
    """A model on its paged cache. ``kv_memory``: bytes, a hard budget. Checks the model against its stock path
    first. ``instruction``: tokens that ask the model to repeat what it has read, for retention methods that watch that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        recipe: Recipe,
        kv_memory: int,
        prefix_caching: bool = True,
        check: bool = True,
        instruction: Sequence[int] = (),
    ) -> None:
        self.geometry = Geometry.from_config(model.config)
        if reasons := refusals(recipe, self.geometry, model):
            raise UnsupportedError(f"recipe {recipe} on {self.geometry.model_type}", reasons)
        if check:
            check_model(model, self.geometry)
        self.cache = PagedCache(
            self.geometry,
            recipe,
            dtype=model.dtype,
            device=model.device,
            kv_memory=kv_memory,
            fingerprint=hashlib.sha256(model.config.to_json_string().encode()).digest(),
            prefix_caching=prefix_caching,
        )
        self.model = model
        self._packed = PackedModel(model)
        self._instruction = tuple(instruction)
        self.rotary = RotaryLengths.of(model)
        """How the model's rotary factors depend on the length."""
        self._lengths: dict[int, Lengths] = {}  # of each sequence, where they matter

    @property
    def manager(self) -> CacheManager:
        """The books of the cache."""
        return self.cache.manager

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.cache.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.cache.dtype

    def create(self) -> int:
        """A new, empty sequence."""
        return self.cache.create()

    def adopt(self, seq: int, tokens: Sequence[int], salt: bytes, lengths: Lengths | None = None) -> int:
        """Attaches cached blocks that begin like ``tokens`` to the empty ``seq``; how many tokens they hold.
        ``lengths``: what its rotary factors follow from; None: those of a short sequence.
        """
        lengths = lengths or Lengths(0, 0)
        salt = self.rotary.salted(salt, lengths)
        hit = self.manager.match(tokens, salt)
        if hit:
            self.manager.adopt(seq, tokens, hit, salt)
            if self.rotary:
                self._lengths[seq] = lengths
        return hit

    def expect(self, seq: int, length: int) -> None:
        """A sequence is on its way to ``length`` tokens; see `CacheManager.expect`."""
        self.manager.expect(seq, length)

    def fork(self, seq: int) -> int:
        """A sequence that shares every block of ``seq``."""
        fork = self.cache.fork(seq)
        if seq in self._lengths:
            self._lengths[fork] = self._lengths[seq]
        return fork

    def free(self, seq: int) -> None:
        """Ends a sequence."""
        self._lengths.pop(seq, None)
        self.cache.free(seq)

    def retain(self, seq: int, tokens: Sequence[int], *, final: bool = False) -> bool:
        """Runs the recipe's retention on a sequence, which holds ``tokens``; whether anything was dropped. Otherwise as
        `PagedCache.retain`. RequestError if its method has the tokens repeated, and the model lacks positions for that.
        """
        retainer = self.cache.retainer
        if retainer is not None and retainer.method.replays and retainer.would_drop(seq):
            first, lengths = retainer.done_until(seq), self._lengths.get(seq)
            replay(self._packed, self.cache, seq, tokens, self._instruction, first=first, lengths=lengths)
        return self.cache.retain(seq, final=final)

    def release(self) -> None:
        """Takes everything off the model again."""
        self._packed.release()

    def execute(self, work: Sequence[SeqWork]) -> Tensor:
        """Runs ``work`` in one forward; float32 logits ``[n, V]`` of the items that sample, in order.

        Raises CacheFullError, with the cache as it was, if there is no room; any error of the forward leaves it so too.
        UnsupportedError if the stored keys of a sequence are rotated by other factors than its new ones would be.
        """
        return self.run(work).logits

    def run(self, work: Sequence[SeqWork]) -> Ran:
        """As :meth:`execute`, and which items went wrong."""
        ends = np.cumsum([len(item.tokens) for item in work])
        logits, finite = self._run(work, ends - 1, range(len(work)))
        broken = frozenset(np.flatnonzero(~finite).tolist())
        if all(item.sample for item in work):
            return Ran(logits, broken)
        return Ran(logits[[i for i, item in enumerate(work) if item.sample]], broken)

    def execute_all(self, item: SeqWork) -> Tensor:
        """Runs one item; the logits ``[len(item.tokens), V]`` of all its tokens. Otherwise as :meth:`execute`."""
        return self._run([item], np.arange(len(item.tokens)), [-1])[0]

    def _run(self, work: Sequence[SeqWork], keep: np.ndarray, last: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        """The logits of the rows ``keep``, and for each item whether those of its last token, row ``last`` of them, are
        finite: other sequences find its blocks only then.
        """
        lengths, salts = None, [item.salt for item in work]
        if self.rotary:
            lengths = [self._lengths_of(item) for item in work]
            salts = [self.rotary.salted(*pair) for pair in zip(salts, lengths, strict=True)]
        requests = [SequenceWork(item.seq, len(item.tokens), item.watched) for item in work]
        step = self.cache.begin(requests, check_finite=True)
        if any(item.start != r.start for item, r in zip(work, step.reservations, strict=True)):
            self.cache.abandon(step)
            raise ValueError("a work item does not start where its sequence ends")
        try:
            segments = [len(item.tokens) for item in work]
            tokens = np.concatenate([np.asarray(item.tokens, np.int64) for item in work])
            first = np.asarray([item.start for item in work]) - np.cumsum([0, *segments[:-1]])
            positions = np.arange(tokens.size) + np.repeat(first, segments)
            ids, at, rows = (torch.from_numpy(x).to(self.device) for x in (tokens, positions, keep))
            logits = self._packed.forward(step, ids, at, rows, segments, lengths).float()
            # Minus infinity says that a token is barred; if it is the highest, all are, or one is NaN.
            finite = logits[list(last)].amax(-1).isfinite().cpu().numpy()
            known = [item.tokens if good else None for item, good in zip(work, finite, strict=True)]
            self.cache.commit(step, known, salts)
        except BaseException:
            self.cache.abandon(step)
            raise
        if lengths is not None:
            self._lengths.update(zip((item.seq for item in work), lengths, strict=True))
        return logits, finite

    def _lengths_of(self, item: SeqWork) -> Lengths:
        held, end = self._lengths.get(item.seq), item.start + len(item.tokens)
        lengths = item.lengths
        if lengths is None:
            lengths = Lengths(end, end) if held is None else Lengths(held.prompt, max(held.known, end))
        if held is not None and self.rotary.key(held) != self.rotary.key(lengths):
            raise UnsupportedError(
                f"{len(item.tokens)} tokens from position {item.start} on",
                why="the keys before them are rotated by other rotary factors, those of a sequence of another length",
                hint="say how long the sequence will be, or read it again from its start",
            )
        return lengths


def not_finite(what: str, place: str) -> NumericsError:
    """What is said when ``what`` cannot go on because the model's logits at ``place`` are NaN or infinite."""
    return NumericsError(
        f"{what}: the model's logits are not finite",
        why=f"NaN or infinity at {place}",
        hint="check the weights, or load the model in a wider dtype",
    )
