"""Finding blocks again by what they hold: chained hashes of token ids, and the index from hash to block.

The hash of a block covers every token up to its end, so one hit speaks for the whole prefix; a hit is nevertheless
confirmed on the block's own token ids, which the entry keeps.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from kvfold.memory.table import State

__all__ = ["BlockHash", "PrefixEntry", "PrefixIndex", "block_hash", "chain", "root_hash", "token_bytes"]

BlockHash = bytes
"""32 bytes: sha256 over the parent's hash and the block's token ids."""

TOKEN_BYTES: Final = 8
"""A token id in a hash: a little endian int64."""


def root_hash(fingerprint: bytes, salt: bytes) -> BlockHash:
    """The parent of every first block: what model and recipe made the blocks, and who may share them."""
    return hashlib.sha256(b"kvfold prefix\0" + hashlib.sha256(fingerprint).digest() + salt).digest()


def block_hash(parent: BlockHash, tokens: bytes) -> BlockHash:
    """The hash of a block after ``parent`` that holds ``tokens`` (as `token_bytes`)."""
    return hashlib.sha256(parent + tokens).digest()


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little endian int64, 8 bytes each."""
    if isinstance(tokens, array) and tokens.typecode == "q" and sys.byteorder == "little":
        return tokens.tobytes()
    return np.asarray(tokens, dtype="<i8").tobytes()


def chain(root: BlockHash, tokens: Sequence[int], block_size: int) -> Iterator[tuple[BlockHash, bytes]]:
    """``(hash, token bytes)`` of each whole block of ``tokens``, in order."""
    width = block_size * TOKEN_BYTES
    parent, data = root, token_bytes(tokens)
    for begin in range(0, len(data) - width + 1, width):
        piece = data[begin : begin + width]
        parent = block_hash(parent, piece)
        yield parent, piece


class PrefixEntry(NamedTuple):
    """A findable block: its pool's state, its id, and the token ids it holds (as `token_bytes`)."""

    state: State
    block: int
    tokens: bytes


class PrefixIndex:
    """From (group, hash) to the one block that holds it. Holds no references: it is told when a block is recycled."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, BlockHash], PrefixEntry] = {}
        self._hash_of: dict[tuple[int, State, int], BlockHash] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, group: int, key: BlockHash, tokens: bytes) -> PrefixEntry | None:
        """The block of ``group`` with this hash, if it holds exactly ``tokens``."""
        entry = self._entries.get((group, key))
        return entry if entry is not None and entry.tokens == tokens else None

    def get(self, group: int, key: BlockHash) -> PrefixEntry | None:
        """The block that stands under this hash."""
        return self._entries.get((group, key))

    def put(self, group: int, key: BlockHash, entry: PrefixEntry) -> None:
        """Makes a block findable. Neither the hash nor the block may be in the index."""
        where = (group, entry.state, entry.block)
        if (group, key) in self._entries or where in self._hash_of:
            raise ValueError(f"block {where} or its hash is in the prefix index")
        self._entries[group, key] = entry
        self._hash_of[where] = key

    def forget(self, group: int, state: State, block: int) -> None:
        """The block no longer holds what the index says."""
        del self._entries[group, self._hash_of.pop((group, state, block))]

    def blocks(self) -> Iterator[tuple[int, State, int]]:
        """(group, state, block id) of every findable block."""
        return iter(tuple(self._hash_of))

    def check(self) -> None:
        """Raises AssertionError unless both directions of the index say the same."""
        back = {(group, key): (entry.state, entry.block) for (group, key), entry in self._entries.items()}
        forth = {(group, key): (state, block) for (group, state, block), key in self._hash_of.items()}
        if back != forth:
            raise AssertionError("the prefix index disagrees with itself")
