"""What EleutherAI's harness asks of a model, answered by kvfold: likelihoods through the runner, texts through the
engine.

The harness is not imported here. Its own class, `lm_eval.api.model.TemplateLM`, is joined with this one in
`kvfold.quality.lm_harness`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvfold
from kvfold.available import available_memory
from kvfold.engine import Engine, SamplingParams
from kvfold.engine.loading import BUNDLED, load, parse_recipes
from kvfold.engine.runner import ModelRunner
from kvfold.engine.setup import context_length
from kvfold.errors import ModelError, RequestError, UnsupportedError
from kvfold.formats import parse_bytes
from kvfold.geometry import Geometry
from kvfold.memory.capacity import budget_for
from kvfold.quality.forwards import Watch
from kvfold.quality.lm_options import sampling_params
from kvfold.quality.lm_score import PREFILL_TOKENS, Likelihood, Scorer, Window, cut
from kvfold.recipe import Recipe
from kvfold.spec import group_spec

__all__ = ["HarnessModel", "torch_dtype"]

_SHARE: Final = 4
"""By default the cache takes at most one part in so many of the memory that is available, as the engine's does."""

_FORKS: Final = 3
"""Sequences of full length that scoring has room for: a prompt, one of its continuations, and what is kept of it."""

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_log = logging.getLogger("kvfold.quality")


class Instance(Protocol):
    """One request of the harness."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Texts, and for a generation its options."""


class HarnessModel:
    """A language model for the harness. Model arguments, as in ``--model_args name=value,...``:

    ``model``: ``bundled``, a directory, a hub id, or a loaded model with its ``tokenizer``. ``recipe``: its options may
    be set apart by ``;``, as the harness splits arguments at commas. ``kv_memory``: bytes of the cache, such as
    ``2GiB``; by default what the requests need. ``max_length``: a lower limit than the model's context.
    ``max_gen_toks``: tokens to generate where a task does not say. ``batch_size``: most requests that run at once, or
    ``auto``. ``dtype``: of the weights. ``seed``: for what is drawn. ``check``: compare a short forward with the
    model's own first.
    """

    backend = "causal"
    cache_hook: Any
    _device: Any

    def __init__(
        self,
        model: str | Path | PreTrainedModel = BUNDLED,
        recipe: str = "raw",
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        kv_memory: str | int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = "auto",
        dtype: str | None = None,
        device: str | None = None,
        seed: int = 0,
        check: bool = True,
        **unknown: object,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # the harness hands it to every model; here nothing is tried out
        if unknown:
            raise RequestError(
                f"unknown model argument {', '.join(map(repr, unknown))}",
                hint="known: model, recipe, kv_memory, max_length, max_gen_toks, batch_size, dtype, device, seed, "
                "tokenizer, check; options of a recipe are set apart by ';' there: recipe=int4;recent=128",
            )
        self._sequences = _batch(batch_size)
        text = str(Recipe.parse(recipe.replace(";", ",")))
        self.model, self.tokenizer = _loaded(model, tokenizer, dtype, device)
        self.name = str(model) if isinstance(model, (str, Path)) else str(model.config._name_or_path)
        self.recipe = parse_recipes([text], self.model)[text]
        self._geometry = Geometry.from_config(self.model.config)
        self.max_length = context_length(self._geometry, max_length)
        self.max_gen_toks = max_gen_toks
        self._kv_memory = kv_memory if kv_memory is None else parse_bytes(kv_memory)
        self._seed = seed
        self._check = check
        self._device = self.model.device
        self.peak_bytes = 0
        """Most bytes of the cache that were in use at the end of any step so far."""
        self.idle: tuple[str, ...] | None = None
        """Methods of the recipe that acted on none of the likelihoods so far; None before the first."""

    # -- text

    @property
    def eot_token_id(self) -> int:
        """The token with which a text ends."""
        token = self.tokenizer.eos_token_id
        if not isinstance(token, int):
            raise ModelError("the harness needs an end token", why="the tokenizer names none")
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        token = self.tokenizer.bos_token_id
        return token if isinstance(token, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness' cache of prompts."""
        return self.name if self.name == BUNDLED else str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids, with the special tokens the tokenizer adds by itself, unless the text begins with one already."""
        if add_special_tokens is None:
            begin = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (isinstance(begin, str) and string.startswith(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the model's own template writes it."""
        if not self.tokenizer.chat_template:
            raise RequestError(
                "cannot write a chat",
                why="the tokenizer has no chat template",
                hint="run without --apply_chat_template, or take a model that is made for chat",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except TemplateError as error:
            raise RequestError(
                "the model's chat template refuses the chat",
                why=str(error),
                hint="some templates know no system message; leave --system_instruction out",
            ) from error
        return str(text)

    def get_model_info(self) -> dict[str, object]:
        """What stands in the harness' results about the model."""
        return {
            "kvfold_version": kvfold.__version__,
            "kvfold_model": self.name,
            "kvfold_recipe": str(self.recipe),
            "kvfold_device": str(self.model.device),
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
        }

    # -- likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """For each ``(texts, context, continuation)``: the continuation's log-probability and whether greedy decoding
        would give it. Called by `TemplateLM.loglikelihood`, which makes tokens of texts.
        """
        windows = []
        for texts, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens, {str(texts[1])[:40]!r}, cannot be scored",
                    why=f"from 1 to max_length={self.max_length} tokens can",
                )
            windows.append(cut(context, continuation, self.max_length))
        self._tell_cuts(sum(len(one) + len(other) > self.max_length + 1 for _, one, other in requests))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(windows)
        for i, likelihood in self._likelihoods(windows):
            found[i] = (likelihood.logprob, likelihood.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of ``max_length`` tokens where they are longer.

        UnsupportedError for retention that runs only at the end of a prompt: these windows have none.
        """
        if (rule := self.recipe.rule) is not None and not rule.every:
            why = f"all tokens of a window are scored, and {self.recipe.retention} drops none before a prompt ends"
            hint = (
                f"let it run while decoding: {self.recipe.retention.name}(budget=512)" if self.recipe.retention else ""
            )
            raise UnsupportedError("rolling likelihoods", why=why, hint=hint)
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Window] = []
        places: list[tuple[int, int]] = []
        parts: list[list[float]] = [[] for _ in requests]
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in rolling:
                context, continuation = make_disjoint_window(pair)
                windows.append(cut(context, continuation, self.max_length))
                places.append((i, len(parts[i])))
                parts[i].append(0.0)
        for window, likelihood in self._likelihoods(windows):
            i, part = places[window]
            parts[i][part] = likelihood.logprob
        totals = [math.fsum(part) for part in parts]  # in the text's order: the sum is the same however it came about
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _likelihoods(self, windows: Sequence[Window]) -> Iterator[tuple[int, Likelihood]]:
        if not windows:
            return
        with self._runner(max(len(window.prompt) + len(window.inputs) for window in windows)) as runner:
            watch = Watch(runner.cache)
            for scored in Scorer(runner).score(windows):
                watch.before_scoring()
                self.peak_bytes = max(self.peak_bytes, runner.cache.bytes_in_use())
                yield scored
            self.idle = watch.idle if self.idle is None else tuple(x for x in self.idle if x in watch.idle)

    @contextmanager
    def _runner(self, longest: int) -> Iterator[ModelRunner]:
        """A runner with room for sequences of ``longest`` tokens."""
        memory = self._memory(longest, _FORKS)
        runner = ModelRunner(
            self.model, recipe=self.recipe, kv_memory=memory, prefix_caching=False, check=self._check_now()
        )
        try:
            yield runner
        finally:
            runner.release()

    def _memory(self, longest: int, sequences: int) -> int:
        """Bytes: ``kv_memory``, or what ``sequences`` of ``longest`` tokens need, within what may be taken."""
        if self._kv_memory is not None:
            return self._kv_memory
        groups = self._geometry.groups(self.recipe, self.model.dtype.itemsize)
        specs = [group_spec(group, recipe=self.recipe) for group in groups]
        # A method of retention may have the context repeated, beside what there is.
        sequences += self.recipe.retention is not None
        chunk = min(PREFILL_TOKENS, longest)
        needed = budget_for(specs, self.recipe.block_size, length=longest, chunk=chunk, sequences=sequences)
        return min(available_memory(self.model.device) // _SHARE, needed)

    # -- generation

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says to each ``(context, options)``, up to a stop string, an end token or ``max_gen_toks``.
        A context that leaves no room for that many tokens is cut from the left.
        """
        prompts, wanted = self._prompts(requests)
        texts = [""] * len(requests)
        if not requests:
            return texts
        longest = max(len(prompt) + (params.max_tokens or 0) for prompt, params in zip(prompts, wanted, strict=True))
        with Engine(
            self.model,
            tokenizer=self.tokenizer,
            recipe=self.recipe,
            kv_memory=self._memory(longest, min(len(requests), self._sequences)),
            max_sequences=self._sequences,
            max_batched_tokens=PREFILL_TOKENS,
            max_length=self.max_length,
            seed=self._seed,
            check=self._check_now(),
        ) as engine:
            places = {engine.add_request(*pair): i for i, pair in enumerate(zip(prompts, wanted, strict=True))}
            while engine.has_unfinished():
                for output in engine.step():
                    if output.error is not None:
                        raise output.error
                    i = places[output.request_id]
                    texts[i] = output.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
            self.peak_bytes = max(self.peak_bytes, int(engine.stats()["kv_peak_bytes"] or 0))
        return texts

    def _prompts(self, requests: Iterable[Instance]) -> tuple[list[list[int]], list[SamplingParams]]:
        """Token ids and sampling parameters of each request; RequestError for what cannot be served."""
        specials = _special_ids(self.tokenizer)
        prompts, wanted, cuts = [], [], 0
        for request in requests:
            context, options = request.args
            params = sampling_params(options, specials, max_gen_toks=self.max_gen_toks)
            room = self.max_length - (params.max_tokens or 0)
            if room < 1:
                raise RequestError(
                    f"max_gen_toks={params.max_tokens} leaves no room for a prompt",
                    why=f"max_length is {self.max_length}",
                    hint="lower it with --gen_kwargs max_gen_toks=N, or take a model with a longer context",
                )
            tokens = self.tok_encode(context)
            cuts += len(tokens) > room
            prompts.append(tokens[-room:])
            wanted.append(params)
        self._tell_cuts(cuts)
        return prompts, wanted

    def _tell_cuts(self, count: int) -> None:
        if count:
            _log.warning("%d contexts were cut from the left to fit max_length=%d", count, self.max_length)

    def _check_now(self) -> bool:
        """Whether the model is still to be compared with its stock path; once is enough."""
        check, self._check = self._check, False
        return check


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name; None for ``auto`` and None, which keep the saved one."""
    if name not in (None, "auto", *_DTYPES):
        raise RequestError(f"bad dtype {name!r}", hint=f"one of {', '.join(_DTYPES)}, or auto for the saved one")
    return _DTYPES.get(name or "auto")


def _loaded(
    model: str | Path | PreTrainedModel, tokenizer: object, dtype: str | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(model, (str, Path)):
        wanted = torch_dtype(dtype)
        # The harness' command line asks for cuda:0 where nobody says otherwise.
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("no %s here: the model runs on the CPU", device)
            device = None
        model, own = load(model, dtype=wanted, device=device)
        tokenizer = own if tokenizer is None else tokenizer
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError("the harness works with texts", why="the model comes without a tokenizer")
    return model, tokenizer


def _batch(batch_size: int | str) -> int:
    """Sequences at once; for ``auto`` the engine's own default."""
    text = str(batch_size)
    if text.startswith("auto"):
        return 64
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"bad batch_size={batch_size!r}", hint="a whole number from 1, or auto")
    return int(text)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Texts of the special tokens, which do not appear in what is generated, and their ids."""
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
