"""A cache that retention runs on, and beside it what every sequence should still hold, in plain tensors."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from kvfold.attention.pieces import LayerCall
from kvfold.cache import PagedCache, SequenceWork
from kvfold.geometry import Geometry
from kvfold.kernels.reference import attend
from kvfold.recipe import Recipe
from kvfold.retainer import ForwardInputs
from kvfold.retention.method import RetentionMethod

__all__ = ["RetainedWorld"]

SCALE = 0.25


class RetainedWorld:
    """``shown[seq][layer]``: bool ``[H, length]``, the tokens that each head still sees."""

    def __init__(
        self, config: PreTrainedConfig, recipe: str, *, method: RetentionMethod | None = None, budget: int | None = None
    ) -> None:
        self.geometry = Geometry.from_config(config)
        self.cache = PagedCache(
            self.geometry, Recipe.parse(recipe), dtype=torch.float32, kv_memory=budget, prefix_caching=False
        )
        self.cache._arena.fill_(255)  # NaN in every float format
        if method is not None:
            self.cache.retainer.method = method
        self.generator = torch.Generator().manual_seed(7)
        self.history: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.shown: dict[int, list[torch.Tensor]] = {}

    def create(self) -> int:
        seq = self.cache.create()
        self.history[seq] = [(torch.zeros(0, 2, 16), torch.zeros(0, 2, 16)) for _ in self.geometry.layers]
        self.shown[seq] = [torch.ones(2, 0, dtype=torch.bool) for _ in self.geometry.layers]
        return seq

    def fork(self, seq: int) -> int:
        child = self.cache.fork(seq)
        self.history[child], self.shown[child] = list(self.history[seq]), list(self.shown[seq])
        return child

    def step(self, work: list[tuple[int, int]]) -> float:
        """Runs one step; the largest difference from attention over what should be there."""
        step = self.cache.begin([SequenceWork(seq, count) for seq, count in work])
        total, worst = sum(count for _, count in work), 0.0
        for index, layer in enumerate(self.geometry.layers):
            q = torch.randn(total, 4, 16, generator=self.generator)
            k, v = (torch.randn(total, 2, 16, generator=self.generator) for _ in range(2))
            step.write(index, k, v)
            call = LayerCall(scale=SCALE, kind=layer.kind, window=layer.window)
            out = step.attend(index, q, k, v, call, ForwardInputs(torch.nn.Identity()))
            first = 0
            for seq, count in work:
                rows = slice(first, first + count)
                self._append(seq, index, k[rows], v[rows])
                worst = max(worst, float((out[rows] - self._wanted(seq, index, q[rows])).abs().max()))
                first += count
        self.cache.commit(step)
        return worst

    def retain(self, seq: int) -> bool:
        """Runs retention and finds out, from the pages, which tokens each head has kept of its history."""
        done = self.cache.retain(seq)
        for g, group in enumerate(self.cache.groups):
            kept = self.cache.retainer.kept(g, seq)
            if not done or kept is None:
                continue
            size = self.cache.recipe.block_size
            first, end = (self.cache.manager.groups[g].sink_end(size), self.cache.manager.kept_end(seq, g))
            for place, layer in enumerate(group.layers):
                for head in range(group.kv_heads):
                    mask = self.shown[seq][layer][head].clone()
                    mask[first * size : end * size] = False
                    mask[self.kept_positions(g, place, head, seq)] = True
                    self.shown[seq][layer] = self.shown[seq][layer].clone()
                    self.shown[seq][layer][head] = mask
        return done

    def kept_positions(self, g: int, place: int, head: int, seq: int) -> torch.Tensor:
        """Where in its history each token lies that a head has kept, found by its key; every one exactly once."""
        store, kept = self.cache._pages[g].kept_store, self.cache.retainer.kept(g, seq)
        lists = kept.lists()[place, head]
        lists = lists[lists >= 0]
        layer = self.cache.groups[g].layers[place]
        if not lists.numel():
            return torch.zeros(0, dtype=torch.int64)
        k, v = store.decode_pages(torch.stack([lists] * self.cache.groups[g].kv_heads, 1).reshape(-1), place)
        k, v = (x.unflatten(0, (-1, self.cache.groups[g].kv_heads))[:, head].flatten(0, 1) for x in (k, v))
        keys, values = (x[:, head] for x in self.history[seq][layer])
        distance = torch.cdist(k, keys)
        found = distance.argmin(1)
        tolerance = 0.0 if self.cache.recipe.is_raw else 3.0  # two bits are coarse
        assert float((k - keys[found]).abs().max()) <= tolerance
        assert float((v - values[found]).abs().max()) <= tolerance
        assert found.tolist() == sorted(set(found.tolist()))
        return found

    def _append(self, seq: int, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        old_k, old_v = self.history[seq][index]
        self.history[seq][index] = (torch.cat((old_k, k)), torch.cat((old_v, v)))
        more = torch.ones(2, k.shape[0], dtype=torch.bool)
        self.shown[seq][index] = torch.cat((self.shown[seq][index], more), dim=1)

    def _wanted(self, seq: int, index: int, q: torch.Tensor) -> torch.Tensor:
        layer, (k, v) = self.geometry.layers[index], self.history[seq][index]
        length = k.shape[0]
        parts = []
        for head in range(2):
            seen = self.shown[seq][index][head].nonzero()[:, 0]
            out, _ = attend(
                q[:, 2 * head : 2 * head + 2],
                k[seen, head : head + 1],
                v[seen, head : head + 1],
                q_pos=torch.arange(length - q.shape[0], length),
                k_pos=seen,
                scale=SCALE,
                window=layer.window if layer.kind == "sliding" else None,
            )
            parts.append(out)
        return torch.cat(parts, dim=1)
