"""Whole decode steps at any context: caches are filled synthetically, so that 32k tokens need no prefill.

Every contestant holds the same random keys and values and decodes the same tokens, its steps interleaved with the
others', so that a noisy machine is noisy for all. Before anything is timed, ``raw`` must agree with transformers,
whether or not that is asked for as a rival.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvfold.bench.stream import stream_read_gb_s, wait_for
from kvfold.cache import SequenceWork
from kvfold.engine.loading import parse_recipes
from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.errors import KVFoldError, RequestError
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe

__all__ = ["RIVALS", "DecodeRow", "bench_decode"]

RIVALS = ("transformers",)
_FILL_TOKENS = 1024
_GATE = 0.25  # of the logits' standard deviation, as at load

Say = Callable[[str], None]
Chunk = Mapping[int, tuple[Tensor, Tensor]]
"""The next keys and values ``k, v [B, H, T, D]`` of each layer that stores."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One contestant. ``seconds``: median of a whole step; ``limit_seconds``: weights and cache bytes over
    ``stream_gb_s``.

    ``vs``: how many times faster than the first rival (1.0 for the rival itself; None without one). ``kl``: against
    ``raw`` on the first step.
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

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


class _Transformers:
    """transformers' own path: its dynamic cache, the attention implementation the model was loaded with."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.batch = batch

    def fill(self, chunk: Chunk) -> None:
        """Appends a chunk."""
        for layer, (k, v) in chunk.items():
            self.cache.update(k, v, layer)

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: int) -> Tensor:
        device = self.model.device
        positions = torch.full((self.batch, 1), position, device=device)
        logits: Tensor = self.model(
            input_ids=tokens[:, None].to(device), position_ids=positions, past_key_values=self.cache
        ).logits[:, -1]
        return logits

    def kv_bytes(self) -> int:
        held = (getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values"))
        return sum(int(x.nbytes) for x in held if isinstance(x, Tensor))


class _Paged:
    """kvfold under one recipe."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, batch: int, context: int, steps: int) -> None:
        geometry = Geometry.from_config(model.config)
        lengths = [context + steps + _FILL_TOKENS] * batch
        budget = geometry.cache_bytes(recipe, model.dtype.itemsize, lengths)
        self.runner = ModelRunner(model, recipe=recipe, kv_memory=int(budget * 1.25) + (64 << 20), check=False)
        self.sequences = [self.runner.create() for _ in range(batch)]

    def fill(self, chunk: Chunk) -> None:
        """Appends a chunk, as a prefill would."""
        count = next(iter(chunk.values()))[0].shape[2]
        step = self.runner.cache.begin([SequenceWork(seq, count) for seq in self.sequences])
        for layer, (k, v) in chunk.items():
            step.write(layer, k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1))
        self.runner.cache.commit(step)

    def step(self, tokens: Tensor, position: int) -> Tensor:
        return self.runner.execute(
            [
                SeqWork(seq=seq, tokens=[token], start=position, salt=b"", sample=True)
                for seq, token in zip(self.sequences, tokens.tolist(), strict=True)
            ]
        )

    def kv_bytes(self) -> int:
        return self.runner.cache.bytes_in_use()


def bench_decode(
    model: PreTrainedModel,
    *,
    recipes: Sequence[str],
    context: int,
    batch: int,
    steps: int = 16,
    rivals: Sequence[str] = (),
    seed: int = 0,
    say: Say = lambda _: None,
) -> list[DecodeRow]:
    """Times ``steps`` decode steps of ``batch`` sequences of ``context`` tokens under each recipe, and the rivals' in
    the same run.

    Raises RequestError for an unknown rival or a context the model cannot take, RecipeError or UnsupportedError for a
    recipe, KVFoldError if the correctness gate fails.
    """
    parsed = parse_recipes(["raw", *recipes], model)
    unknown = [rival for rival in rivals if rival not in RIVALS]
    if unknown:
        raise RequestError(f"unknown rival {unknown[0]!r}", hint="known: " + ", ".join(RIVALS))
    limit = Geometry.from_config(model.config).max_positions
    if context + steps + 1 > limit:
        raise RequestError(
            f"context {context}", why=f"the model takes {limit} positions", hint="choose a shorter context"
        )
    say(f"filling {1 + len(parsed)} caches with {batch} x {context} tokens")
    contestants: dict[str, _Paged | _Transformers] = {"transformers": _Transformers(model, batch)}
    contestants |= {name: _Paged(model, recipe, batch, context, steps) for name, recipe in parsed.items()}
    _fill(model, list(contestants.values()), context, batch, seed)
    tokens = torch.randint(
        0, model.config.vocab_size, (steps + 1, batch), generator=torch.Generator().manual_seed(seed)
    )
    logits = {name: contestant.step(tokens[0], context).float() for name, contestant in contestants.items()}
    _gate(logits["transformers"], logits["raw"])
    if "transformers" not in rivals:
        del contestants["transformers"]  # it was there for the gate; its cache is freed
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(1, steps + 1):
        for name, contestant in contestants.items():
            begin = time.perf_counter()
            contestant.step(tokens[i], context + i)
            wait_for(model.device)
            times[name].append(time.perf_counter() - begin)
        say(f"step {i} of {steps}")
    kept = [name for name in contestants if name in rivals or name in recipes]
    return _rows(model, contestants, kept, times, logits, rivals, context, batch)


def _rows(
    model: PreTrainedModel,
    contestants: dict[str, _Paged | _Transformers],
    kept: Sequence[str],
    times: dict[str, list[float]],
    logits: dict[str, Tensor],
    rivals: Sequence[str],
    context: int,
    batch: int,
) -> list[DecodeRow]:
    weights = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    stream = stream_read_gb_s(model.device)
    raw_bytes = contestants["raw"].kv_bytes()
    log_p = logits["raw"].log_softmax(-1)
    yardstick = statistics.median(times[rivals[0]]) if rivals else None
    rows = []
    for name in kept:
        seconds = statistics.median(times[name])
        kv_bytes = contestants[name].kv_bytes()
        floor = (weights + kv_bytes) / (stream * 1e9)
        rows.append(
            DecodeRow(
                contestant=name,
                batch=batch,
                context=context,
                seconds=seconds,
                tok_s=batch / seconds,
                kv_bytes=kv_bytes,
                compression=raw_bytes / kv_bytes,
                limit_seconds=floor,
                fraction_of_limit=floor / seconds,
                stream_gb_s=stream,
                vs=yardstick / seconds if yardstick is not None else None,
                kl=float((log_p.exp() * (log_p - logits[name].log_softmax(-1))).sum(-1).mean()),
            )
        )
    return rows


def _fill(
    model: PreTrainedModel, contestants: Sequence[_Paged | _Transformers], context: int, batch: int, seed: int
) -> None:
    """The same random keys and values for everyone."""
    generator = torch.Generator(model.device).manual_seed(seed)
    layers = [layer for layer in Geometry.from_config(model.config).layers if layer.stores]
    for start in range(0, context, _FILL_TOKENS):
        count = min(_FILL_TOKENS, context - start)
        chunk: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in layers:
            k, v = (
                torch.randn(batch, layer.kv_heads, count, dim, generator=generator, device=model.device).to(model.dtype)
                for dim in (layer.k_dim, layer.v_dim)
            )
            chunk[layer.index] = k, v
        for contestant in contestants:
            contestant.fill(chunk)
        wait_for(model.device)


def _gate(wanted: Tensor, found: Tensor) -> None:
    error = float((wanted - found).abs().max() / wanted.std())
    if not error <= _GATE:
        raise KVFoldError(
            "the benchmark's correctness gate",
            why=f"raw differs from transformers by {error:.2g} standard deviations of the logits",
        )
