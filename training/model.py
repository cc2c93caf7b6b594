"""The model in the form it trains fastest on a CPU; the same arithmetic as ``LlamaForCausalLM``.

The projections that share an input are one matrix each, and everything runs in bfloat16 on copies of the float32
weights, which avoids most of the casts that automatic mixed precision makes.  `to_llama` gives the weights their
transformers names.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 768
    rope_theta: float = 100_000.0
    positions: int = 4096
    eps: float = 1e-5

    def llama_config(self, pad: int, bos: int, end: int) -> dict[str, Any]:
        """Keyword arguments of the equivalent ``LlamaConfig``."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": True,
            "pad_token_id": pad,
            "bos_token_id": bos,
            "eos_token_id": end,
        }

    def to_json(self) -> dict[str, Any]:
        """The sizes as plain values."""
        return asdict(self)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout that transformers uses."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.norm_in = nn.Parameter(torch.ones(shape.hidden))
        self.norm_mlp = nn.Parameter(torch.ones(shape.hidden))
        self.qkv = nn.Parameter(torch.empty(width, shape.hidden))
        self.out = nn.Parameter(torch.empty(shape.hidden, shape.heads * shape.head_dim))
        self.gate_up = nn.Parameter(torch.empty(2 * shape.mlp, shape.hidden))
        self.down = nn.Parameter(torch.empty(shape.hidden, shape.mlp))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.shape
        batch, length, _ = x.shape
        h = F.rms_norm(x, (s.hidden,), self.norm_in.to(x.dtype), s.eps)
        qkv = F.linear(h, self.qkv.to(x.dtype)).view(batch, length, -1, s.head_dim)
        qk, v = qkv.split((s.heads + s.kv_heads, s.kv_heads), dim=2)
        q, k = _rotate(qk, cos, sin).split((s.heads, s.kv_heads), dim=2)
        group = s.heads // s.kv_heads
        k, v = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), self.out.to(x.dtype))
        h = F.rms_norm(x, (s.hidden,), self.norm_mlp.to(x.dtype), s.eps)
        gate, up = F.linear(h, self.gate_up.to(x.dtype)).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down.to(x.dtype))


class Decoder(nn.Module):
    """The whole model; `forward` gives hidden states, `logits` the scores of chosen positions."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.empty(shape.vocabulary, shape.hidden))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # The matrices that write to the residual stream start smaller, by the number of such writes.
                std = 0.04 / (2 * shape.layers) ** 0.5 if name.endswith(("out", "down")) else 0.04
                nn.init.normal_(parameter, std=std, generator=generator)
        self._start_looking_back(generator)
        inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.positions).float(), inverse)[None, :, None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def _start_looking_back(self, generator: torch.Generator) -> None:
        """Start from weights that can already look things up, roughly; training does the rest.

        Left to itself a model spends millions of tokens before its heads find the previous token and match on it.
        One embedding coordinate starts equal for all tokens, which gives queries and keys a constant part, and the
        rotary embedding turns a constant part into "look n tokens back".  The first layer's heads start so, for n from
        one to four, as does half of the second's; the other half starts matching each token against what the first
        head saw, through the slowly turning coordinates, and copies what it finds.
        """
        s = self.shape
        if s.layers < 2 or s.heads != 2 * s.kv_heads or s.kv_heads != 2 or s.head_dim != 64 or s.hidden < 128:
            return  # laid out for these sizes only; others start at random
        half, fast, slow = s.head_dim // 2, 5, 20
        # Equal lengths, so that the constant part is still constant after normalization.
        self.embed *= 0.04 * s.hidden**0.5 / self.embed.norm(dim=1, keepdim=True)
        self.embed[:, 0] = 0.32
        angle = s.rope_theta ** (-torch.arange(fast).float() / half)
        # The later the layer, the smaller the constant part has become beside what the layers before have added.
        for layer, offsets, strength in ((self.blocks[0], (1, 2, 3, 4), 0.85), (self.blocks[1], (1, 3), 1.3)):
            queries = layer.qkv[: s.heads * s.head_dim].view(s.heads, s.head_dim, -1)
            keys = layer.qkv[s.heads * s.head_dim :].view(2 * s.kv_heads, s.head_dim, -1)
            # What the tokens are must not disturb where a head looks.
            queries[: len(offsets)] *= 0.2
            keys[: len(offsets) // 2] *= 0.2
            for head, offset in enumerate(offsets):
                queries[head, :fast, 0] = strength * torch.cos(offset * angle)
                queries[head, half : half + fast, 0] = -strength * torch.sin(offset * angle)
                keys[head // 2, :fast, 0] = strength
                keys[head // 2, half : half + fast, 0] = 0.0

        def orthonormal() -> Tensor:
            square = torch.randn(s.hidden, s.head_dim, generator=generator)
            return torch.linalg.qr(square).Q.T.contiguous()  # rows: head_dim directions of the residual stream

        seen, stored, copied = orthonormal(), orthonormal(), orthonormal()
        seen[:, 0] = stored[:, 0] = copied[:, 0] = 0.0
        first, second = self.blocks[0], self.blocks[1]
        value = (s.heads + s.kv_heads) * s.head_dim
        first.qkv[value : value + s.head_dim] = seen
        first.out *= 0.3
        first.down *= 0.3
        first.out[:, : s.head_dim] = 0.1 * stored.T
        rows = torch.cat((torch.arange(slow, half), torch.arange(half + slow, s.head_dim)))
        pick = torch.linalg.qr(torch.randn(s.head_dim, len(rows), generator=generator)).Q.T
        key = s.heads * s.head_dim + s.head_dim
        second.qkv[key : key + s.head_dim] *= 0.2
        second.qkv[key + rows] = 2.0 * pick @ stored
        for head in (2, 3):
            second.qkv[head * s.head_dim : (head + 1) * s.head_dim] *= 0.2
            second.qkv[head * s.head_dim + rows] = 3.0 * pick @ seen
            second.out[:, head * s.head_dim : (head + 1) * s.head_dim] = 0.25 * copied.T
        second.qkv[value + s.head_dim : value + 2 * s.head_dim] = copied

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = F.embedding(ids, self.embed.to(dtype))
        cos, sin = (t[:, : ids.shape[1]].to(dtype) for t in (self.cos, self.sin))
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.rms_norm(x, (self.shape.hidden,), self.norm.to(dtype), self.shape.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, from the tied embedding."""
        return F.linear(hidden, self.embed.to(hidden.dtype))


def to_llama(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Rename and split the weights to what ``LlamaForCausalLM`` loads."""
    out = {"model.embed_tokens.weight": state["embed"], "model.norm.weight": state["norm"]}
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for index in range(shape.layers):
        source, target = f"blocks.{index}.", f"model.layers.{index}."
        query, key, value = state[source + "qkv"].split((q, kv, kv))
        gate, up = state[source + "gate_up"].chunk(2)
        out |= {
            target + "input_layernorm.weight": state[source + "norm_in"],
            target + "post_attention_layernorm.weight": state[source + "norm_mlp"],
            target + "self_attn.q_proj.weight": query,
            target + "self_attn.k_proj.weight": key,
            target + "self_attn.v_proj.weight": value,
            target + "self_attn.o_proj.weight": state[source + "out"],
            target + "mlp.gate_proj.weight": gate,
            target + "mlp.up_proj.weight": up,
            target + "mlp.down_proj.weight": state[source + "down"],
        }
    return {name: tensor.contiguous() for name, tensor in out.items()}
