"""How pages are laid out in bytes, and which blocks of a sequence are raw, packed or gone.

Plain arithmetic on frozen data: no torch. This is the single truth for sizes and for the rules of sealing and release;
the memory manager that allocates blocks and the planner that predicts bytes both call it.

A page, in bytes (each region padded to 16, the page to 64)::

    [K codes  S x k.code_bytes][K meta  S x k.groups x (scale, zero) bf16][V codes][V meta][summary]

With scales of channels, the meta of a page is a row of scales and a row of zeros, ``2 x D'`` bf16. The summary is there
for retrieval only: the least and the greatest number of each channel of the keys, ``2 x D`` bf16.

Codes of one token: 8 bits, one byte a dim; 4 bits, byte ``j`` holds dim ``j`` (low nibble) and dim ``j + D'/2``; 2
bits, byte ``j`` holds dims ``j, j + D'/4, j + 2D'/4, j + 3D'/4`` from low to high bits (``D' = stored_dim``).
Splitting by halves and quarters means that unpacking needs no interleave.

Banded codes (`BandFormat`) are cut into bands of one width each, the widest first, every band packed as above; their
meta is one byte a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import ClassVar, Final, Literal, NamedTuple

from kvfold.errors import BudgetError

__all__ = [
    "PAGE_ALIGN",
    "REGION_ALIGN",
    "TABLE_ENTRY_BYTES",
    "BandFormat",
    "BlockCounts",
    "PageFormat",
    "Rotation",
    "Scales",
    "VectorFormat",
    "block_counts",
    "first_live",
    "format_bytes",
    "parse_bytes",
    "sealed_until",
    "sink_blocks",
]

Rotation = Literal["hadamard", "none"]
Scales = Literal["token", "channel"]

REGION_ALIGN: Final = 16
"""Each region of a page starts at a multiple of this many bytes."""

PAGE_ALIGN: Final = 64
"""A page is a multiple of this many bytes: one cache line."""

TABLE_ENTRY_BYTES: Final = 8
"""What the block table spends on each live block of a sequence."""

_META_BYTES: Final = 4  # scale and zero of one group of dims, bf16 each
_SUMMARY_BYTES: Final = 4  # least and greatest of one channel, bf16 each
_QUANTIZED_BITS: Final = (2, 4, 8)
_RAW_BITS: Final = (8, 16, 32, 64)


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True, slots=True)
class VectorFormat:
    """How one key or value vector of ``dim`` numbers is stored.

    Raw (``quantized=False``): ``bits`` is the width of the model dtype, ``group`` and ``rotation`` mean nothing.
    Quantized: ``bits`` a code (8, 4 or 2), and a (scale, zero) pair for each token and group of at most ``group`` dims;
    with ``scales="channel"`` for each dim of a page instead, over all of its tokens (``group`` then means nothing).
    """

    dim: int
    bits: int
    quantized: bool
    group: int
    rotation: Rotation
    scales: Scales = "token"

    def __post_init__(self) -> None:
        if self.dim < 1 or self.group < 1:
            raise ValueError(f"dim and group must be positive, got dim={self.dim}, group={self.group}")
        if self.bits not in (_QUANTIZED_BITS if self.quantized else _RAW_BITS):
            raise ValueError(f"{self.bits} bits is no {'quantized' if self.quantized else 'raw'} width")
        if self.rotation not in ("hadamard", "none"):
            raise ValueError(f"unknown rotation {self.rotation!r}")
        if self.scales not in ("token", "channel") or (self.scales == "channel" and not self.quantized):
            raise ValueError(f"unknown scales {self.scales!r} of a {'quantized' if self.quantized else 'raw'} format")

    @classmethod
    def raw(cls, dim: int, dtype_bytes: int) -> VectorFormat:
        """``dim`` numbers as they are, of a dtype of ``dtype_bytes`` bytes."""
        return cls(dim=dim, bits=8 * dtype_bytes, quantized=False, group=dim, rotation="none")

    @property
    def movable(self) -> bool:
        """Whether the codes of a token mean the same in any page: false when the page has the scales."""
        return self.scales == "token"

    @property
    def groups(self) -> int:
        """Groups of dims, each with its own scale and zero for every token; 0 when raw, 1 with scales of channels."""
        if not self.quantized:
            return 0
        return -(-self.dim // min(self.group, self.dim)) if self.movable else 1

    @property
    def stored_dim(self) -> int:
        """``dim`` padded (with dims that hold nothing) so that groups are equally wide and codes fill whole bytes."""
        return _align(self.dim, 8 // self.bits * self.groups) if self.quantized else self.dim

    @property
    def group_width(self) -> int:
        """Stored dims in a group: dim ``d`` belongs to group ``d // group_width``. ``dim`` when raw."""
        return self.stored_dim // self.groups if self.quantized else self.dim

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's codes (of its numbers, when raw)."""
        return self.stored_dim * self.bits // 8

    @property
    def meta_bytes(self) -> int:
        """Bytes of one token's scales and zeros; 0 when they are its page's."""
        return _META_BYTES * self.groups if self.movable else 0

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes, codes and meta, without the padding of the page and what the page has of its own."""
        return self.code_bytes + self.meta_bytes

    def page_meta_bytes(self, block_size: int) -> int:
        """Bytes of the scales and zeros of a page of ``block_size`` tokens."""
        return block_size * self.meta_bytes if self.movable else _META_BYTES * self.stored_dim


@dataclass(frozen=True, slots=True)
class BandFormat:
    """How a key or value vector of ``dim`` numbers is stored in a calibrated basis that is sorted by importance.

    ``bands``: ``(bits, dims)`` from the leading dims on, bits falling; what is left of ``dim`` is dropped. Steps are
    static and belong to the basis, so the only meta is one byte a token: how far its codes are stretched.
    """

    dim: int
    bands: tuple[tuple[int, int], ...]

    quantized: ClassVar[bool] = True
    movable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        widths = [bits for bits, _ in self.bands]
        if not self.bands or any(bits not in _QUANTIZED_BITS for bits in widths) or sorted(widths)[::-1] != widths:
            raise ValueError(f"bands must have falling widths of 8, 4 and 2 bits, got {self.bands}")
        if any(dims < 1 or dims * bits % 8 for bits, dims in self.bands) or self.stored_dim > self.dim:
            raise ValueError(f"bands must fill whole bytes and no more than {self.dim} dims, got {self.bands}")

    @property
    def stored_dim(self) -> int:
        """Dims that are kept: the rank."""
        return sum(dims for _, dims in self.bands)

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's codes."""
        return sum(bits * dims for bits, dims in self.bands) // 8

    @property
    def meta_bytes(self) -> int:
        """The byte of the stretch."""
        return 1

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes, codes and meta, without the padding of the page."""
        return self.code_bytes + self.meta_bytes

    def page_meta_bytes(self, block_size: int) -> int:
        """Bytes of the stretches of a page of ``block_size`` tokens."""
        return block_size * self.meta_bytes


@dataclass(frozen=True, slots=True)
class PageFormat:
    """The layout of a page: ``block_size`` tokens of one KV head in one layer, keys then values.

    ``summary_dims``: width of the keys, in the model's basis, whose bounds the page carries for retrieval (of latent
    pages: of both regions side by side); 0: it carries none, and takes no byte for it.
    """

    block_size: int
    k: VectorFormat | BandFormat
    v: VectorFormat | BandFormat
    summary_dims: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")
        if self.summary_dims not in (0, self.k.dim, self.k.dim + self.v.dim):
            raise ValueError(f"a summary has the dims of keys, {self.k.dim}, got {self.summary_dims}")

    @property
    def k_codes_offset(self) -> int:
        """Byte offset of the key codes ``[S, k.code_bytes]`` within the page."""
        return 0

    @property
    def k_meta_offset(self) -> int:
        """Byte offset of the key scales and zeros ``[S, k.groups, 2]`` (of channels: ``[2, k.stored_dim]``), bf16."""
        return _align(self.block_size * self.k.code_bytes, REGION_ALIGN)

    @property
    def v_codes_offset(self) -> int:
        """Byte offset of the value codes ``[S, v.code_bytes]``."""
        return self.k_meta_offset + _align(self.k.page_meta_bytes(self.block_size), REGION_ALIGN)

    @property
    def v_meta_offset(self) -> int:
        """Byte offset of the value scales and zeros, as those of the keys."""
        return self.v_codes_offset + _align(self.block_size * self.v.code_bytes, REGION_ALIGN)

    @property
    def movable(self) -> bool:
        """Whether tokens can be stored and copied one by one; else pages are written and copied whole."""
        return self.k.movable and self.v.movable

    @property
    def summary_offset(self) -> int:
        """Byte offset of the bounds of the keys' channels, ``[2, summary_dims]`` bf16: the least, the greatest."""
        return self.v_meta_offset + _align(self.v.page_meta_bytes(self.block_size), REGION_ALIGN)

    @property
    def summary_bytes(self) -> int:
        """Bytes of the bounds of the keys' channels."""
        return _SUMMARY_BYTES * self.summary_dims

    @property
    def page_bytes(self) -> int:
        """Bytes of the whole page, a multiple of 64."""
        return _align(self.summary_offset + _align(self.summary_bytes, REGION_ALIGN), PAGE_ALIGN)


def sink_blocks(sinks: int, block_size: int) -> int:
    """Blocks at the start of a sequence that hold a sink and therefore never seal."""
    return -(-sinks // block_size)


def sealed_until(length: int, block_size: int, sinks: int, recent: int) -> int:
    """End of the sealed range of a sequence of ``length`` stored tokens.

    Blocks ``i`` with ``sink_blocks(sinks, block_size) <= i < sealed_until(...)`` are packed: whole, free of sinks,
    and wholly behind the ``recent`` latest tokens. All other live blocks are raw. Never falls as ``length`` grows.
    """
    return max(sink_blocks(sinks, block_size), (length - recent) // block_size)


def first_live(length: int, block_size: int, kind: str, window: int | None) -> int:
    """First block of a sequence of ``length`` stored tokens that a later query can still read.

    The next query stands at position ``length``. A sliding layer lets it read positions ``> length - window``, a
    chunked one positions ``>= length // window * window``; blocks that lie wholly before are released. Other kinds
    release nothing.
    """
    if window is None or kind not in ("sliding", "chunked"):
        return 0
    if kind == "chunked":
        return length // window * window // block_size
    return max(0, (length - window + 1) // block_size)


class BlockCounts(NamedTuple):
    """Live blocks of one sequence in one group, by state."""

    raw: int
    packed: int


def block_counts(
    length: int, *, block_size: int, kind: str, window: int | None, sinks: int, recent: int, packs: bool
) -> BlockCounts:
    """Live raw and packed blocks of a sequence of ``length`` stored tokens; ``packs``: the group has a packed
    format.
    """
    blocks = -(-length // block_size)
    start = first_live(length, block_size, kind, window)
    packed = 0
    if packs:
        packed = max(0, sealed_until(length, block_size, sinks, recent) - max(start, sink_blocks(sinks, block_size)))
    return BlockCounts(raw=blocks - start - packed, packed=packed)


_BINARY: Final = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_DECIMAL: Final = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(size: str | int) -> int:
    """Bytes in a size such as ``2GiB``, ``512MiB``, ``1.5GB`` or a plain number; fractions of a byte are cut off.

    KiB, MiB, GiB, TiB count in powers of 1024; KB, MB, GB, TB in powers of 1000. Case and spaces do not matter.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise BudgetError(f"bad size {size}", why="a size cannot be negative")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = match[2].lower() if match else ""
    scale = _BINARY.get(unit) or _DECIMAL.get(unit)
    if match is None or scale is None:
        why = f"no unit {match[2]!r} is known" if match else "not a number with a unit"
        raise BudgetError(f"bad size {size!r}", why=why, hint="write 2GiB, 512MiB, 1.5GB or a number of bytes")
    return int(Decimal(match[1]) * scale)


def format_bytes(n: int) -> str:
    """``n`` bytes for people, in the largest fitting power of 1024, two decimals unless exact: ``512 B``, ``1.50
    GiB``.
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _BINARY[unit.lower()]
        if abs(n) >= scale:
            text = f"{n // scale}" if n % scale == 0 else f"{n / scale:.2f}"
            return f"{text} {unit}"
    return f"{n} B"
