"""The drop-in cache for transformers' ``generate()``:
``model.generate(**inputs, past_key_values=KVCache(model, "int4"))``.

A wrapper around the model's forward does the work (see `hf_forward`). Before a forward that carries a
:class:`KVCache`, a paged step is opened for the batch and the model is switched to the paged attention function; after
it, the step is committed and the model is what it was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.available import check_available
from kvfold.cache import PagedCache, SequenceWork
from kvfold.errors import ModelError, UnsupportedError
from kvfold.formats import parse_bytes
from kvfold.geometry import Geometry
from kvfold.hf_answers import PagedAnswers
from kvfold.hf_forward import CachedForward, padding_mask, runnable_model
from kvfold.hf_retention import refuse_repetition, repeat
from kvfold.hf_sequences import HeldSequences
from kvfold.modeling import ModelStep
from kvfold.packed import check_model
from kvfold.recipe import Recipe
from kvfold.reread import ReadAgain, StoredFactors
from kvfold.retention.build import refusals
from kvfold.rule import KeepRule
from kvfold.step import Step
from kvfold.untraced import untraced

__all__ = ["KVCache"]

_ROLLBACK_TOKENS = 64
"""What a sliding layer keeps behind its window when a decoding method announces that it will roll back."""


class KVCache(PagedAnswers):
    """A paged, packed cache for one ``generate()`` conversation with ``model``.

    ``recipe``: text or :class:`~kvfold.recipe.Recipe`. ``kv_memory``: a hard budget such as ``"2GiB"``; by default the
    cache grows with its use. Retention (``int4+snapkv(keep=0.25)``) runs behind every forward of several tokens, and
    with ``every`` while decoding; ``chunk`` has no effect, what goes in at once is the caller's. ``check``: compare a
    short paged forward with the stock one first (once for each model).

    Works for greedy search, sampling, beams, assisted decoding, left-padded batches and further turns on the same
    cache. ``copy.deepcopy(cache)`` is a fork that shares blocks: read a system prompt once, and copy it for each
    conversation. Padding takes no memory. Raises UnsupportedError with every reason if the model or the recipe cannot
    work.

    One thread at a time may run a model with a KVCache: for the length of a forward the model attends over its pages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe | str = "raw",
        *,
        kv_memory: str | int | None = None,
        check: bool = True,
    ) -> None:
        model = runnable_model(model)
        self._budget = None if kv_memory is None else parse_bytes(kv_memory)
        if self._budget is not None:
            check_available(self._budget, model.device)
        super().__init__(Geometry.from_config(model.config))
        self.recipe = Recipe.of(recipe, model.name_or_path)
        if reasons := refusals(self.recipe, self.geometry, model):
            raise UnsupportedError(f"recipe {self.recipe} on {self.geometry.model_type}", reasons)
        self._model_step: ModelStep | None = None
        self._recording = False
        self._interrupted = False
        self._seen = np.zeros((0, 0), dtype=bool)
        self._prompts: list[int] = []
        self._tokens: list[list[int]] = []
        self._model = model
        self.factors = StoredFactors(model)
        ReadAgain.put_on(model)
        if check and not CachedForward.has_checked(model):
            check_model(model, self.geometry)
        CachedForward.on(model).checked |= check
        self._held = HeldSequences(self, self._new_pages(model.dtype, model.device))

    # What the wrapper of the forward calls.

    def open_step(
        self,
        model: PreTrainedModel,
        inputs: Tensor,
        attention_mask: object,
        others: Sequence[str] = (),
        positions: object = None,
    ) -> ModelStep:
        """Reserves room for the new positions of ``inputs [B, T]`` (embeddings: ``[B, T, E]``); masked ones (padding)
        take none. ``others``: names of what is given beside text. ``positions [B, T]``: if they are given.
        """
        if self._interrupted:
            why = "retention behind the last forward was interrupted, when it could not be taken back any more"
            raise UnsupportedError("a forward on this cache", why=why, hint="reset() it, or use a new KVCache")
        self._follow(model)
        refuse_repetition(self._pages, inputs, others)
        batch, count = inputs.shape[:2]
        if not self._seen.shape[1] and batch != len(self._sequences):
            self.reset()  # nothing has been stored yet, whatever an earlier forward that failed had begun
        if not self._sequences:
            self._held.replace([self._pages.create() for _ in range(batch)])
            self._seen = np.zeros((batch, 0), dtype=bool)
        if batch != len(self._sequences):
            raise UnsupportedError(
                f"a batch of {batch} on this cache",
                why=f"it holds {len(self._sequences)} sequences",
                hint="use a new KVCache",
            )
        self.factors.open(positions, self.get_seq_length(), count)
        real = self._real_tokens(batch, count, attention_mask)
        counts = real.sum(1)
        work = [SequenceWork(seq, int(n)) for seq, n in zip(self._sequences, counts, strict=True) if n]
        rows = None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(self._pages.device)
        self._pending, self._inputs = real, inputs
        self._model_step = ModelStep(self._pages.begin(work), rows=rows)
        return self._model_step

    @property
    def _pages(self) -> PagedCache:
        return self._held.pages

    @property
    def _sequences(self) -> Sequence[int]:
        return self._held.ids

    def __copy__(self) -> KVCache:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """A cache that goes on from here on its own. It shares memory, budget and blocks with this one; a block is
        copied when one of them writes to it. UnsupportedError in the middle of a forward.
        """
        if self.in_forward:
            hint = "copy it between two forwards"
            raise UnsupportedError("copying a KVCache", why="a forward is running on it", hint=hint)
        other = type(self).__new__(type(self))
        other.__dict__ |= self.__dict__
        other._held = HeldSequences(other, self._pages)
        other._held.replace(self._held.forks(range(len(self._sequences))))
        other._seen, other._prompts = self._seen.copy(), list(self._prompts)
        other._tokens = [list(row) for row in self._tokens]
        other.factors = copy(self.factors)
        memo[id(self)] = other
        return other

    @property
    def in_forward(self) -> bool:
        """Whether a forward of its model is running on it."""
        return self._model_step is not None

    @untraced
    def close_step(self, *, failed: bool) -> None:
        """Commits the open step, or drops it when the forward failed; nothing, when none is open."""
        if self._model_step is None:
            return
        step = self._model_step.step
        if failed:
            self._model_step = None
            self._pages.abandon(step)
            return
        self._pages.commit(step)
        self._model_step = None
        self._seen = np.concatenate((self._seen, self._pending), axis=1)
        if self.recipe.rule is not None:
            prompts, runs = list(self._prompts), self._retention_runs()
            try:
                self._note_tokens()
                self._retain(self.recipe.rule, self._pending.sum(1))
            except BaseException:
                self._take_back(step, prompts, lost=self._retention_runs() != runs)
                raise

    def _retention_runs(self) -> int:
        return 0 if self._pages.retainer is None else self._pages.retainer.stats.runs

    def _take_back(self, step: Step, prompts: list[int], *, lost: bool) -> None:
        """Undoes a committed forward whose retention failed. ``lost``: a row has lost tokens; that cannot be undone."""
        if lost or any(layer.window for layer in self.geometry.layers):
            self._interrupted = True
            return
        self.crop(-self._pending.shape[1])
        step.undo()
        self._prompts = prompts

    def _follow(self, model: PreTrainedModel) -> None:
        """Takes the dtype and the device that the model has now, while nothing is stored."""
        if model is not self._model:
            raise ModelError(
                "this KVCache in a forward of another model",
                why="it was made for a model of its own, of which this one may be a copy",
                hint="make it with the model that runs: KVCache(model, ...)",
            )
        pages, now = self._pages, (model.dtype, model.device)
        if (pages.dtype, pages.device) == now:
            return
        if self._seen.shape[1]:
            raise UnsupportedError(
                f"a model in {now[0]} on {now[1]}",
                why=f"its KVCache holds keys and values in {pages.dtype} on {pages.device}",
                hint="use a new KVCache, or reset() this one, after the model was cast or moved",
            )
        self.reset()
        self._held.pages = self._new_pages(*now)

    def _note_tokens(self) -> None:
        """Remembers the tokens of the step, if the method of retention has them repeated."""
        retainer = self._pages.retainer
        if retainer is None or not retainer.method.replays:
            return
        self._tokens = self._tokens or [[] for _ in self._sequences]
        for row, ids, real in zip(self._tokens, self._inputs.tolist(), self._pending, strict=True):
            row += [token for token, is_one in zip(ids, real, strict=True) if is_one]

    def _retain(self, rule: KeepRule, counts: np.ndarray) -> None:
        """Runs retention where it is due behind a forward of ``counts [B]`` tokens.

        A forward of several tokens is a prompt, or a part of one; not so when decoding rolls back, where only the
        first one is.
        """
        lengths = self._seen.sum(1)
        self._prompts = self._prompts or [0] * len(self._sequences)
        for i, seq in enumerate(self._sequences):
            before, length = int(lengths[i] - counts[i]), int(lengths[i])
            if counts[i] > 1 and not (self._recording and self._prompts[i]):
                self._prompts[i] = length
            elif (point := rule.next_point(before, self._prompts[i])) is None or point > length:
                continue
            if self._tokens:
                repeat(self._model, self._pages, seq, self._tokens[i], self.factors.lengths)
            self._pages.retain(seq)

    def _real_tokens(self, batch: int, count: int, mask: object) -> np.ndarray:
        """bool ``[B, count]``: which new positions are tokens. The mask must agree with what earlier steps said."""
        if mask is None:
            return np.ones((batch, count), dtype=bool)
        past = self._seen.shape[1]
        bits = padding_mask(mask, batch, past + count).numpy()
        if (bits[:, :past] != self._seen).any():
            raise UnsupportedError(
                "a changed attention mask", why="positions already cached cannot be masked or unmasked"
            )
        return bits[:, past:]

    def _new_pages(self, dtype: torch.dtype, device: torch.device) -> PagedCache:
        return PagedCache(
            self.geometry,
            self.recipe,
            dtype=dtype,
            device=device,
            kv_memory=self._budget,
            prefix_caching=False,
            window_margin=_ROLLBACK_TOKENS if self._recording else 0,
        )

    # What transformers calls.

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new rows ``[B, H, T, D]`` and hands them back: the attention function reads the past from the
        pages.
        """
        if self._model_step is None:
            raise ModelError(
                "this KVCache is not in a forward of its model",
                why="a part of the model was called, or another one",
                hint="call the whole model that it was made with: KVCache(model, ...)",
            )
        self._model_step.write_latent(key_states, value_states, layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, padding included, as the model counts them."""
        return int(self._seen.shape[1])

    def reset(self) -> None:
        """Forgets everything; the memory goes back."""
        self._interrupted = False
        self._held.replace([])
        self._pages.give_back()
        self._seen = np.zeros((0, 0), dtype=bool)
        self._prompts = []
        self._tokens = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become forks of the rows ``beam_idx [B]``: tables are copied, pages are shared until they are
        written.
        """
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices``, in that order; a row may be taken more than once."""
        order = [int(i) for i in indices.tolist()]
        self._held.replace(self._held.forks(order))
        self._seen = self._seen[order]
        self._prompts = [self._prompts[i] for i in order] if self._prompts else []
        self._tokens = [list(self._tokens[i]) for i in order] if self._tokens else []

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, the copies next to each other."""
        self.batch_select_indices(torch.arange(len(self._sequences)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the latest ``-tokens_to_remove`` positions back (a negative count, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of positions to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0:
            return
        seen = self._seen[:, : max(0, self._seen.shape[1] + tokens_to_remove)]
        for seq, length in zip(self._sequences, seen.sum(1), strict=True):
            self._pages.truncate(seq, int(length))
        self._tokens = [row[: int(length)] for row, length in zip(self._tokens, seen.sum(1), strict=False)]
        self._seen = seen

    def activate_past_recording(self) -> None:
        """Told before decoding that will roll back: sliding layers keep some tokens behind their window from here on.

        Raises UnsupportedError if a window has passed tokens already, in turns that were not to be rolled back.
        """
        if self._recording:
            return
        if any(layer.window for layer in self.geometry.layers):
            if self._seen.shape[1]:
                raise UnsupportedError(
                    "rolling back on a cache in use",
                    why="its sliding layers have released what their window has passed",
                    hint="use a new KVCache, or announce it first: cache.activate_past_recording()",
                )
            self._recording = True
            self.reset()
            self._held.pages = self._new_pages(self._pages.dtype, self._pages.device)
        self._recording = True

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether rollback was announced."""
        return self._recording

    # What people read.

    @property
    def kv_bytes(self) -> int:
        """Bytes of all blocks in use: scales, raw tails, slack and tables counted. Copies share their memory, and each
        tells the bytes of all.
        """
        return self._pages.bytes_in_use()

    @property
    def reserved_bytes(self) -> int:
        """Bytes of address space that the cache holds: the budget, or what it has grown to (by doubling) so far."""
        return self._pages.bytes_allocated()

    allocated_bytes = reserved_bytes

    @property
    def resident_bytes(self) -> int | None:
        """Bytes of them that are backed by real memory now: memory becomes real when it is first written, and what
        retention and `reset` free goes back. None where the system does not tell.
        """
        return self._pages.bytes_resident()

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self._sequences)

    @property
    def is_initialized(self) -> bool:
        """Whether a forward has run on it."""
        return bool(self._sequences)

    def __repr__(self) -> str:
        return f"KVCache({self.recipe}, {len(self._sequences)} x {self.get_seq_length()} tokens, {self.kv_bytes} bytes)"
