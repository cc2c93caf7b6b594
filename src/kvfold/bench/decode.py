"""Whole decode steps at any context: caches are filled synthetically, so that 32k tokens need no prefill.

Every contestant holds the same random keys and values and decodes the same tokens, its steps interleaved with the
others', so that a noisy machine is noisy for all. Before anything is timed, ``raw`` must agree with transformers,
whether or not that is asked for as a rival. After the timed steps come a few that are taken apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvfold.bench.account import Account, Shares, TimedAttention, replaced, shares, timed_linears
from kvfold.bench.shapes import FILL_TOKENS, check_rivals
from kvfold.bench.stream import Stream, wait_for
from kvfold.cache import SequenceWork, Step
from kvfold.engine.loading import parse_recipes
from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.errors import KVFoldError, RequestError
from kvfold.formats import sealed_until
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe

__all__ = ["DecodeRow", "bench_decode", "spare_positions"]

_GATE = 0.25  # of the logits' standard deviation, as at load
_FEWEST = 5
_APART = 3  # steps that are taken apart

Say = Callable[[str], None]
Chunk = Mapping[int, tuple[Tensor, Tensor]]
"""The next keys and values ``k, v [B, H, T, D]`` of each layer that stores."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One contestant. ``seconds``: median of ``samples`` whole steps; ``limit_seconds``: weights and cache bytes over
    ``stream_gb_s``, the median of reads between the steps.

    ``vs``: how many times faster than the first rival (1.0 for the rival itself; None without one). ``kl``: against
    ``raw`` on the first step. The shares are parts of a step's time: see `kvfold.bench.account.Shares`.
    """

    contestant: str
    batch: int
    context: int
    seconds: float
    tok_s: float
    kv_bytes: int
    compression: float
    limit_seconds: float
    fraction_of_limit: float
    stream_gb_s: float
    vs: float | None
    kl: float
    linear_share: float
    attention_share: float
    write_share: float
    other_share: float
    sealing_share: float
    samples: int

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


class _Transformers:
    """transformers' own path: its dynamic cache, the attention implementation the model was loaded with."""

    seal_every = 1

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.batch = batch

    def fill(self, chunk: Chunk) -> None:
        """Appends a chunk."""
        for layer, (k, v) in chunk.items():
            self.cache.update(k, v, layer)

    def filled(self) -> None:
        """It keeps all."""

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        device = self.model.device
        positions = torch.full((self.batch, 1), self.cache.get_seq_length(), device=device)
        logits: Tensor = self.model(
            input_ids=tokens[:, None].to(device), position_ids=positions, past_key_values=self.cache
        ).logits[:, -1]
        return logits

    def kv_bytes(self) -> int:
        held = (getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values"))
        return sum(int(x.nbytes) for x in held if isinstance(x, Tensor))

    def until_seal(self) -> None:
        """It never seals."""

    @contextmanager
    def clocks(self, account: Account) -> Iterator[None]:
        """Its write path is the update of its cache."""
        timed = account.timed("write", self.cache.update)
        with replaced(self.cache, update=timed), timed_linears(self.model, account), TimedAttention(account):
            yield


class _Paged:
    """kvfold under one recipe."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, batch: int, tokens: int) -> None:
        geometry = Geometry.from_config(model.config)
        # Whole sequences, and beside one of them what retention keeps of it.
        lengths = [tokens + FILL_TOKENS] * (batch + (recipe.rule is not None))
        budget = geometry.cache_bytes(recipe, model.dtype.itemsize, lengths)
        self.model = model
        self.recipe = recipe
        self.seal_every = recipe.block_size
        self.runner = ModelRunner(model, recipe=recipe, kv_memory=int(budget * 1.05) + (64 << 20), check=False)
        self.sequences = [self.runner.create() for _ in range(batch)]

    def fill(self, chunk: Chunk) -> None:
        """Appends a chunk, as a prefill would."""
        count = next(iter(chunk.values()))[0].shape[2]
        step = self.runner.cache.begin([SequenceWork(seq, count) for seq in self.sequences])
        for layer, (k, v) in chunk.items():
            step.write(layer, k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1))
        self.runner.cache.commit(step)

    def filled(self) -> None:
        """The prompt is whole: retention runs."""
        if self.recipe.rule is not None:
            for seq in self.sequences:
                self.runner.cache.retain(seq, final=True)

    def step(self, tokens: Tensor) -> Tensor:
        start = self.runner.cache.length(self.sequences[0])
        return self.runner.execute(
            [
                SeqWork(seq=seq, tokens=[token], start=start, salt=b"", sample=True)
                for seq, token in zip(self.sequences, tokens.tolist(), strict=True)
            ]
        )

    def kv_bytes(self) -> int:
        return self.runner.cache.bytes_in_use()

    def until_seal(self) -> int | None:
        """Tokens after which the next step is one that seals; None if none ever is."""
        recipe, length = self.recipe, self.runner.cache.length(self.sequences[0])

        def sealed(tokens: int) -> int:
            return sealed_until(tokens, recipe.block_size, recipe.sinks, recipe.recent)

        later = range(length, length + recipe.sinks + recipe.recent + 2 * recipe.block_size)
        return None if recipe.is_raw else next(at for at in later if sealed(at + 1) > sealed(at)) - length

    @contextmanager
    def clocks(self, account: Account) -> Iterator[None]:
        """Its write path is the writing of new rows, and all that a commit does."""
        cache = self.runner.cache
        make = cache.begin

        def begin(work: Sequence[SequenceWork], **options: Any) -> Step:
            step = make(work, **options)
            timed: dict[str, Any] = {
                "write": account.timed("write", step.write),
                "attend": account.timed("attention", step.attend),
            }
            for name, method in timed.items():
                setattr(step, name, method)
            return step

        timed_commit = account.timed("write", cache.commit)
        with replaced(cache, begin=begin, commit=timed_commit), timed_linears(self.model, account):
            yield


_Contestant = _Paged | _Transformers


@dataclass(frozen=True, slots=True)
class _Measured:
    seconds: list[float]
    kv_bytes: int
    shares: Shares


def spare_positions(recipes: Sequence[Recipe]) -> int:
    """Positions behind the timed steps that the ones taken apart may need."""
    return 2 + 2 * _APART + max((r.sinks + r.recent + 2 * r.block_size for r in recipes if not r.is_raw), default=0)


def bench_decode(
    model: PreTrainedModel,
    *,
    recipes: Sequence[str],
    context: int,
    batch: int,
    steps: int = 16,
    seconds: float = 100.0,
    rivals: Sequence[str] = (),
    seed: int = 0,
    say: Say = lambda _: None,
) -> list[DecodeRow]:
    """Times up to ``steps`` decode steps of ``batch`` sequences of ``context`` tokens under each recipe, and the
    rivals' in the same run. Who has had its share of ``seconds`` and five steps sits out the rest.

    Raises RequestError for an unknown rival or a context the model cannot take, RecipeError or UnsupportedError for a
    recipe, KVFoldError if the correctness gate fails.
    """
    parsed = parse_recipes(["raw", *recipes], model)
    check_rivals(rivals)
    limit = Geometry.from_config(model.config).max_positions
    spare = steps + spare_positions(list(parsed.values()))
    if context + spare > limit:
        why = f"the model takes {limit} positions, of which {spare} are for the timed steps and those behind them"
        raise RequestError(f"context {context}", why=why, hint=f"--context {max(1, limit - spare)} at most")
    contestants: dict[str, _Contestant] = {"transformers": _Transformers(model, batch)}
    contestants |= {name: _Paged(model, recipe, batch, context + spare) for name, recipe in parsed.items()}
    _fill(model, list(contestants.values()), context, batch, seed, say)
    tokens = torch.randint(
        0, model.config.vocab_size, (steps + 1, batch), generator=torch.Generator().manual_seed(seed)
    )
    logits = {name: contestant.step(tokens[0]).float() for name, contestant in contestants.items()}
    _gate(logits["transformers"], logits["raw"])
    raw_bytes = contestants["raw"].kv_bytes()
    for name in ("transformers", "raw"):  # who was there for the gate only makes room
        if name not in (*rivals, *recipes):
            del contestants[name]
    stream = Stream(model.device)
    times, bandwidth = _time(model.device, contestants, tokens[1:], seconds, stream, say)
    measured = {}
    for name, contestant in contestants.items():
        say(f"taking {name} apart")
        kv_bytes = contestant.kv_bytes()
        measured[name] = _Measured(times[name], kv_bytes, _take_apart(model, contestant, tokens[0]))
    return _rows(model, measured, logits, raw_bytes, bandwidth, rivals, context, batch)


def _time(
    device: torch.device,
    contestants: Mapping[str, _Contestant],
    tokens: Tensor,
    seconds: float,
    stream: Stream,
    say: Say,
) -> tuple[dict[str, list[float]], float]:
    """Seconds of everyone's steps, and the stream bandwidth meanwhile."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    share = seconds / max(1, len(contestants))
    bandwidth = []
    for number, each in enumerate(tokens, 1):
        bandwidth.append(stream.read())
        for name, contestant in contestants.items():
            if len(times[name]) >= _FEWEST and sum(times[name]) > share:
                continue
            begin = time.perf_counter()
            contestant.step(each)
            wait_for(device)
            times[name].append(time.perf_counter() - begin)
        say(f"step {number} of {len(tokens)}")
    return times, statistics.median(bandwidth)


def _take_apart(model: PreTrainedModel, contestant: _Contestant, tokens: Tensor) -> Shares:
    """Runs some steps with clocks, and for who seals one that does."""
    account = Account(model.device)
    with contestant.clocks(account):
        begin = account.now()
        for _ in range(_APART):
            contestant.step(tokens)
        total = account.now() - begin
    seal = 0.0
    if (missing := contestant.until_seal()) is not None:
        if missing:
            generator = torch.Generator(model.device).manual_seed(missing)
            contestant.fill(_chunk(model, missing, tokens.shape[0], generator))
        sealing = Account(model.device)
        with contestant.clocks(sealing):
            contestant.step(tokens)
        seal = max(0.0, sealing.seconds["write"] - account.seconds["write"] / _APART)
    return shares(account, total, _APART, seal, contestant.seal_every)


def _rows(
    model: PreTrainedModel,
    measured: Mapping[str, _Measured],
    logits: Mapping[str, Tensor],
    raw_bytes: int,
    stream: float,
    rivals: Sequence[str],
    context: int,
    batch: int,
) -> list[DecodeRow]:
    weights = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    log_p = logits["raw"].log_softmax(-1)
    yardstick = statistics.median(measured[rivals[0]].seconds) if rivals else None
    rows = []
    for name, found in measured.items():
        seconds = statistics.median(found.seconds)
        floor = (weights + found.kv_bytes) / (stream * 1e9)
        rows.append(
            DecodeRow(
                contestant=name,
                batch=batch,
                context=context,
                seconds=seconds,
                tok_s=batch / seconds,
                kv_bytes=found.kv_bytes,
                compression=raw_bytes / found.kv_bytes,
                limit_seconds=floor,
                fraction_of_limit=floor / seconds,
                stream_gb_s=stream,
                vs=yardstick / seconds if yardstick is not None else None,
                kl=float((log_p.exp() * (log_p - logits[name].log_softmax(-1))).sum(-1).mean()),
                linear_share=found.shares.linear,
                attention_share=found.shares.attention,
                write_share=found.shares.write,
                other_share=found.shares.other,
                sealing_share=found.shares.sealing,
                samples=len(found.seconds),
            )
        )
    return rows


def _fill(
    model: PreTrainedModel, contestants: Sequence[_Contestant], context: int, batch: int, seed: int, say: Say
) -> None:
    """The same random keys and values for everyone."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for start in range(0, context, FILL_TOKENS):
        say(f"filling {len(contestants)} caches: {batch} x {start:,} of {context:,} tokens")
        chunk = _chunk(model, min(FILL_TOKENS, context - start), batch, generator)
        for contestant in contestants:
            contestant.fill(chunk)
        wait_for(model.device)
    for contestant in contestants:
        contestant.filled()


def _chunk(model: PreTrainedModel, count: int, batch: int, generator: torch.Generator) -> Chunk:
    chunk: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in Geometry.from_config(model.config).layers:
        if layer.stores:
            k, v = (
                torch.randn(batch, layer.kv_heads, count, dim, generator=generator, device=model.device).to(model.dtype)
                for dim in (layer.k_dim, layer.v_dim)
            )
            chunk[layer.index] = k, v
    return chunk


def _gate(wanted: Tensor, found: Tensor) -> None:
    error = float((wanted - found).abs().max() / wanted.std())
    if not error <= _GATE:
        raise KVFoldError(
            "the benchmark's correctness gate",
            why=f"raw differs from transformers by {error:.2g} standard deviations of the logits",
        )
