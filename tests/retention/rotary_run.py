"""What the full layers of a tiny model are shown in a forward, and their queries before they were turned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvfold.cache import PagedCache, SequenceWork
from kvfold.geometry import Geometry
from kvfold.packed import PackedModel
from kvfold.recipe import Recipe
from tests.conformance.families import VOCAB

__all__ = ["Shown", "run"]


@dataclass(frozen=True)
class Shown:
    """``q, before [T, Hq, D]``, ``rotary``: (cos, sin), each ``[T, R]``, ``hidden [T, E]``."""

    module: nn.Module
    q: Tensor
    rotary: tuple[Tensor, Tensor] | None
    hidden: Tensor
    before: Tensor


def run(
    model: PreTrainedModel, counts: list[int], recipe: str = "raw+expected_attention(keep=0.5)"
) -> tuple[PagedCache, int, dict[int, Shown]]:
    """Runs the same tokens as ever in forwards of so many; the cache, the sequence, and what the last one showed."""
    cache = PagedCache(Geometry.from_config(model.config), Recipe.parse(recipe), dtype=torch.float32)
    shown: dict[int, tuple] = {}
    before: dict[nn.Module, Tensor] = {}
    method, watch = cache.retainer.method, cache.retainer.method.observe

    def observe(seen, notes):
        watch(seen, notes)
        shown[seen.view.layer] = (seen.view.facts.module, seen.q.float(), seen.rotary, seen.hidden)

    object.__setattr__(method, "observe", observe)
    hooks = []

    def note(module: nn.Module):
        # The first call of a forward is the model's own. A hook must not return what it is not to change.
        def hook(_, __, out: Tensor) -> None:
            before.setdefault(module, out)

        return hook

    for module in model.modules():
        if hasattr(module, "q_proj"):
            last = getattr(module, "q_norm", None) or module.q_proj
            hooks.append(last.register_forward_hook(note(module)))
    packed, seq, start = PackedModel(model), cache.create(), 0
    ids = torch.randint(3, VOCAB, (200,), generator=torch.Generator().manual_seed(2))
    for count in counts:
        before.clear()
        step = cache.begin([SequenceWork(seq, count)])
        span = torch.arange(start, start + count)
        packed.forward(step, ids[span], span, torch.arange(1), [count])
        cache.commit(step)
        start += count
    packed.release()
    for hook in hooks:
        hook.remove()
    return cache, seq, {layer: Shown(*rest, before[rest[0]].view_as(rest[1])) for layer, rest in shown.items()}
