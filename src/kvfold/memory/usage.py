"""What the memory manager reports of itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MemoryStats", "Usage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStats:
    """What has happened since the start. Tokens and blocks."""

    query_tokens: int
    """Prompt tokens of sequences that took blocks from the prefix index."""
    hit_tokens: int
    """Those of them that the index held."""
    sealed_blocks: int
    """Raw blocks that were packed (not those packed at once)."""
    copied_blocks: int
    """Copies on write."""
    evictions: int
    """Cached blocks given up for their room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Where the memory is. Bytes, unless said otherwise."""

    budget: int
    """What may be used in all."""
    arena: int
    """What is allocated for blocks."""
    in_use: int
    """Referenced blocks and block tables."""
    cached: int
    """Unreferenced blocks that can still be found."""
    lent: int
    """Extents that pools hold."""
    extents: int
    """Extents in all, a count."""
    extents_lent: int
    """Extents that pools hold, a count."""
