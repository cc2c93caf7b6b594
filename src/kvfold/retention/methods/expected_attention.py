"""Expected Attention (arXiv 2510.00636): what queries to come are expected to attend to stays.

Queries ``[T, Hq, D]`` of the prompt, their rotation undone, have the mean ``m [Hq, D]`` and the covariance ``C [Hq, D,
D]``; the first four tokens, which are unlike others, do not count. With ``R`` the mean of the rotations of the next
``ahead`` positions, those to come are about normal with mean ``R m`` and covariance ``R C R'``, and so

    ``z[h, g, i] = scale * k[h, i] . R m[h, g] + scale^2 / 2 * k[h, i] . R C[h, g] R' k[h, i]``
    ``s[h, i] = (mean_g softmax_i z[h, g, i] + epsilon) * |v[h, i]|``

with the softmax over all tokens but the first four, and sinks' logits. Where scores have a soft cap, ``z`` gets it.
Statistics go on through decoding, where the paper takes the latest queries only, and ``|v|`` stands for the paper's
``|W_o v|``, as in its code; see criticalkv for the other. No query of its own decides on a token: given the context
alone the result can be shared. Frees all but the kept share; costs ``4 Hq D^2`` bytes a layer while a sequence lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import Tensor, nn

from kvfold.retention.method import Notes, RetentionMethod, Seen
from kvfold.retention.rope import Rotation, followed, mean_ahead, rotary_refusals
from kvfold.retention.view import LayerView

if TYPE_CHECKING:
    from kvfold.geometry import Geometry

__all__ = ["ExpectedAttention"]

_FIRST: Final = 4
"""Tokens at the start that are left out of statistics and of the softmax."""


@dataclass(frozen=True)
class ExpectedAttention(RetentionMethod):
    """Keeps what normal queries of the next ``ahead`` positions look at, times the size of its values."""

    ahead: int = 512
    epsilon: float = 0.02

    watches: ClassVar[int | None] = None
    wants_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ahead < 1 or self.epsilon < 0:
            raise ValueError("ahead must be positive, and epsilon not negative")

    def refusals(self, geometry: Geometry) -> list[str]:
        """Latent layers, whose rotary part is turned in ways of its own."""
        latent = [str(layer.index) for layer in geometry.layers if layer.kind == "latent"]
        why = "keep latents, and their queries are turned in part, which expected_attention cannot foresee"
        return [f"layers {', '.join(latent)} {why}"] if latent else []

    def model_refusals(self, model: nn.Module) -> list[str]:
        """Rotary embeddings that are not as usual."""
        return rotary_refusals(model)

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Adds the new queries to mean and covariance."""
        skip = max(0, _FIRST - (seen.view.columns - seen.q.shape[0]))
        q = seen.q[skip:].float()
        if not q.shape[0]:
            return
        if seen.rotary is not None:
            cos, sin = (x[skip:].float() for x in seen.rotary)
            rotation = Rotation.of(seen.view.facts.module)
            if "width" not in notes.values:
                hidden = None if seen.hidden is None else seen.hidden[skip:]
                notes.values["width"] = torch.tensor(rotation.width(q, cos, sin, hidden))
            notes.values["phases"] = followed(notes.values.get("phases"), cos, sin)
            if int(notes.values["width"]):
                q = rotation.undone(q, cos, sin, int(notes.values["width"]))
        _add(notes, q)

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """Expected weights times the size of values."""
        mean, covariance = self._ahead(view, notes)
        keys, heads, facts = view.keys(), view.kv_heads, view.facts
        bias = view.bias.masked_fill(~view.shown, -torch.inf)
        bias[:, :_FIRST] = -torch.inf
        weights = []
        for head in range(heads):
            mine = slice(head * mean.shape[0] // heads, (head + 1) * mean.shape[0] // heads)
            k = keys[head]
            z = facts.scale * mean[mine] @ k.T  # [G, columns]
            z = z + facts.scale**2 / 2 * ((k @ covariance[mine]) * k).sum(-1)
            if facts.softcap is not None:
                z = torch.tanh(z / facts.softcap) * facts.softcap
            z = z + bias[head]
            if facts.sinks is not None:
                z = torch.cat((z, facts.sinks[mine, None].float()), dim=-1)
            weights.append(z.softmax(-1).mean(0)[view.candidates])
        sizes: Tensor = view.values(view.candidates).norm(dim=-1)
        return (torch.stack(weights) + self.epsilon) * sizes

    def _ahead(self, view: LayerView, notes: Notes) -> tuple[Tensor, Tensor]:
        """Mean ``[Hq, D]`` and covariance ``[Hq, D, D]`` of the queries to come."""
        mean, covariance = notes.values["mean"], notes.values["covariance"]
        if width := int(notes.values.get("width", 0)):
            cos, sin = (x.to(mean.device) for x in mean_ahead(notes.values["phases"], self.ahead))
            turn = Rotation.of(view.facts.module).matrix(mean.shape[-1], cos, sin, width)
            mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
        return mean, covariance


def _add(notes: Notes, q: Tensor) -> None:
    """Merges the queries ``[T, Hq, D]`` into the statistics (Chan's update, which loses no digits)."""
    mean, count = q.mean(0), q.shape[0]
    off = (q - mean).transpose(0, 1)
    covariance = off.transpose(1, 2) @ off / count
    if "count" in notes.values:
        old, count = notes.values["mean"], count + int(notes.values["count"])
        gap, share = mean - old, q.shape[0] / count
        between = share * (1 - share) * gap[:, :, None] * gap[:, None, :]
        covariance = (1 - share) * notes.values["covariance"] + share * covariance + between
        mean = old + share * gap
    notes.values |= {"mean": mean, "covariance": covariance, "count": torch.tensor(count)}
