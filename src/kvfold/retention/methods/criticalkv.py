"""CriticalKV (arXiv 2502.03805): half of what stays is chosen by attention, half by what it does to the output.

``w[h, i] = mean_g sum_e |(v[h, i] W_o[h, g])_e|``: values ``[H, n, Dv]`` through the output projection ``[Hq, Dv, E]``
of the query heads ``g`` that read them. Of a head that keeps ``B`` tokens, the best ``B / 2`` by the inner method's
score ``s`` stay, and of the others the best ``B / 2`` by ``(s + 1e-4) * w``. Latent layers have ``W_uv W_o`` for
``W_o``.

Such sets of growing ``B`` lie in one another, so the two stages are one order of the tokens, whatever ``B`` is; the
score of the token with rank ``r`` in it is the ``r``-th greatest ``s``. Methods around this one so deal to heads by the
inner scores, as the paper's variant of Ada-KV does. Scores below zero are taken from the lowest one up. That of
expected_attention has the size of values in it already. Frees what the inner method does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from kvfold.errors import UnsupportedError
from kvfold.retention.method import Composed, Notes
from kvfold.retention.modules import attention_modules
from kvfold.retention.view import LayerView

__all__ = ["CriticalKV"]

_EPSILON: Final = 1e-4
_OUTPUTS: Final = ("o_proj", "out_proj", "dense", "c_proj", "attention_out", "Wo")
"""Names of output projections in the attention modules of transformers."""

_NUMBERS: Final = 2**22
"""Numbers of projected values held at once."""


@dataclass(frozen=True)
class CriticalKV(Composed):
    """Orders tokens by score, and by score times the size of what their values add to the output."""

    def model_refusals(self, model: nn.Module) -> list[str]:
        """As the inner method, and attention without an output projection that can be read."""
        lacking = {type(each).__name__ for each in attention_modules(model) if _projection(each) is None}
        reasons = [f"{name} has no output projection that criticalkv knows" for name in sorted(lacking)]
        return [*self.inner.model_refusals(model), *reasons]

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """The inner scores, handed out anew in the order of both stages."""
        shown = view.shown[:, view.candidates]
        scores = self.inner.score(view, notes).float()
        base = scores - scores.masked_fill(~shown, torch.inf).amin(1, keepdim=True).clamp_max(0)
        weighed = ((base + _EPSILON) * _sizes(view)).masked_fill(~shown, -torch.inf)
        scores = scores.masked_fill(~shown, -torch.inf)
        order = torch.tensor(
            [_both(*pair) for pair in zip(_falling(scores).tolist(), _falling(weighed).tolist(), strict=True)],
            dtype=torch.int64,
            device=scores.device,
        )
        return torch.empty_like(scores).scatter_(1, order, scores.sort(dim=1, descending=True).values)


def _falling(scores: Tensor) -> Tensor:
    """Numbers ``[H, n]`` of the candidates, best first; of equal ones the later."""
    return scores.shape[1] - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)


def _both(first: list[int], second: list[int]) -> list[int]:
    """All candidates, so that the leading ``2 m`` are the ``m`` best of ``first`` and the ``m`` best others of
    ``second``, for every ``m``.
    """
    taken = [False] * len(first)
    order: list[int] = []
    rest = iter(second)
    for m, best in enumerate(first, 1):
        if not taken[best]:
            taken[best] = True
            order.append(best)
        while len(order) < min(2 * m, len(first)):
            other = next(rest)
            if not taken[other]:
                taken[other] = True
                order.append(other)
    return order


def _projection(module: nn.Module) -> Tensor | None:
    """The output projection ``[Hq * Dv, E]`` of an attention module; None if there is none that can be read."""
    for name in _OUTPUTS:
        layer = getattr(module, name, None)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
            return weight if type(layer).__name__ == "Conv1D" else weight.T
    return None


def _sizes(view: LayerView) -> Tensor:
    """``w [H, n]`` of the candidates."""
    module, values = view.facts.module, view.values(view.candidates)
    weight = _projection(module)
    if weight is None:
        raise UnsupportedError(f"criticalkv on {type(module).__name__}", why="it has no output projection")
    per_head = _of_latents(module, weight) if view.latent else weight.unflatten(0, (-1, values.shape[-1]))
    group, step = per_head.shape[0] // values.shape[0], max(1, _NUMBERS // weight.shape[1])
    sizes = values.new_zeros(values.shape[:2])
    for i, matrix in enumerate(per_head):
        matrix, own = matrix.float(), values[i // group]
        sizes[i // group] += torch.cat([(part @ matrix).abs().sum(-1) for part in own.split(step)]) / group
    return sizes


def _of_latents(module: nn.Module, weight: Tensor) -> Tensor:
    """``W_uv W_o [Hq, rank, E]`` of a latent layer."""
    heads = int(module.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    out = weight.unflatten(0, (heads, -1)).float()
    up: Tensor = module.kv_b_proj.weight.unflatten(0, (heads, -1))  # type: ignore[union-attr, operator]
    return torch.matmul(up[:, -out.shape[1] :].float().transpose(1, 2), out)
