"""Attention time against the number of pages that retrieval reads, in one run.

    python -m benchmarks.retrieval --json benchmarks/results/retrieval.json --picture docs/retrieval.png

One decode step's attention, layer by layer, on random keys and values: under a recipe alone, and with `quest` for a
rising number of pages. *Ideal* is the time of reading everything times the share of its bytes that is read, bounds of
pages counted; ``vs_ideal`` says how far a selection is from it. Before anything is timed, reading all pages through
`quest` must give the bits of the recipe alone, and the chosen pages must be those of plain torch. ``--draw FILE`` draws
a result again.

On a machine that others use, what is interrupted is not comparable:

    KVFOLD_THREADS=1 python -m benchmarks.retrieval --clock thread

has one thread do all the work and counts its own seconds alone.
"""

# ruff: noqa: E402 - how OpenMP waits is said before torch is imported

from __future__ import annotations

import argparse
import io
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvfold.telemetry import calm_openmp

calm_openmp()  # before torch is imported, as the command does

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvfold.attention.pieces import LayerCall
from kvfold.attention.selected import PagesView
from kvfold.bench.attention import Samples
from kvfold.bench.stream import Stream
from kvfold.cache import PagedCache, SequenceWork, Step
from kvfold.cli.options import parse_recipe_list, write_json
from kvfold.errors import KVFoldError
from kvfold.formats import PageFormat, sealed_until, sink_blocks
from kvfold.geometry import Geometry, LayerGeometry
from kvfold.kernels import bounds
from kvfold.kernels.cpu.threads import thread_count
from kvfold.quality.environment import hardware, versions
from kvfold.quality.report.palette import LIGHT
from kvfold.recipe import Recipe

HEADS, GROUP, LAYERS = 8, 4, 4
FILL_TOKENS = 1024
FEWEST = 3 * LAYERS
PAUSE_S = 0.03  # until OpenMP's threads have gone to sleep
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


@dataclass(frozen=True)
class Row:
    """One recipe at one context. ``pages``: chosen of ``candidates``; None: all are read, without asking. ``seconds``:
    of one layer, the median of ``samples``. ``share``: of the bytes that reading everything takes; ``ideal_seconds``:
    that share of its time.
    """

    recipe: str
    context: int
    batch: int
    head_dim: int
    pages: int | None
    candidates: int
    seconds: float
    bytes_read: int
    share: float
    ideal_seconds: float
    vs_ideal: float
    stream_gb_s: float
    samples: int


class Reader:
    """Attention of an open step, one layer after the other."""

    def __init__(self, step: Step, q: Tensor, kv: Tensor) -> None:
        self._step, self._q, self._kv = step, q, kv
        self._call = LayerCall(scale=q.shape[-1] ** -0.5)

    def __call__(self, layer: int) -> Tensor:
        return self._step.attend(layer, self._q, self._kv, self._kv, self._call)


class Bed:
    """Sequences of random keys and values under one recipe; with ``retrieval``, pages carry bounds."""

    def __init__(self, recipe: str, context: int, batch: int, dim: int, *, retrieval: bool) -> None:
        layer = LayerGeometry(index=0, kind="full", kv_heads=HEADS, q_heads=HEADS * GROUP, k_dim=dim, v_dim=dim)
        layers = tuple(replace(layer, index=i, source=i) for i in range(LAYERS))
        geometry = Geometry("bench", layers, hidden=dim * HEADS * GROUP, vocab=1000, max_positions=1 << 20)
        self.recipe = Recipe.parse(recipe + ("+quest(pages=1,dense=0)" if retrieval else ""))
        budget = geometry.cache_bytes(self.recipe, 2, [context + FILL_TOKENS] * batch)
        self.cache = PagedCache(
            geometry, self.recipe, dtype=torch.bfloat16, kv_memory=int(budget * 1.05) + (64 << 20), prefix_caching=False
        )
        self.context, self.batch = context, batch
        self.sequences = [self.cache.create() for _ in range(batch)]
        generator = torch.Generator().manual_seed(0)
        for start in range(0, context - 1, FILL_TOKENS):
            self._append(min(FILL_TOKENS, context - 1 - start), dim, generator)
        self.q = torch.randn(batch, HEADS * GROUP, dim, generator=generator).to(torch.bfloat16)
        self.kv = torch.randn(batch, HEADS, dim, generator=generator).to(torch.bfloat16)

    def _append(self, count: int, dim: int, generator: torch.Generator) -> None:
        step = self.cache.begin([SequenceWork(seq, count) for seq in self.sequences])
        for layer in range(LAYERS):
            k, v = (torch.randn(self.batch * count, HEADS, dim, generator=generator) for _ in range(2))
            # Keys drift, as those of a text do: neighbours are alike, and pages differ.
            k = k.to(torch.bfloat16) + torch.randn(1, HEADS, dim, generator=generator).to(torch.bfloat16)
            step.write(layer, k, v.to(torch.bfloat16))
        self.cache.commit(step)

    def reader(self, pages: int | None) -> Reader:
        """A decode step that reads ``pages`` of the candidates. (What it reserved is given back: the memory stays.)"""
        if self.cache.retriever is not None:
            method = self.cache.retriever.method
            self.cache.retriever.method = replace(method, pages=self.candidates if pages is None else pages)
            self.cache.retriever.forget()
        step = self.cache.begin([SequenceWork(seq, 1) for seq in self.sequences])
        for layer in range(LAYERS):
            step.write(layer, self.kv, self.kv)
        self.cache.abandon(step)
        return Reader(step, self.q, self.kv)

    @property
    def candidates(self) -> int:
        """Pages of a head that may stay unread."""
        recipe, length = self.recipe, self.context - 1
        end = sealed_until(length, recipe.block_size, recipe.sinks, recipe.recent)
        return end - sink_blocks(recipe.sinks, recipe.block_size)

    def bytes_read(self, pages: int | None) -> int:
        """Bytes of a layer that a step reads: codes, scales and zeros of pages, and the bounds of all candidates."""
        group = self.cache.groups[0]
        fmt = group.packed or group.raw
        always = -(-self.context // fmt.block_size) - self.candidates
        bounds_read = 0 if pages is None else self.candidates * fmt.summary_bytes
        read = self.candidates if pages is None else pages
        return self.batch * HEADS * (always * _page(group.raw) + read * _page(fmt) + bounds_read)


def _page(fmt: PageFormat) -> int:
    return sum(fmt.block_size * side.code_bytes + side.page_meta_bytes(fmt.block_size) for side in (fmt.k, fmt.v))


def main() -> None:
    options = parse()
    if options.draw:
        result = json.loads(options.draw.read_text(encoding="utf-8"))
    else:
        result = measure(options)
    if options.picture:
        options.picture.write_bytes(picture(result["rows"]))


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.retrieval", *sys.argv[1:]]),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "threads": thread_count(),
        "clock": options.clock,
        "rows": [],
    }
    for context in options.contexts:
        rows: list[Row] = []
        for recipe in parse_recipe_list(options.recipes):
            rows += cell(recipe, context, options)
        show(rows)
        result["rows"] += [asdict(row) for row in rows]
        write_json(options.json, result)  # what is measured is kept, whatever comes after
    return result


def cell(recipe: str, context: int, options: argparse.Namespace) -> list[Row]:
    plain = Bed(recipe, context, options.batch, options.head_dim, retrieval=False)
    sparse = Bed(recipe, context, options.batch, options.head_dim, retrieval=True)
    candidates = sparse.candidates
    counts = sorted({candidates // share for share in (32, 16, 8, 4, 2)})
    gate(plain, sparse, counts)
    contestants: dict[str, Reader] = {"all": plain.reader(None)}
    contestants |= {str(count): sparse.reader(count) for count in counts}
    measured = timed(contestants, options)
    full = statistics.median(measured["all"].seconds)
    whole = plain.bytes_read(None)
    rows = []
    for name, found in measured.items():
        pages = None if name == "all" else int(name)
        seconds, read = statistics.median(found.seconds), sparse.bytes_read(pages)
        rows.append(
            Row(
                recipe=recipe,
                context=context,
                batch=options.batch,
                head_dim=options.head_dim,
                pages=pages,
                candidates=candidates,
                seconds=seconds,
                bytes_read=read,
                share=read / whole,
                ideal_seconds=full * read / whole,
                vs_ideal=seconds / (full * read / whole),
                stream_gb_s=statistics.median(found.stream),
                samples=len(found.seconds),
            )
        )
    return rows


def timed(contestants: Mapping[str, Reader], options: argparse.Namespace) -> dict[str, Samples]:
    """Everyone in turn, after a read that leaves nothing in a cache."""
    stream, clock = Stream(torch.device("cpu")), CLOCKS[options.clock]
    measured = {name: Samples() for name in contestants}
    share = options.seconds / len(contestants)
    for _ in range(options.repeats):
        for name, reader in contestants.items():
            found = measured[name]
            if len(found.seconds) >= FEWEST and sum(found.seconds) > share:
                continue
            found.stream.append(stream.read())
            time.sleep(PAUSE_S)
            for layer in range(LAYERS):
                begin = clock()
                reader(layer)
                found.seconds.append(clock() - begin)
    return measured


def gate(plain: Bed, sparse: Bed, counts: Sequence[int]) -> None:
    """KVFoldError unless reading everything is the recipe alone, and the choice that of plain torch."""
    if not torch.equal(plain.reader(None)(0), sparse.reader(None)(0)):
        raise KVFoldError("the correctness gate", why="reading all pages is not what the recipe alone gives")
    seen: list[tuple[Tensor, Tensor]] = []
    best = PagesView.best

    def watched(view: PagesView, count: int) -> Tensor:
        chosen = best(view, count)
        seen.append((chosen, bounds.choose(view._bounds(count))))
        return chosen

    PagesView.best = watched  # type: ignore[method-assign]
    try:
        sparse.reader(counts[0])(1)
    finally:
        PagesView.best = best  # type: ignore[method-assign]
    if not seen or not all((a == b).float().mean() > 0.99 for a, b in seen):  # sums in another order part ties
        raise KVFoldError("the correctness gate", why="the chosen pages are not those of plain torch")


def show(rows: Sequence[Row]) -> None:
    table = Table(title=f"{rows[0].batch} x {rows[0].context:,} tokens, {rows[0].head_dim} dims")
    for name in ("recipe", "pages", "of", "µs a layer", "share read", "ideal µs", "vs ideal", "times faster"):
        table.add_column(name, justify="left" if name == "recipe" else "right")
    full = {row.recipe: row.seconds for row in rows if row.pages is None}
    for row in rows:
        table.add_row(
            row.recipe, "all" if row.pages is None else str(row.pages), str(row.candidates), f"{row.seconds * 1e6:.0f}",
            f"{row.share:.3f}", f"{row.ideal_seconds * 1e6:.0f}", f"{row.vs_ideal:.2f}",
            f"{full[row.recipe] / row.seconds:.2f}",
        )  # fmt: skip
    Console().print(table)


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: time of a layer's attention over the share of pages read, beside the ideal, for every context."""
    contexts = sorted({row["context"] for row in rows})
    figure = Figure(figsize=(5.6 * len(contexts), 4.4), dpi=150, facecolor=LIGHT["paper"], layout="constrained")
    FigureCanvasAgg(figure)
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    colors = dict(zip(recipes, (LIGHT["blue"], LIGHT["green"], LIGHT["purple"], LIGHT["ochre"]), strict=False))
    for place, context in enumerate(contexts, 1):
        axes = figure.add_subplot(1, len(contexts), place, facecolor=LIGHT["paper"])
        axes.grid(color=LIGHT["rule"], linewidth=0.8)
        axes.tick_params(length=0, labelcolor=LIGHT["muted"], labelsize=9)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for recipe in recipes:
            own = [row for row in rows if row["recipe"] == recipe and row["context"] == context]
            full = next(row for row in own if row["pages"] is None)["seconds"] * 1e3
            some = sorted((row for row in own if row["pages"] is not None), key=lambda row: row["pages"])
            x = [row["pages"] / row["candidates"] for row in some]
            axes.plot(x, [row["seconds"] * 1e3 for row in some], "o-", color=colors[recipe], markersize=5)
            axes.plot(x, [row["ideal_seconds"] * 1e3 for row in some], "--", color=colors[recipe], linewidth=1.2)
            axes.axhline(full, color=colors[recipe], linewidth=0.9, alpha=0.6)
            aside = 4 if recipe != recipes[-1] else -12
            axes.annotate(f"{recipe}: everything", (0.5, full), xytext=(0, aside), textcoords="offset points",
                          ha="right", fontsize=9, color=colors[recipe])  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2], ["1/32", "1/16", "1/8", "1/4", "1/2"])
        axes.minorticks_off()
        axes.set_title(f"{rows[0]['batch']} x {context:,} tokens", loc="left", fontsize=11, color=LIGHT["ink"])
        axes.set_xlabel("share of the pages read     ●— quest   - - ideal", fontsize=9.5, color=LIGHT["muted"])
        axes.set_ylabel("attention of a layer, ms", fontsize=9.5, color=LIGHT["muted"])
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="raw,int8,int4")
    parser.add_argument("--contexts", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--draw", type=Path, help="a result to draw again, instead of measuring")
    return parser.parse_args()


if __name__ == "__main__":
    main()
