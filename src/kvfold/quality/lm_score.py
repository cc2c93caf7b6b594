"""Log-likelihoods of given continuations, read from the cache as it is stored.

The prompt goes in as the engine takes it, in chunks of `PREFILL_TOKENS`, and retention runs at its end. Its last token
and the continuation follow as `kvfold.quality.forwards` says, so that every scored position attends to what the recipe
has made of its past, the first included. Prompts that begin alike share whole chunks, and continuations of one prompt
share all of it: by forks, which hold the same stored bits, so a score does not depend on what else was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.errors import CacheFullError, NumericsError
from kvfold.quality.forwards import forwards
from kvfold.rotary import Lengths

__all__ = ["PREFILL_TOKENS", "Likelihood", "Scorer", "Window", "cut"]

PREFILL_TOKENS: Final = 512
"""Tokens of one forward while a prompt goes in: what the engine takes in one step by default."""

T = TypeVar("T")


class Likelihood(NamedTuple):
    """Sum of the continuation's log-probabilities (nats), and whether each of its tokens is the likeliest one."""

    logprob: float
    greedy: bool


class Window(NamedTuple):
    """One score to be had: ``prompt`` goes in first, then ``inputs``, which predict ``targets``, one each."""

    prompt: tuple[int, ...]
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class _Kept(NamedTuple):
    """The first ``length`` tokens of a prompt, in a sequence of their own."""

    length: int
    seq: int


def cut(context: Sequence[int], continuation: Sequence[int], limit: int) -> Window:
    """The window that scores ``continuation`` behind as much of ``context`` as ``limit`` inputs leave room for, cut
    from the left. Neither may be empty, and the continuation not longer than ``limit``.
    """
    tokens = (*context, *continuation)[-(limit + 1) :]
    split = len(tokens) - len(continuation) - 1
    return Window(tokens[:split], tokens[split:-1], tuple(continuation))


class Scorer:
    """Scores windows on a runner, which it has to itself meanwhile."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._kept: list[_Kept] = []  # each begins like the one after it
        self._recipe = runner.cache.recipe
        self._rule = self._recipe.rule
        self._chunked = self._rule is not None and self._rule.chunk > 0
        self._lengths = Lengths.whole(0)  # what the rotary factors of the windows being scored follow from

    def score(self, windows: Sequence[Window]) -> Iterator[tuple[int, Likelihood]]:
        """Each window's place in ``windows`` with its likelihood, as they come. NumericsError for logits that are not
        finite, CacheFullError if a window does not fit.
        """
        lengths = [Lengths.whole(len(window.prompt) + len(window.inputs)) for window in windows]
        keys = [self._runner.rotary.key(each) for each in lengths]
        for key in sorted(set(keys)):  # windows share keys and values only under the same rotary factors
            places = [i for i, each in enumerate(keys) if each == key]
            self._lengths = lengths[places[0]]
            yield from self._score(windows, places)

    def _score(self, windows: Sequence[Window], places: Sequence[int]) -> Iterator[tuple[int, Likelihood]]:
        order = sorted(places, key=lambda i: (windows[i].prompt, windows[i].inputs))
        groups = [list(group) for _, group in groupby(order, key=lambda i: windows[i].prompt)]
        prompts = [windows[group[0]].prompt for group in groups]
        shared = [0, *(_common(*pair) for pair in pairwise(prompts)), 0]  # with the prompt before
        try:
            for i, group in enumerate(groups):
                self._forget(shared[i])
                # With points of retention inside a prompt, its chunks depend on where it ends.
                keep = 0 if self._chunked else shared[i + 1] // PREFILL_TOKENS * PREFILL_TOKENS
                seq = self._prefill(prompts[i], keep=keep)
                try:
                    yield from self._continue(seq, windows, group)
                finally:
                    self._runner.free(seq)
        finally:
            self._forget(0)

    def _prefill(self, prompt: Sequence[int], *, keep: int) -> int:
        """A sequence that holds ``prompt``; its first ``keep`` tokens are kept for the prompts to come."""
        length, seq = self._begin()
        try:
            whole = len(prompt)
            for start, stop in forwards(self._recipe, whole, prompt=whole, prefill=PREFILL_TOKENS, start=length):
                work = [self._work(seq, prompt[start:stop], start, whole, sample=False)]
                self._with_room(partial(self._runner.execute, work))
                if stop == keep:
                    self._kept.append(_Kept(keep, self._fork(seq)))
                self._retain(seq, prompt[:stop], start, whole)
            if length == whole > 0:  # all of it was kept, as it was before retention
                self._retain(seq, prompt, whole - 1, whole)
        except BaseException:
            self._runner.free(seq)
            raise
        return seq

    def _begin(self) -> tuple[int, int]:
        """How many tokens are there already, and a new sequence that holds them."""
        if self._kept:
            try:
                return self._kept[-1].length, self._runner.fork(self._kept[-1].seq)
            except CacheFullError:
                self._forget(0)
        return 0, self._runner.create()

    def _continue(self, seq: int, windows: Sequence[Window], group: Sequence[int]) -> Iterator[tuple[int, Likelihood]]:
        """Scores of the windows ``group``, whose common prompt lies in ``seq``; equal inputs run once."""
        length = len(windows[group[0]].prompt)
        for inputs, members in groupby(group, key=lambda i: windows[i].inputs):
            fork = self._fork(seq)
            try:
                logits = torch.cat(list(self._feed(fork, (*windows[group[0]].prompt, *inputs), length)))
            finally:
                self._runner.free(fork)
            for i in members:
                yield i, _likelihood(logits, windows[i].targets)

    def _feed(self, seq: int, tokens: Sequence[int], prompt: int) -> Iterator[Tensor]:
        """The logits of ``tokens`` from ``prompt`` on; those before are in ``seq``."""
        length = len(tokens)
        for start, stop in forwards(self._recipe, length, prompt=prompt, prefill=PREFILL_TOKENS, start=prompt):
            work = self._work(seq, tokens[start:stop], start, prompt, sample=True)
            yield self._with_room(partial(self._runner.execute_all, work))
            if stop < length:
                self._retain(seq, tokens[:stop], start, prompt)

    def _work(self, seq: int, tokens: Sequence[int], start: int, prompt: int, *, sample: bool) -> SeqWork:
        watched = self._rule is not None and self._rule.next_point(start, prompt) is not None
        lengths = self._lengths
        return SeqWork(seq=seq, tokens=tokens, start=start, salt=b"", sample=sample, watched=watched, lengths=lengths)

    def _retain(self, seq: int, tokens: Sequence[int], start: int, prompt: int) -> None:
        """Runs retention if ``tokens``, the last of them read by a forward from ``start`` on, end at a point of it."""
        rule, length = self._rule, len(tokens)
        if rule is not None and rule.next_point(start, prompt) == length:
            final = not rule.every and length >= prompt
            self._with_room(partial(self._runner.retain, seq, tokens, final=final))

    def _fork(self, seq: int) -> int:
        return self._with_room(partial(self._runner.fork, seq))

    def _with_room(self, act: Callable[[], T]) -> T:
        """What ``act`` returns; what is kept for later gives way if there is no room."""
        try:
            return act()
        except CacheFullError:
            if not self._kept:
                raise
            self._forget(0)
            return act()

    def _forget(self, length: int) -> None:
        """Frees what is kept beyond the first ``length`` tokens."""
        while self._kept and self._kept[-1].length > length:
            self._runner.free(self._kept.pop().seq)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two prompts share at their beginning."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _likelihood(logits: Tensor, targets: Sequence[int]) -> Likelihood:
    """``logits [N, V]`` against ``targets [N]``."""
    if not bool(torch.isfinite(logits).all()):
        raise NumericsError(
            "cannot score a continuation",
            why="the model's logits are not finite",
            hint="check the weights, or load the model in a wider dtype",
        )
    ids = torch.tensor(targets, device=logits.device)
    chosen = logits.log_softmax(dim=-1).gather(1, ids[:, None])
    return Likelihood(float(chosen.sum(dtype=torch.float64)), bool((logits.argmax(dim=-1) == ids).all()))
