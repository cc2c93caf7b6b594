"""Caches that are made up, not computed: pages of random codes, as a layer of a long and busy cache holds them.

One sequence's keys and values are drawn and encoded; its pages are copied, bit for bit, to every other sequence and
layer. Blocks lie in random order and hold all layers side by side, as in `kvfold.cache`, so that a walk jumps from page
to page through the whole arena.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfold.bench.shapes import AttentionShape
from kvfold.calibration import Calibration, Side
from kvfold.codecs.calibrated import calibrated_bases
from kvfold.codecs.pages import ArenaMemory, PageStore
from kvfold.codecs.rotation import Basis
from kvfold.errors import UnsupportedError
from kvfold.formats import BandFormat, PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.catalog import full_registry
from kvfold.kernels.merge import Piece
from kvfold.kernels.pages import HIDDEN, PagesCall
from kvfold.kernels.reference import attend
from kvfold.recipe import Recipe

__all__ = ["UNPACKS", "Drawn", "PagedCodes", "draw", "exact", "layers_for"]

UNPACKS = "unpack"
"""The variant that reads no codes as they are: torch unpacks them, to the dtype of the store."""

_SWEEP_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MOST_LAYERS = 32
_SHARPEST = 4.0  # standard deviation of the scores in the last row of a group; 1 in the first


@dataclass(frozen=True, slots=True)
class Drawn:
    """What every contestant attends with and over: ``q [B, Hq, D]``, one sequence's ``k, v [Hkv, S, D]`` (latent:
    its latents and rotary keys).
    """

    q: Tensor
    k: Tensor
    v: Tensor


def draw(shape: AttentionShape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Drawn:
    """Random keys and values, and queries whose heads range from flat to sharp attention."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    k, v = (normal(shape.kv_heads, shape.context, dim).to(dtype) for dim in shape.stored_dims)
    sharp = torch.linspace(1.0, _SHARPEST, shape.group, device=device)[:, None]
    q = normal(shape.batch, shape.kv_heads, shape.group, shape.query_dim) * sharp
    return Drawn(q.flatten(1, 2).to(dtype), k, v)


def layers_for(call_bytes: int, device: torch.device) -> int:
    """Layers that a timed sweep walks, one after the other: enough that it is much longer than its start."""
    return min(_MOST_LAYERS, max(1, ceil(_SWEEP_BYTES.get(device.type, _SWEEP_BYTES["cpu"]) / call_bytes)))


def exact(shape: AttentionShape, rows: Tensor, k: Tensor, v: Tensor) -> Piece:
    """The float32 reference: ``rows [B, Hkv, G, D]`` of every sequence over the one ``k, v [Hkv, S, D]``."""
    places = torch.arange(shape.context, device=k.device)
    o, lse = attend(
        rows.flatten(1, 2), k.transpose(0, 1), v.transpose(0, 1), q_pos=places[:1].expand(shape.batch), k_pos=places,
        scale=shape.scale, causal=False,
    )  # fmt: skip
    return o.view(*rows.shape[:-1], -1), lse.view(rows.shape[:-1])


class PagedCodes:
    """Pages of one recipe, all of them packed, and the attention over them that the registry chooses.

    Sinks, the recent window and half-filled blocks belong to sequences: here every page is in the recipe's format.
    """

    def __init__(self, recipe: Recipe, shape: AttentionShape, drawn: Drawn) -> None:
        device, dtype = drawn.k.device, drawn.k.dtype
        self.shape = shape
        fmt = _page_format(recipe, shape, dtype)
        pages = -(-shape.context // recipe.block_size)
        self.bytes_read = shape.batch * shape.kv_heads * pages * _read_bytes(fmt)
        self.layers = layers_for(self.bytes_read, device)
        self._layer_bytes = shape.kv_heads * fmt.page_bytes
        block_bytes = self.layers * self._layer_bytes
        generator = torch.Generator().manual_seed(pages)
        table = torch.randperm(shape.batch * pages, generator=generator).view(shape.batch, pages).to(device)
        heads = torch.arange(shape.kv_heads, device=device) * fmt.page_bytes
        self.addr = (table[:, None, :] * block_bytes + heads[:, None]).contiguous()
        arena = ArenaMemory(table.numel() * block_bytes, device).bytes
        bases = _bases(recipe, fmt, device)
        self.store = PageStore(arena, fmt, dtype, bases=bases, heads=shape.kv_heads, layers=self.layers)
        self._fill(drawn, table)
        self.q = drawn.q
        self._bias: Tensor | None = None
        if hidden := pages * fmt.block_size - shape.context:
            self._bias = torch.zeros(shape.batch, pages * fmt.block_size, device=device)
            self._bias[:, -hidden:] = HIDDEN
        self._registry = full_registry()

    @property
    def variant(self) -> str:
        """Which implementation runs; of the native one, which build."""
        return self.variant_of(self.call(0, self.rows(self.q)))

    def variant_of(self, call: PagesCall) -> str:
        """The same of another call over these pages."""
        name = self._registry.select("attend_pages", call).name
        return f"native {cpu.variants()[0]}" if name == "native" else name

    def __call__(self, layer: int) -> Tensor:
        """What a layer of a model waits for: from its queries to its outputs, rotations in and out included."""
        o = self.attend(layer)[0].flatten(1, 2)
        basis = self.store.k_basis if self.shape.rope else self.store.v_basis
        return basis.output(o, 0).to(self.q.dtype)

    def attend(self, layer: int) -> Piece:
        """``o [B, Hkv, G, D']`` in the basis of the stored values, and ``lse [B, Hkv, G]``."""
        return self.run(self.call(layer, self.rows(self.q)))

    def run(self, call: PagesCall) -> Piece:
        """A call over these pages, by the implementation that the registry chooses."""
        o, lse = self._registry.select("attend_pages", call).run(call)
        return (o[..., : self.shape.head_dim], lse) if call.latent else (o, lse)

    def call(self, layer: int, rows: Tensor, addr: Tensor | None = None) -> PagesCall:
        """The call with query ``rows [n, Hkv, R, D']`` over a layer of the pages ``addr [n, Hkv, P]`` (None: of all
        sequences).
        """
        addr = self.addr if addr is None else addr
        return PagesCall(
            q=rows,
            arena=self.store.arena,
            addr=addr,
            shift=layer * self._layer_bytes,
            fmt=self.store.fmt,
            dtype=self.store.read_dtype,
            scale=self.shape.scale,
            read=partial(self._read, addr, layer),
            bias=None if self._bias is None else self._bias[:1].expand(addr.shape[0], -1),
            latent=bool(self.shape.rope),
        )

    def rows(self, q: Tensor) -> Tensor:
        """``q [n, Hq, D]`` as rows ``[n, Hkv, G, D']`` in the basis of the stored keys."""
        head, tail = q.float().split((self.shape.head_dim, self.shape.rope), dim=-1)
        wide = self.store.k_basis.query(head, 0)
        if self.shape.rope:
            wide = torch.cat((wide, self.store.v_basis.query(tail, 0)), dim=-1)
        rows: Tensor = wide.unflatten(1, (self.shape.kv_heads, -1))
        return rows

    def truth(self) -> Piece:
        """`attend` by the float32 reference, on the same codes decoded in float32."""
        return exact(self.shape, self.rows(self.q), *(x[:, : self.shape.context] for x in self._decoded()))

    def _read(self, addr: Tensor, layer: int, pages: slice) -> tuple[Tensor, Tensor]:
        part = addr[..., pages] + layer * self._layer_bytes
        k, v = self.store.read_k(part), self.store.read_v(part)
        if not self.shape.rope:
            return k, v
        wide = torch.cat((k, v), dim=-1)
        return wide, wide

    def _decoded(self) -> tuple[Tensor, Tensor]:
        """The first sequence's keys and values ``[Hkv, S, D']`` in float32, in the stored basis."""
        store, fmt = self.store, self.store.fmt
        wide = store
        if store.read_dtype != torch.float32 and isinstance(fmt.k, VectorFormat) and isinstance(fmt.v, VectorFormat):
            # A store of float32 decodes codes in float32; raw bytes, of which it would make no sense, it leaves alone.
            sides = (side if side.quantized else VectorFormat.raw(side.code_bytes // 4, 4) for side in (fmt.k, fmt.v))
            wide = PageStore(store.arena, PageFormat(fmt.block_size, *sides), torch.float32)
        addr = self.addr[0]
        k = (wide if fmt.k.quantized else store).read_k(addr)
        v = (wide if fmt.v.quantized else store).read_v(addr)
        k, v = k.float(), v.float()
        return (torch.cat((k, v), dim=-1), k) if self.shape.rope else (k, v)

    def _fill(self, drawn: Drawn, table: Tensor) -> None:
        size = self.store.fmt.block_size
        missing = table.shape[1] * size - self.shape.context
        # Heads are fastest: [Hkv, P * S, D] -> [P * Hkv, S, D]. What fills up the last page is hidden.
        k, v = (
            pad(x, (0, 0, 0, missing)).unflatten(1, (-1, size)).transpose(0, 1).flatten(0, 1)
            for x in (drawn.k, drawn.v)
        )
        self.store.write_pages(self.addr[0].T.reshape(-1), k, v, 0)
        words = self.store.arena.view(torch.int64).view(table.numel(), self.layers, self._layer_bytes // 8)
        written = words[table[0], 0]
        for blocks in table:
            for layer in range(self.layers):
                words[:, layer].index_copy_(0, blocks, written)


def _page_format(recipe: Recipe, shape: AttentionShape, dtype: torch.dtype) -> PageFormat:
    if recipe.calibration is None:
        k_dim, v_dim = shape.stored_dims
        k = recipe.packed_format(k_dim, recipe.k_bits, dtype.itemsize, recipe.scales)
        return PageFormat(recipe.block_size, k, recipe.packed_format(v_dim, recipe.v_bits, dtype.itemsize))
    if not recipe.calibration:
        hint = "name the file: int2.5:calibrated(calibration.safetensors)"
        raise UnsupportedError(f"recipe {recipe}", why="there is no model whose calibration it could mean", hint=hint)
    if shape.rope:
        raise UnsupportedError(f"recipe {recipe}", why="latents have no calibrated code")
    calibration = Calibration.load(recipe.calibration)
    layer = calibration.layers[0]
    sides: tuple[Side, Side] = ("k", "v")
    for side in sides:
        if (found := calibration.shape(layer, side)) != (shape.kv_heads, shape.head_dim):
            why = f"it was made for {found[0]} KV heads of {found[1]} dims"
            raise UnsupportedError(f"recipe {recipe}", why=why, hint="set --kv-heads and --head-dim accordingly")
    k_bands, v_bands = calibration.bands("k", recipe.k_bits or 0), calibration.bands("v", recipe.v_bits or 0)
    banded = (BandFormat(shape.head_dim, bands[layer]) for bands in (k_bands, v_bands))
    return PageFormat(recipe.block_size, *banded)


def _bases(recipe: Recipe, fmt: PageFormat, device: torch.device) -> tuple[Basis, Basis] | None:
    if recipe.calibration is None:
        return None
    first = Calibration.load(recipe.calibration).layers[0]
    return calibrated_bases(recipe.calibration, (first,), fmt, device)


def _read_bytes(fmt: PageFormat) -> int:
    """Bytes of a page that attention has to read: codes, scales and zeros, without the padding."""
    return sum(fmt.block_size * side.code_bytes + side.page_meta_bytes(fmt.block_size) for side in (fmt.k, fmt.v))
