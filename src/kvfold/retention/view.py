"""One layer of one sequence as a retention method sees it: its tokens in columns, their keys, values and attention.

Columns are in the order of positions: the sinks' blocks, what earlier retention kept (page by page, every head its own
tokens, padded to the head with most), then all that came since. Candidates for dropping are the columns between the
sinks' blocks and the recent tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kvfold.codecs.pages import PageStore
from kvfold.errors import UnsupportedError

__all__ = ["LayerFacts", "LayerView", "PagePart"]


@dataclass(frozen=True, slots=True)
class PagePart:
    """Columns that lie in pages of one store: ``addr [H, P]``, the layer's own byte addresses, of which ``columns`` of
    the ``P * S`` tokens are in use. ``shown [H, columns]``: which are tokens; None: all. ``bias [H, columns]`` of their
    scores; None: 0.
    """

    store: PageStore
    addr: Tensor
    columns: int
    shown: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """How a layer attends: learnt when it does. ``module``: its attention. ``sinks [Hq]``: learned sink logits. Of
    latent layers, queries are absorbed: keys are latent and rotary part side by side, values the latent.
    """

    module: nn.Module
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


class LayerView:
    """See the module. ``parts`` gives all pages, in order of columns; ``fresh``: keys and values ``[T, H, D]`` of
    tokens that come behind them and are in no page yet. ``candidates``: the columns that may be dropped. ``latent``:
    whether the layer keeps latents (see `LayerFacts`). ``replaced``: so many columns at the start are sinks and
    what earlier retention kept; None: nothing has been dropped so far.
    """

    def __init__(
        self,
        layer: int,
        layer_in_group: int,
        parts: Callable[[], Sequence[PagePart]],
        facts: LayerFacts | None,
        candidates: slice,
        fresh: tuple[Tensor, Tensor] | None = None,
        *,
        latent: bool = False,
        replaced: int | None = None,
    ) -> None:
        self.layer = layer
        self._replaced = replaced
        self.candidates = candidates
        self._in_group = layer_in_group
        self._give_parts = parts
        self._facts = facts
        self._fresh = fresh
        self.latent = latent
        self._dense: tuple[Tensor, Tensor] | None = None

    @cached_property
    def _parts(self) -> list[PagePart]:
        return [part for part in self._give_parts() if part.columns]

    def forget(self) -> None:
        """Lets go of the unpacked keys and values; they are unpacked again when they are asked for."""
        self._dense = None

    @property
    def facts(self) -> LayerFacts:
        """How the layer attends; UnsupportedError if it never has."""
        if self._facts is None:
            raise UnsupportedError(
                f"scoring layer {self.layer}", why="it has not attended yet, so its scale is unknown"
            )
        return self._facts

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return int(self._parts[0].addr.shape[0]) if self._parts else int(self._pair()[0].shape[1])

    @property
    def columns(self) -> int:
        """Columns in all."""
        return sum(part.columns for part in self._parts) + (0 if self._fresh is None else self._fresh[0].shape[0])

    @property
    def whole(self) -> bool:
        """Whether nothing has been dropped so far, so that a column's number is its position."""
        return self._replaced is None

    @property
    def latest(self) -> int:
        """How many of the latest positions have columns of their own, the last ones: none of those was dropped."""
        return self.columns - (self._replaced or 0)

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._parts[0].store.arena.device if self._parts else self._pair()[0].device

    @property
    def shown(self) -> Tensor:
        """bool ``[H, columns]``: which columns are tokens, not padding."""
        return self._joined([part.shown for part in self._parts], True, torch.bool)

    @property
    def biased(self) -> bool:
        """Whether any token has a bias."""
        return any(part.bias is not None for part in self._parts)

    @property
    def bias(self) -> Tensor:
        """float32 ``[H, columns]``: the biases of the scores; 0 but for merged tokens."""
        return self._joined([part.bias for part in self._parts], 0.0, torch.float32)

    def keys(self, columns: slice = slice(None)) -> Tensor:
        """Keys ``[H, n, D]`` of some columns, float32, in the model's basis; zeros at padding."""
        return self._read()[0][:, columns]

    def values(self, columns: slice = slice(None)) -> Tensor:
        """Values ``[H, n, Dv]``, as `keys`."""
        return self._read()[1][:, columns]

    def weights(self, q: Tensor, own: Tensor | None = None, among: slice = slice(None)) -> Iterator[Tensor]:
        """Attention weights ``[G, W, n]``, float32, of ``q [W, Hq, D]`` on the columns ``among``, KV head by KV head.

        Without ``own``, the queries are those of the latest ``W`` columns, and see what came before and themselves.
        ``own [N, H, D]``: keys of tokens that come behind all columns, of which the queries are the latest ``W``; what
        they give to those before them and to themselves is part of their softmax, and left out here. Sinks' logits take
        their part too.
        """
        facts, width = self.facts, q.shape[0]
        hidden = ~self.shown[:, among]
        bias, keys = self.bias[:, among].masked_fill(hidden, -torch.inf), self.keys(among)
        count, heads = keys.shape[1], keys.shape[0]
        rows = q.float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [H, G, W, D]
        fresh = width if own is None else own.shape[0]
        late = torch.ones(width, fresh, dtype=torch.bool, device=q.device).triu(fresh - width + 1)
        for head in range(heads):
            scores = self.logits(rows[head], keys[head]) + bias[head]
            if own is None:
                scores[..., count - width :].masked_fill_(late, -torch.inf)
                more = scores.new_empty((*scores.shape[:2], 0))
            else:
                more = self.logits(rows[head], own[:, head].float()).masked_fill(late, -torch.inf)
            if facts.sinks is not None:
                logits = facts.sinks.float().view(heads, -1)[head]
                more = torch.cat((more, logits[:, None, None].expand(-1, width, 1)), dim=-1)
            yield torch.cat((scores, more), dim=-1).softmax(-1)[..., :count]

    def logits(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Scores ``[..., R, n]`` of queries ``rows [..., R, D]`` with ``keys [..., n, D]``, float32: scaled and
        soft-capped, without biases and masks.
        """
        scores = torch.matmul(rows, keys.mT) * self.facts.scale
        softcap = self.facts.softcap
        return scores if softcap is None else torch.tanh(scores / softcap) * softcap

    def page_of(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Page address and slot of columns ``[H, m]`` (numbers, of candidates), each ``[H, m]``."""
        addr = torch.empty_like(columns)
        slot = torch.empty_like(columns)
        begin = 0
        for part in self._parts:
            here = (columns >= begin) & (columns < begin + part.columns)
            local = (columns - begin).clamp(0, max(0, part.columns - 1))
            size = part.store.fmt.block_size
            page = part.addr.gather(1, local // size)
            addr, slot = torch.where(here, page, addr), torch.where(here, local % size, slot)
            begin += part.columns
        return addr, slot

    def _read(self) -> tuple[Tensor, Tensor]:
        if self._dense is None:
            pairs = [self._part(part) for part in self._parts]
            if self._fresh is not None:
                k, v = self._pair()
                pairs.append((k.float().transpose(0, 1), v.float().transpose(0, 1)))
            self._dense = torch.cat([k for k, _ in pairs], dim=1), torch.cat([v for _, v in pairs], dim=1)
        return self._dense

    def _pair(self) -> tuple[Tensor, Tensor]:
        if self._fresh is None:
            raise RuntimeError("a view without columns")
        return self._fresh

    def _part(self, part: PagePart) -> tuple[Tensor, Tensor]:
        heads = part.addr.shape[0]
        # Heads fastest, as the stores count them.
        k, v = part.store.decode_pages(part.addr.T.reshape(-1), self._in_group)
        k, v = (x.float().unflatten(0, (-1, heads)).transpose(0, 1).flatten(1, 2)[:, : part.columns] for x in (k, v))
        if self.latent:
            k, v = torch.cat((k, v), dim=-1), k
        if part.shown is not None:
            k, v = (x.masked_fill(~part.shown[..., None], 0.0) for x in (k, v))
        return k, v

    def _joined(self, given: Sequence[Tensor | None], default: float, dtype: torch.dtype) -> Tensor:
        joined = torch.full((self.kv_heads, self.columns), default, dtype=dtype, device=self.device)
        begin = 0
        for part, values in zip(self._parts, given, strict=True):
            if values is not None:
                joined[:, begin : begin + part.columns] = values
            begin += part.columns
        return joined
