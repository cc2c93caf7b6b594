"""Expected attention on tiny models, against its formula with the angles of the positions that really come."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from kvfold.retention.method import Notes
from tests.conformance.families import build_model, tiny_config
from tests.retention.rotary_run import Shown, run

TOKENS, AHEAD, EPSILON = 56, 24, 0.02
RECIPE = f"raw,block=4,recent=8+expected_attention(ahead={AHEAD},epsilon={EPSILON},keep=0.5)"
TURNED = {"llama": True, "glm": True, "gpt_oss": True, "gemma2": True, "qwen3": True, "cohere2": False}
"""Whether the full layers of a family turn their queries."""


def rotations(layer: Shown) -> Tensor:
    """``[AHEAD, D, D]``: the rotations of the positions behind the first ``TOKENS``."""
    cos, sin = (x[TOKENS:] for x in layer.rotary)
    dims = layer.q.shape[-1]
    turn = sys.modules[type(layer.module).__module__].apply_rotary_pos_emb
    unit = torch.eye(dims)[None, :, None].expand(1, dims, AHEAD, dims)
    return turn(unit, unit, cos[None], sin[None])[0][0].permute(1, 2, 0)


def wanted(layer: Shown, view, facts, *, turned: bool) -> Tensor:
    """The formula, head by head and key by key."""
    before = layer.before[4:TOKENS].float()
    mean = rotations(layer).mean(0) if turned else torch.eye(before.shape[-1])
    keys, values = view.keys(), view.values()
    group = before.shape[1] // keys.shape[0]
    scores = []
    for head in range(keys.shape[0]):
        weights = []
        for member in range(head * group, (head + 1) * group):
            q = before[:, member]
            middle, covariance = q.mean(0), torch.cov(q.T, correction=0)
            z = []
            for key in keys[head, 4:]:
                turned_key = mean.T @ key
                z.append(facts.scale * middle @ turned_key + facts.scale**2 / 2 * turned_key @ covariance @ turned_key)
            z = torch.stack(z)
            if facts.softcap:
                z = facts.softcap * torch.tanh(z / facts.softcap)
            size = z.exp().sum()
            if facts.sinks is not None:
                size = size + facts.sinks[member].exp()
            weights.append(z.exp() / size)
        scores.append((torch.stack(weights).mean(0) + EPSILON) * values[head, 4:].norm(dim=-1))
    return torch.stack(scores)[:, view.candidates.start - 4 : view.candidates.stop - 4]


@pytest.mark.parametrize("family", TURNED)
@pytest.mark.parametrize("counts", [[TOKENS], [3, 30, 1, 1, 21]], ids=["whole", "chunks"])
def test_scores_are_those_of_the_formula(family, counts):
    model = build_model(tiny_config(family))
    shown = run(model, [TOKENS + AHEAD], RECIPE)[2]
    cache, seq, _ = run(model, counts, RECIPE)
    retainer = cache.retainer
    assert shown
    for layer, given in shown.items():
        view = retainer._view(retainer._group_of[layer], layer, seq, TOKENS, end=11)
        found = retainer.method.score(view, retainer._notes[seq][layer])
        assert found.shape[1] == 40
        torch.testing.assert_close(found, wanted(given, view, view.facts, turned=TURNED[family]), rtol=1e-3, atol=1e-5)


def test_nothing_is_learnt_of_the_first_tokens():
    cache, seq, _ = run(build_model(tiny_config("llama")), [4], RECIPE)
    assert all(notes.values == {} for notes in cache.retainer._notes[seq].values())
    _, _, shown = run(build_model(tiny_config("llama")), [5], RECIPE)
    assert shown


@pytest.mark.parametrize("recipe", ["adakv(expected_attention", "adakv(criticalkv(expected_attention)"])
def test_it_goes_on_behind_what_was_kept(recipe):
    """Composed, over a prompt and decoding, retained twice: all numbers finite, budgets held."""
    model = build_model(tiny_config("llama"))
    cache, seq, _ = run(model, [60, 1, 1], f"int8,block=4,recent=8+{recipe},keep=0.5)")
    assert cache.retain(seq)
    cache.manager.check()
    stats = cache.retainer.stats
    assert stats.blocks_after <= stats.blocks_before / 2 + 1
    notes = cache.retainer._notes[seq]
    assert all(
        isinstance(each, Notes) and all(x.isfinite().all() for x in each.values.values()) for each in notes.values()
    )
