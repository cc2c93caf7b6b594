"""Rotary embeddings undone and foreseen, against the model's own, in every layout of pairs there is."""

from __future__ import annotations

import pytest
import torch

from kvfold.errors import UnsupportedError
from kvfold.retention.rope import Rotation, followed, mean_ahead, rotary_refusals
from tests.conformance.families import build_model, tiny_config
from tests.retention.rotary_run import Shown, run

TOKENS, AHEAD = 56, 24
FAMILIES = {
    "llama": "halves of the head, all dims",
    "glm": "neighbours, some dims",
    "gpt_oss": "(cos, sin) of half a width, sink logits",
    "phi": "some dims, cut off by the module",
    "gemma2": "soft-capped scores",
    "qwen3": "normalized queries",
    "cohere2": "full layers without positions",
    "gemma3n_text": "one vector a call",
}


def positions_angles(rate: torch.Tensor, start: int, count: int) -> torch.Tensor:
    return rate * torch.arange(start, start + count, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[1500], [700, 1, 1, 798], [300, 1200], [2, *[1] * 1498]])
def test_frequencies_are_learnt_from_rounded_angles(counts, dtype):
    rate = 1e5 ** (-torch.arange(32, dtype=torch.float64) / 32)
    phases, start = None, 4
    for count in counts:
        angles = positions_angles(rate, start, count)
        phases = followed(phases, (1.3 * angles.cos()).to(dtype), (1.3 * angles.sin()).to(dtype))
        start += count
    ahead = positions_angles(rate, start, 512)
    cos, sin = mean_ahead(phases, 512)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((cos - 1.3 * ahead.cos().mean(0)).abs().max()) < tolerance
    assert float((sin - 1.3 * ahead.sin().mean(0)).abs().max()) < tolerance


def test_tokens_that_are_rolled_back_do_not_mislead():
    rate = 1e4 ** (-torch.arange(16, dtype=torch.float64) / 16)

    def seen(phases: torch.Tensor | None, start: int, count: int) -> torch.Tensor:
        angles = positions_angles(rate, start, count)
        return followed(phases, angles.cos().float(), angles.sin().float())

    phases = seen(seen(None, 0, 400), 400, 1)
    for start, count in ((380, 1), (381, 30), (350, 20)):
        phases = seen(phases, start, count)
        assert float((phases[1] - rate).abs().max()) < 1e-5
        assert float((phases[2] - positions_angles(rate, start + count - 1, 1)[0]).sin().abs().max()) < 1e-6


@pytest.fixture(scope="module", params=FAMILIES, ids=FAMILIES)
def shown(request) -> list[Shown]:
    """What the full layers of a tiny model are shown of ``TOKENS + AHEAD`` tokens."""
    model = build_model(tiny_config(request.param))
    assert rotary_refusals(model) == []
    return list(run(model, [TOKENS + AHEAD])[2].values())


def test_queries_are_turned_back_to_their_projection(shown):
    assert shown
    for layer in shown:
        rotation, (cos, sin) = Rotation.of(layer.module), layer.rotary
        width = rotation.width(layer.q, cos, sin, layer.hidden)
        found = rotation.undone(layer.q, cos, sin, width) if width else layer.q
        torch.testing.assert_close(found, layer.before, rtol=1e-4, atol=1e-5)


def test_the_mean_rotation_is_the_mean_of_the_rotations(shown):
    for layer in shown:
        rotation, (cos, sin) = Rotation.of(layer.module), layer.rotary
        width = rotation.width(layer.q, cos, sin, layer.hidden)
        if not width:
            continue
        vector = layer.q[:1]
        turned = [rotation._turned(vector, cos[[i]], sin[[i]], width)[0] for i in range(TOKENS, TOKENS + AHEAD)]
        phases = followed(None, cos[4:TOKENS], sin[4:TOKENS])
        matrix = rotation.matrix(vector.shape[-1], *mean_ahead(phases, AHEAD), width)
        torch.testing.assert_close(vector[0] @ matrix.T, torch.stack(turned).mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2", "no rotary embedding"),
        ("gptj", "no rotary embedding"),
        ("llama4_text", "no rotary embedding"),
        ("llama+dynamic", "change with the length"),
        ("phi3+longrope", "change with the length"),
        ("cohere_compass_text", "several dimensions"),
    ],
)
def test_other_rotations_are_refused(family, why):
    model = build_model(tiny_config(family))
    assert any(why in reason for reason in rotary_refusals(model))


def test_a_width_that_does_not_go_with_the_heads_is_refused():
    module = next(m for m in build_model(tiny_config("llama")).modules() if type(m).__name__ == "LlamaAttention")
    angles = torch.zeros(3, 24)
    with pytest.raises(UnsupportedError, match="24 dims does not go with heads of 16"):
        Rotation.of(module).width(torch.ones(3, 4, 16), angles.cos(), angles.sin(), None)
    with pytest.raises(UnsupportedError, match="no rotary embedding"):
        Rotation.of(torch.nn.Linear(2, 2))
