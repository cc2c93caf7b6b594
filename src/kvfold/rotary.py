"""Rotary embeddings whose factors depend on the length of a sequence (longrope, dynamic NTK).

transformers takes the length from the largest position of a forward. That is right for one sequence in one forward. A
paged step holds several sequences, and often a part of each, so it says under which length each of them stands:

- **longrope** has a limit. Up to it, all tokens of a sequence are rotated by its short factors; beyond it, all by its
  long ones. At the switch, keys in the cache are of the wrong factors, and the sequence is read again.
- **dynamic NTK** widens its frequencies with the length. Keys in the cache keep theirs: the tokens of a prompt are
  rotated by the length of the prompt, a generated token by the length with it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["NO_ROTARY_LENGTHS", "Lengths", "RopeGuard", "RotaryLengths"]

_NEVER: Final = 2**40
"""A limit that no sequence gets to."""


class Lengths(NamedTuple):
    """What the rotary factors of a sequence follow from: tokens of its ``prompt``, and ``known`` tokens in all,
    computed or not. ``fixed``: every token has the factors of the prompt, at whatever position.
    """

    prompt: int
    known: int
    fixed: bool = False

    @classmethod
    def whole(cls, length: int) -> Lengths:
        """Those of a sequence whose ``length`` tokens are rotated as in one forward."""
        return cls(length, length, fixed=True)


@dataclass(frozen=True, slots=True)
class RotaryLengths:
    """How the rotary factors of a model depend on the length. ``limits``: the greatest lengths under short factors
    (longrope, one for each kind of layer), ascending. ``unscaled``: the greatest length under the frequencies that
    dynamic NTK starts with; None: it has none.
    """

    limits: tuple[int, ...] = ()
    unscaled: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> RotaryLengths:
        """Those of the rotary embeddings among a model's modules."""
        limits: set[int] = set()
        unscaled: set[int] = set()
        for module in _modules(model):
            for layer_type, kind in _kinds(module):
                if kind == "longrope":
                    limits.add(_limit(module, layer_type))
                elif _dynamic(kind):
                    unscaled.add(int(module.original_max_seq_len))  # type: ignore[arg-type]
        return cls(tuple(sorted(limits)), min(unscaled, default=None))

    def __bool__(self) -> bool:
        """Whether any factor depends on the length."""
        return bool(self.limits) or self.unscaled is not None

    def switches(self, length: int) -> bool:
        """Whether a sequence that gets to ``length`` tokens is to be read again."""
        return length - 1 in self.limits

    def key(self, lengths: Lengths) -> bytes:
        """Names the factors that the keys of a sequence are stored under. Two sequences may share keys if it is equal;
        empty: those of a short sequence.
        """
        over = sum(lengths.known > limit for limit in self.limits)
        scaled = lengths.prompt if self.unscaled is not None and lengths.prompt > self.unscaled else 0
        return b"%d,%d" % (over, scaled) if over or scaled else b""

    def salted(self, salt: bytes, lengths: Lengths) -> bytes:
        """A salt of the prefix index that is another one for other factors; ``salt`` itself for those of a short
        sequence.
        """
        key = self.key(lengths) if self else b""
        return hashlib.sha256(b"%d:%b%b" % (len(salt), salt, key)).digest() if key else salt


NO_ROTARY_LENGTHS: Final = RotaryLengths()
"""Of a model whose rotary factors depend on positions alone."""


class RopeGuard:
    """Evaluates the rotary embeddings of a model that depend on the length sequence by sequence.

    A forward hook on each such module computes its result for every segment of a packed row again, on copies of the
    module: dynamic frequencies otherwise stay as wide as the longest sequence so far made them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._segments: Sequence[int] = ()
        self._lengths: Sequence[Lengths] | None = None
        self._copies = {module: _Evaluator(module) for module in _modules(model)}
        self._hooks = [module.register_forward_hook(self._per_segment, with_kwargs=True) for module in self._copies]

    @contextmanager
    def over(self, segments: Sequence[int], lengths: Sequence[Lengths] | None = None) -> Iterator[None]:
        """``segments``: token counts of the sequences packed in the row, in order; ``lengths``: what their factors
        follow from. None: each segment is a whole sequence, or has the factors of its last token.
        """
        self._segments, self._lengths = segments, lengths
        try:
            yield
        finally:
            self._segments, self._lengths = (), None

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _per_segment(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._segments:
            return output
        _forget_length(module)  # what this packed row has made of it is no other forward's business
        given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        evaluator, layer_type, positions = self._copies[module], given.get("layer_type"), given["position_ids"]
        if not evaluator.depends(layer_type):
            return output
        spans: list[tuple[int, int]] = []
        for i, part in enumerate(positions.split(list(self._segments), dim=-1)):
            lengths = Lengths.whole(int(part.max()) + 1) if self._lengths is None else self._lengths[i]
            spans += evaluator.spans(part, layer_type, lengths)
        joined = [(length, sum(n for _, n in group)) for length, group in groupby(spans, key=lambda span: span[0])]
        parts = [
            evaluator.evaluate(given["x"], part, layer_type, length)
            for part, (length, _) in zip(positions.split([n for _, n in joined], dim=-1), joined, strict=True)
        ]
        if isinstance(output, Tensor):
            return torch.cat(parts, dim=-2)
        return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True))


class _Evaluator:
    """Copies of a rotary embedding that are set to a length: the result for any positions, under any length."""

    def __init__(self, module: nn.Module) -> None:
        self._kinds = dict(_kinds(module))
        self._limits = {name: _limit(module, name) for name, kind in self._kinds.items() if kind == "longrope"}
        self._own = _copied(module)
        self._short = _copied(module)
        if self._limits:
            self._short.config = _without_limit(module.config)
        self._starts = int(getattr(module, "original_max_seq_len", 0))

    def depends(self, layer_type: str | None) -> bool:
        """Whether the result for a type of layer depends on the length."""
        return layer_type in self._limits or _dynamic(self._kinds.get(layer_type))

    def spans(self, positions: Tensor, layer_type: str | None, lengths: Lengths) -> list[tuple[int, int]]:
        """Under which lengths the tokens at ``positions [..., T]`` of a sequence are rotated: (length, tokens), in
        order. Lengths that give the same result are named by one of them.
        """
        count = positions.shape[-1]
        if layer_type in self._limits:
            return [(self._limits[layer_type] + 1 if lengths.known > self._limits[layer_type] else 0, count)]
        if lengths.fixed or lengths.known <= self._starts:
            return [(self._scale(lengths.prompt), count)]
        places = positions.reshape(-1, count)[0].tolist()
        each = [self._scale(lengths.prompt if at < lengths.prompt else at + 1) for at in places]
        return [(length, len(list(group))) for length, group in groupby(each)]

    def evaluate(self, x: Tensor, positions: Tensor, layer_type: str | None, length: int) -> Any:
        """What the module gives for ``positions [..., T]`` under a length that `spans` has named."""
        if layer_type in self._limits:
            return self._longrope(x, positions, layer_type, length)
        return self._scaled(x, positions, layer_type, length)

    def _scale(self, length: int) -> int:
        return length if length > self._starts else 0

    def _longrope(self, x: Tensor, positions: Tensor, layer_type: str | None, length: int) -> Any:
        if not length:
            return self._short.forward(x, position_ids=positions, **_named(layer_type))
        # One more position, beyond the limit, brings the long factors; its row is dropped.
        beyond = torch.cat((positions, positions.new_full((*positions.shape[:-1], 1), length - 1)), dim=-1)
        found = self._own.forward(x, position_ids=beyond, **_named(layer_type))
        return found[..., :-1, :] if isinstance(found, Tensor) else tuple(part[..., :-1, :] for part in found)

    def _scaled(self, x: Tensor, positions: Tensor, layer_type: str | None, length: int) -> Any:
        module = self._own
        kinds = module.rope_type
        _forget_length(module)
        try:
            if length:
                at_end = torch.full_like(positions[..., :1], length - 1)
                module.forward(x, position_ids=at_end, **_named(layer_type))
            module.rope_type = dict.fromkeys(kinds, "set") if isinstance(kinds, dict) else "set"  # no more changes
            return module.forward(x, position_ids=positions, **_named(layer_type))
        finally:
            module.rope_type = kinds


def _named(layer_type: str | None) -> dict[str, str]:
    return {} if layer_type is None else {"layer_type": layer_type}


def _modules(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model that depend on the length."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "forward") and any(kind == "longrope" or _dynamic(kind) for _, kind in _kinds(module))
    ]


def _kinds(module: nn.Module) -> list[tuple[str | None, object]]:
    """The kinds of rotary embedding that a module evaluates: of all layers (None), or for each type of layer."""
    rope_type = getattr(module, "rope_type", None)
    return list(rope_type.items()) if isinstance(rope_type, dict) else [(None, rope_type)]


def _dynamic(kind: object) -> bool:
    return isinstance(kind, str) and "dynamic" in kind


def _limit(module: nn.Module, layer_type: str | None) -> int:
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    parameters = parameters if layer_type is None else parameters[layer_type]
    return int(parameters["original_max_position_embeddings"])


def _copied(module: nn.Module) -> Any:
    """A rotary embedding with tensors of its own. Its ``forward`` is called directly, so that no hook runs."""
    found = copy.copy(module)
    found._buffers = {name: None if x is None else x.clone() for name, x in module._buffers.items()}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            setattr(found, name, value.clone())
    return found


def _without_limit(config: Any) -> Any:
    """A config whose longrope stays at its short factors."""
    found = copy.copy(config)
    found.rope_parameters = copy.deepcopy(config.rope_parameters)
    for part in (found.rope_parameters, *found.rope_parameters.values()):
        if isinstance(part, dict) and "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = _NEVER
    if hasattr(found, "original_max_position_embeddings"):
        found.original_max_position_embeddings = _NEVER
    return found


def _forget_length(module: nn.Module) -> None:
    """Sets a dynamic rotary embedding, of one or of several layer types, back to the frequencies it was made with."""
    for layer_type, kind in _kinds(module):
        prefix = "" if layer_type is None else f"{layer_type}_"
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if _dynamic(kind) and isinstance(original, Tensor):
            device = getattr(module, f"{prefix}inv_freq").device
            module.register_buffer(f"{prefix}inv_freq", original.to(device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", getattr(module, "original_max_seq_len", 0))
