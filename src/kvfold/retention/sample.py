"""A sample of a sequence's own queries, boundedly many: the latest, and others spread evenly over all before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvfold.errors import UnsupportedError
from kvfold.retention.method import Notes, Seen

__all__ = ["QuerySample"]

_LATEST: Final = "sample.latest"
_SPREAD: Final = "sample.spread"
_COUNT: Final = "sample.count"  # queries seen so far, and the distance of those that are spread


@dataclass(frozen=True, slots=True)
class QuerySample:
    """The ``latest`` queries, and at most ``spread`` at equal distances, which double whenever there are more."""

    latest: int
    spread: int

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Takes new queries in; those of a repetition of the context are left out."""
        if seen.replay is not None:
            return
        q, noted = seen.q, notes.values
        before, stride = noted[_COUNT].tolist() if _COUNT in noted else (0, 1)
        spread = torch.cat((noted.get(_SPREAD, q[:0]), q[-before % stride :: stride] if self.spread else q[:0]))
        while spread.shape[0] > self.spread:
            spread, stride = spread[::2], stride * 2
        late = torch.cat((noted.get(_LATEST, q[:0]), q))
        noted[_LATEST] = late[max(0, late.shape[0] - self.latest) :].clone()
        noted[_SPREAD] = spread.clone()
        noted[_COUNT] = torch.tensor((before + q.shape[0], stride))

    def queries(self, notes: Notes) -> Tensor:
        """All that is noted, ``[W, Hq, D]``; UnsupportedError if nothing is."""
        found = [notes.values[name] for name in (_LATEST, _SPREAD) if name in notes.values]
        if not any(each.numel() for each in found):
            why = "none of its queries was seen since retention last ran"
            raise UnsupportedError("merging tokens of a sequence", why=why)
        return torch.cat(found)

    def importance(self, notes: Notes) -> Tensor:
        """Factors ``[W]`` for the weights of `queries`, with which the latest together count (in squares) as much as
        the others together, where those are more.
        """
        late, others = (notes.values[name].shape[0] for name in (_LATEST, _SPREAD))
        factors = torch.ones(late + others, device=notes.values[_LATEST].device)
        factors[:late] = max(1.0, others / max(1, late)) ** 0.5
        return factors

    @staticmethod
    def forget(notes: Notes) -> None:
        """Lets the sample go; it begins anew."""
        for name in (_LATEST, _SPREAD, _COUNT):
            notes.values.pop(name, None)
