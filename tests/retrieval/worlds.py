"""A cache of random tokens, and what retrieval should read of it, found the slow way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from kvfold.attention.pieces import LayerCall
from kvfold.cache import PagedCache, SequenceWork
from kvfold.codecs.summaries import outward, read_summaries
from kvfold.formats import sealed_until, sink_blocks
from kvfold.geometry import Geometry
from kvfold.kernels.reference import page_bounds
from kvfold.recipe import Recipe

KV_HEADS, GROUP, DIM, SCALE = 2, 2, 16, 0.25
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": KV_HEADS * GROUP,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
}
LLAMA = LlamaConfig(**_SHAPE)
GEMMA = Gemma3TextConfig(
    **_SHAPE, sliding_window=24, layer_types=["sliding_attention", "full_attention", "full_attention"]
)


class World:
    """Sequences under one recipe; every step is random, and the same for the same seed whatever the recipe."""

    def __init__(
        self, recipe: str, config: PreTrainedConfig = LLAMA, *, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        self.geometry = Geometry.from_config(config)
        self.cache = PagedCache(self.geometry, Recipe.parse(recipe), dtype=dtype, prefix_caching=False)
        self.cache._arena.fill_(255)  # NaN in every float format
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of new tokens in every layer. Keys of a step lean one way."""

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.generator)

        return [
            (
                (2 * random(count, KV_HEADS * GROUP, DIM)).to(self.dtype),
                (random(count, KV_HEADS, DIM) + 1.5 * random(1, KV_HEADS, DIM)).to(self.dtype),
                (random(count, KV_HEADS, DIM) + 1).to(self.dtype),
            )
            for _ in self.geometry.layers
        ]

    def call(self, layer: int) -> LayerCall:
        of = self.geometry.layers[layer]
        return LayerCall(scale=SCALE, kind=of.kind, window=of.window)  # type: ignore[arg-type]

    def step(
        self,
        work: list[tuple[int, int]],
        tensors: list[tuple[Tensor, Tensor, Tensor]] | None = None,
        *,
        commit: bool = True,
        look: Callable[[list[Tensor]], None] = lambda _: None,
    ) -> list[Tensor]:
        """Runs one step; every layer's output ``[N, Hq, D]``. ``look``: sees it before anything is sealed."""
        tensors = tensors or self.draw(sum(count for _, count in work))
        step = self.cache.begin([SequenceWork(seq, count) for seq, count in work])
        outputs = []
        for layer, (q, k, v) in enumerate(tensors):
            step.write(layer, k, v)
            outputs.append(step.attend(layer, q, k, v, self.call(layer)))
        look(outputs)
        if commit:
            self.cache.commit(step)
            self.cache.manager.check()
        else:
            self.cache.abandon(step)
        return outputs

    def fill(self, *lengths: int) -> list[int]:
        """New sequences, filled in chunks of up to 70 tokens."""
        sequences = []
        for length in lengths:
            seq = self.cache.create()
            sequences.append(seq)
            while (left := length - self.cache.length(seq)) > 0:
                self.step([(seq, min(left, 70))])
        return sequences

    def pages(self, seq: int, layer: int, head: int, length: int) -> tuple[list[Any], list[Any]]:
        """(candidates, others) of a KV head, each page ``(k [t, D], v [t, D], bias [t], bound of its keys [2, D])``, in
        the order in which attention lists them; ``length``: tokens before the new one.
        """
        g, index = self.cache._layers.slot(layer)
        group, stores = self.cache.groups[g], self.cache._pages[g]
        size = self.cache.recipe.block_size
        pages = self.cache._sequence_pages(g, seq)
        first, end = sink_blocks(group.sinks, size), sealed_until(length, size, group.sinks, group.recent)
        older, others = [], []
        if pages.kept is not None and pages.kept.pages:
            biases = pages.kept.biases(size)
            for i, addr in enumerate(pages.kept.lists()[index, head].tolist()):
                if addr >= 0:
                    bias = None if biases is None else biases[index, head, i * size : (i + 1) * size]
                    older.append(self._page(g, stores.kept_store, addr, index, head, size, bias))
        for store, blocks in ((stores.packed, pages.packed), (stores.raw, pages.raw)):
            for offset, start in zip(blocks.offset.tolist(), blocks.start.tolist(), strict=True):
                addr = offset + index * stores.layer_bytes(store) + head * store.fmt.page_bytes
                candidate = first <= start // size < end and (store is stores.packed or stores.packed is None)
                used = size if candidate else min(size, length + 1 - start)
                (older if candidate else others).append(self._page(g, store, addr, index, head, used))
        return older, others

    def _page(
        self, g: int, store: Any, addr: int, index: int, head: int, used: int, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # Whole layers of heads, since a calibrated basis counts them.
        at = torch.full((KV_HEADS,), addr)
        k, v = (x.float()[head, :used] for x in store.decode_pages(at, index))
        ends = None
        if store.fmt.summary_dims:
            ends = read_summaries(store, torch.tensor([addr]))[0].float()
        return k, v, torch.zeros(used) if bias is None else bias, ends

    def wanted(self, seq: int, layer: int, q: Tensor, length: int, count: int | None) -> Tensor:
        """Attention of a new token's ``q [Hq, D]`` over what it should read, ``count`` candidates of each head (None:
        all): ``[Hq, D]``.
        """
        out = []
        if count is not None and not self.selects(seq, layer, length, count):
            count = None
        for head in range(KV_HEADS):
            older, others = self.pages(seq, layer, head, length)
            rows = q.float()[head * GROUP : (head + 1) * GROUP]
            if count is not None and len(older) > count:
                limits = [float(page_bounds(rows, e[:1], e[1:])[0]) * SCALE + float(b.max()) for *_, b, e in older]
                best = sorted(range(len(older)), key=lambda i: (-limits[i], i))[:count]
                older = [older[i] for i in best]
            k, v, bias = (torch.cat([page[part] for page in (*older, *others)]) for part in range(3))
            out.append(((rows @ k.T) * SCALE + bias).softmax(-1) @ v)
        return torch.cat(out)

    def selects(self, seq: int, layer: int, length: int, count: int) -> bool:
        """Whether a sequence has so many candidates that bounds and ``count`` pages are less to read than all."""
        g, _ = self.cache._layers.slot(layer)
        kept, fmt = self.cache._sequence_pages(g, seq).kept, self.cache._pages[g].kept_store.fmt
        older = len(self.pages(seq, layer, 0, length)[0])
        if kept is not None:
            older += kept.pages - int(kept.counts[self.cache._layers.slot(layer)[1], 0])
        return older > count and older * (fmt.page_bytes - fmt.summary_bytes) > count * fmt.page_bytes

    def check_selection(self, sequences: list[int], count: int, *, dense: int = 0) -> None:
        """One step of ``sequences``: every full layer from ``dense`` on has read the ``count`` best pages."""
        tensors = self.draw(len(sequences))
        lengths = [self.cache.length(seq) for seq in sequences]

        def look(outputs: list[Tensor]) -> None:
            for layer, of in enumerate(self.geometry.layers):
                for row, (seq, length) in enumerate(zip(sequences, lengths, strict=True) if of.window is None else ()):
                    limit = count if layer >= dense else None
                    wanted = self.wanted(seq, layer, tensors[layer][0][row], length, limit)
                    error = (outputs[layer][row] - wanted).norm() / wanted.norm()
                    assert error < 5e-3, (layer, row, float(error))

        self.step([(seq, 1) for seq in sequences], tensors, look=look)

    def check_bounds(self) -> int:
        """Every candidate of every sequence carries the bounds of what it holds; how many were looked at."""
        looked = 0
        for seq in self.cache.manager.sequences():
            for layer, of in enumerate(self.geometry.layers):
                for head in range(KV_HEADS if of.window is None else 0):
                    for k, _, _, ends in self.pages(seq, layer, head, self.cache.length(seq) - 1)[0]:
                        assert ends is not None
                        least, greatest = outward(*k.aminmax(dim=0))
                        room = 0.01 * k.abs().max()  # what is decoded to bfloat16 is rounded once more
                        exact = self.dtype == torch.float32
                        assert torch.allclose(ends[0], least.float(), rtol=0.01, atol=0 if exact else float(room))
                        assert torch.allclose(ends[1], greatest.float(), rtol=0.01, atol=0 if exact else float(room))
                        assert not math.isnan(float(ends.sum()))
                        looked += 1
        return looked
