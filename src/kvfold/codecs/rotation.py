"""Orthogonal rotations of head vectors.

A rotation spreads one large coordinate over many, so that a scale per token covers the row well. It is applied to
keys and values once, when they are packed, and to queries and outputs once per step. Nothing is undone per token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvfold.formats import VectorFormat
from kvfold.kernels.cpu import rows
from kvfold.kernels.cpu.rows import Turn


def hadamard_block(dim: int) -> int:
    """The largest power of two that divides ``dim``: the size of the Hadamard blocks."""
    return dim & -dim


def hadamard_matrix(dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The orthogonal block-Hadamard matrix ``[dim, dim]`` (its own transpose and inverse).

    The blocks have the size of the largest power of two that divides ``dim``; an odd ``dim`` gives the identity.
    """
    size = hadamard_block(dim)
    block = torch.ones(1, 1, dtype=torch.float64)
    while block.shape[0] < size:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)), 0)
    blocks = torch.eye(dim // size, dtype=torch.float64)
    return torch.kron(blocks, block / size**0.5).to(dtype=dtype, device=device)


class Basis(Protocol):
    """What stands between vectors as the model makes them and as they are stored.

    ``layer``: place in the group of the layer that all of ``x`` belongs to; None for whole blocks, whose pages come by
    block, layer and head. The last axis of vectors of one layer that is left of ``dim`` counts heads.
    """

    @property
    def is_identity(self) -> bool:
        """Whether stored vectors are the model's own."""
        ...

    @property
    def turn(self) -> Turn:
        """What `store` and `restore` do, for kernels that do it themselves."""
        ...

    def store(self, x: Tensor, layer: int | None) -> Tensor:
        """Pages ``[P, S, dim]`` or rows ``[N, dim]`` of keys or values, heads fastest, as they are stored."""
        ...

    def restore(self, x: Tensor, layer: int | None) -> Tensor:
        """Stored pages ``[P, S, r]`` as the model made them ``[P, S, dim]``."""
        ...

    def query(self, q: Tensor, layer: int) -> Tensor:
        """Queries ``[..., Hq, dim]`` such that their products with stored keys are the scores."""
        ...

    def offset(self, q: Tensor, layer: int) -> Tensor | None:
        """What the products of ``query(q)`` with stored keys all lack of the scores ``[..., Hq]``, float32; None:
        nothing.
        """
        ...

    def output(self, o: Tensor, layer: int) -> Tensor:
        """Sums of stored values ``[..., Hq, r]`` as sums of the model's values ``[..., Hq, dim]``."""
        ...


class Rotation:
    """The `Basis` of one vector format: an orthogonal rotation, the same for all layers and heads. It owns its
    matrices: one per dtype and device it was asked for.

    ``apply`` and ``undo`` work on the last dimension ``[..., dim]``, in the dtype and on the device of their input.
    The identity (format without rotation, raw format, odd ``dim``) returns its input untouched.
    """

    def __init__(self, fmt: VectorFormat) -> None:
        self.dim = fmt.dim
        wanted = fmt.quantized and fmt.rotation == "hadamard"
        self.is_identity = not wanted or hadamard_block(fmt.dim) == 1
        self._matrices: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def turn(self) -> Turn:
        """See `Basis`."""
        return Turn() if self.is_identity else Turn(block=hadamard_block(self.dim))

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The orthogonal matrix ``[dim, dim]``; rows are rotated by ``x @ matrix``."""
        key = (dtype, device)
        found = self._matrices.get(key)
        if found is None:
            if self.is_identity:
                found = torch.eye(self.dim, dtype=dtype, device=device)
            else:
                found = hadamard_matrix(self.dim, dtype, device)
            self._matrices[key] = found
        return found

    def apply(self, x: Tensor) -> Tensor:
        """``x [..., dim]`` in the rotated basis."""
        return x if self.is_identity else x @ self.matrix(x.dtype, x.device)

    def undo(self, x: Tensor) -> Tensor:
        """``x [..., dim]`` of the rotated basis, back in the original one."""
        return x if self.is_identity else x @ self.matrix(x.dtype, x.device).mT

    def store(self, x: Tensor, layer: int | None) -> Tensor:
        """See `Basis`."""
        return self.apply(x)

    def restore(self, x: Tensor, layer: int | None) -> Tensor:
        """See `Basis`."""
        return self.undo(x)

    def query(self, q: Tensor, layer: int) -> Tensor:
        """See `Basis`."""
        return self._turned(q)

    def offset(self, q: Tensor, layer: int) -> None:
        """See `Basis`."""

    def output(self, o: Tensor, layer: int) -> Tensor:
        """See `Basis`."""
        return self._turned(o)

    def _turned(self, x: Tensor) -> Tensor:
        """`apply` for a step's few vectors, natively where that can be; the blocks are their own inverses."""
        learns = x.requires_grad and torch.is_grad_enabled()
        if self.is_identity or x.dtype != torch.float32 or learns or not x.numel() or rows.refuses(x) is not None:
            return self.apply(x)
        return rows.hadamard(x, hadamard_block(self.dim))
