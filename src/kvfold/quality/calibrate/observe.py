"""Keys, values, and how much the output depends on each of them, observed on the model's own forward and backward.

The cost of small errors ``e`` in the cache is ``e' F e / 2`` nats of KL divergence, where ``F`` is the Fisher
information: the second moment of the gradient of the log-probability of a token drawn from the model itself. Because
the draws at different positions are independent, one backward pass from the sum over all positions gives a sample for
every key and value of a passage at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvfold.errors import NumericsError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.switch import attention_configs

__all__ = ["Moments", "Observer"]

_NAME = "kvfold-observe"
_KEYWORD = "kvfold_observed"
_ROWS_PER_PASSAGE = 1024


@dataclass(slots=True)
class Moments:
    """Of one side of one layer: second moments of vectors and of gradients ``[H, D, D]``, the vectors themselves
    ``[H, D]`` (sums, float64), and a sample of them ``[H, n, D]``.
    """

    vectors: Tensor
    gradients: Tensor
    sums: Tensor
    count: int = 0
    rows: list[Tensor] = field(default_factory=list)

    @classmethod
    def zero(cls, heads: int, dim: int, device: torch.device) -> Moments:
        """Nothing observed yet."""
        zero = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)
        return cls(zero, zero.clone(), zero[:, 0].clone())

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Vectors ``[H, T, D]`` and what the log-probabilities' sum depends on them."""
        wide, steep = x.double(), gradient.double()
        self.vectors += wide.mT @ wide
        self.gradients += steep.mT @ steep
        self.sums += wide.sum(1)
        self.count += x.shape[1]
        self.rows.append(x[:, :: max(1, x.shape[1] // _ROWS_PER_PASSAGE)].float().cpu())


class Observer:
    """Observes a model's keys and values passage by passage. The model computes as it does; its weights get no
    gradients, and everything is put back by :meth:`release`.

    UnsupportedError if it cannot be served, keeps latents, or its attention is none that PyTorch's fused function
    computes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.geometry = Geometry.from_config(model.config)
        self.model = model
        stored = [layer for layer in self.geometry.layers if layer.stores]
        reasons = self.geometry.unsupported()
        latent = [str(layer.index) for layer in stored if layer.kind == "latent"]
        if latent:
            reasons.append(f"layers {', '.join(latent)} keep latents, for which there is no calibrated code")
        if reasons:
            raise UnsupportedError(f"calibration of {self.geometry.model_type}", reasons)
        odd = sorted({dim for layer in stored for dim in (layer.k_dim, layer.v_dim) if dim % 8})
        if odd:
            why = f"head dims must be multiples of 8, not {', '.join(map(str, odd))}"
            raise UnsupportedError(f"calibration of {self.geometry.model_type}", why=why)
        device = model.device
        self.moments = {
            layer.index: (
                Moments.zero(layer.kv_heads, layer.k_dim, device),
                Moments.zero(layer.kv_heads, layer.v_dim, device),
            )
            for layer in stored
        }
        self._trained = [parameter.requires_grad for parameter in model.parameters()]
        self._attention = [(config, config._attn_implementation_internal) for config in attention_configs(model)]
        AttentionInterface.register(_NAME, _observed_attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        for config, _ in self._attention:
            config._attn_implementation_internal = _NAME
        model.requires_grad_(False)

    def release(self) -> None:
        """Puts the model back as it was."""
        for config, before in self._attention:
            config._attn_implementation_internal = before
        for parameter, trained in zip(self.model.parameters(), self._trained, strict=True):
            parameter.requires_grad_(trained)

    def observe(self, tokens: Sequence[int], generator: torch.Generator) -> float:
        """Adds a passage. Returns the model's entropy on it, in nats per token. NumericsError if that is not finite."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.enable_grad():
            # Gradients start at the embeddings: the weights themselves need none.
            inputs = self.model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = self.model(inputs_embeds=inputs, use_cache=False, **{_KEYWORD: seen}).logits[0]
            scores = logits.float().log_softmax(-1)
            chances = scores.detach().exp()
            if not bool(torch.isfinite(chances).all()):
                hint = "check the weights, or calibrate in float32"
                raise NumericsError("calibration", why="the model's logits are not finite", hint=hint)
            drawn = torch.multinomial(chances.cpu(), 1, generator=generator).to(scores.device)
            scores.gather(-1, drawn).sum().backward()
        for layer, sides in self.moments.items():
            if [x.shape[1] for x in seen.get(layer, ())] != [moments.vectors.shape[0] for moments in sides]:
                why = f"layer {layer} does not hand its keys and values to an attention function of transformers"
                raise UnsupportedError(f"calibration of {self.geometry.model_type}", why=why)
            for moments, x in zip(sides, seen[layer], strict=True):
                moments.add(x.detach()[0], (torch.zeros_like(x) if x.grad is None else x.grad)[0])
        return float(-(chances * scores.detach()).sum(-1).mean())


def _observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """PyTorch's fused attention, as transformers calls it; keeps the first keys and values of each layer."""
    seen: dict[int, tuple[Tensor, Tensor]] | None = kwargs.pop(_KEYWORD, None)
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if seen is None or unknown:
        why = f"it uses {', '.join(unknown)}" if unknown else "the model does not hand keyword arguments down to it"
        raise UnsupportedError(f"calibration through the attention of {type(module).__name__}", why=why)
    layer = _layer_of(module)
    if layer not in seen:
        for x in (key, value):
            x.retain_grad()
        seen[layer] = (key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _layer_of(module: nn.Module) -> int:
    """The layer whose keys and values a module attends to."""
    shared = getattr(module, "kv_shared_layer_index", None)
    return int(getattr(module, "layer_idx", 0) if shared is None else shared)
