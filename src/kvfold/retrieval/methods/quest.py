"""Quest (arXiv 2406.10774): the pages that a query can care for most are read, the others stay unread.

A page carries the least and greatest number of each key channel, ``m, M [D]`` (rotary phases in, as decoded). The bound
``s = max_g sum_d max(q_gd m_d, q_gd M_d)`` over the query heads ``g`` of a KV head is at least every score of its
tokens; the ``pages`` pages with the greatest are read, each KV head its own. The paper keeps bounds in the model's
dtype, has one query head to a KV head and pages of 16 tokens; here bounds are bfloat16 rounded outward, and sinks and
recent tokens are read beside the chosen pages. Frees no memory: it reads less.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.kernels.merge import Piece
from kvfold.retrieval.method import PagesView, RetrievalMethod

__all__ = ["Quest"]


@dataclass(frozen=True)
class Quest(RetrievalMethod):
    """Reads the ``pages`` pages with the greatest bounds."""

    def attend(self, view: PagesView) -> Piece:
        """Attention over the best pages."""
        return view.attend(view.best(self.pages))
