"""The sequences of a drop-in cache, in pages that its copies share."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from kvfold.cache import PagedCache

__all__ = ["HeldSequences"]


class HeldSequences:
    """Sequences ``ids`` in ``pages``, one for each row of a batch. They end with their ``owner``."""

    def __init__(self, owner: object, pages: PagedCache) -> None:
        self.pages = pages
        self.ids: Sequence[int] = ()
        # Not at the end of the process, whose memory goes anyway.
        weakref.finalize(owner, self._discard).atexit = False

    def replace(self, ids: Sequence[int]) -> None:
        """Ends the sequences there are; from now on it is ``ids``."""
        for seq in self.ids:
            self.pages.free(seq)
        self.ids = tuple(ids)

    def forks(self, rows: Sequence[int]) -> list[int]:
        """Forks of these rows, in that order. With an error, none is left."""
        made: list[int] = []
        try:
            for row in rows:
                made.append(self.pages.fork(self.ids[row]))
        except BaseException:
            for seq in made:
                self.pages.free(seq)
            raise
        return made

    def _discard(self) -> None:
        self.pages.discard(self.ids)
