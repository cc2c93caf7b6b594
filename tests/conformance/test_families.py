"""Every model family against its stock path, and its recorded outcome: a regression shows as another outcome."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

from kvfold.errors import UnsupportedError
from kvfold.geometry import Geometry
from kvfold.packed import check_model
from tests.conformance.families import build_model, families, tiny_config
from tests.conformance.run import SCHEDULE, check_family, difference, packed_logits, prompts, stock_logits

EXPECTED = json.loads((Path(__file__).parent / "expected.json").read_text(encoding="utf-8"))
OUTCOMES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(EXPECTED["passed"], ("passed", "")),
    **{name: ("refused", kind) for kind, names in EXPECTED["refused"].items() for name in names},
    **{name: ("skipped", kind) for kind, names in EXPECTED["skipped"].items() for name in names},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only lose by more
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", families())
def test_family(name: str) -> None:
    if name not in OUTCOMES:
        pytest.skip(f"transformers {transformers.__version__} is not the {EXPECTED['transformers']} that was recorded")
    result = check_family(name)
    if result.status == "skipped":
        pytest.skip(f"{result.kind}: {result.reason}")
    if OUTCOMES[name][0] == "skipped":  # it can be looked at here, but nothing is recorded of it
        assert result.status != "failed", result.reason
    else:
        assert (result.status, result.kind) == OUTCOMES[name], result.reason


def test_enough_families_pass() -> None:
    assert len([name for name in EXPECTED["passed"] if "+" not in name]) >= 92


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma2", "gemma3_text", "gpt_oss", "llama", "llama4_text"])
def test_a_wrong_mask_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: with a window of two tokens in every layer it fails by far, and so does the load
    check. Masks that say their window are refused before that.
    """
    model = build_model(tiny_config(name))
    geometry = Geometry.from_config(model.config)
    layers = [
        dataclasses.replace(layer, window=2, kind="latent" if layer.kind == "latent" else "sliding")
        for layer in geometry.layers
    ]
    wrong = dataclasses.replace(geometry, layers=tuple(layers))
    tokens = prompts()
    wanted = [stock_logits(model, ids) for ids in tokens]
    if any(layer.window not in (None, 2) for layer in geometry.layers):
        with pytest.raises(UnsupportedError, match="its mask has a window"):
            check_model(model, wrong)
    monkeypatch.setattr("kvfold.switch.deviation", lambda *_, **__: None)
    assert difference(packed_logits(model, wrong, tokens, SCHEDULE, block_size=8), wanted) > 1e-2
    with pytest.raises(UnsupportedError, match=f"model {geometry.model_type}.*differ from the stock path"):
        check_model(model, wrong)


def test_a_model_is_left_as_it_was() -> None:
    model = build_model(tiny_config("phi3+longrope"))
    tokens = prompts()[2]
    before = stock_logits(model, tokens)
    implementation, hooks = model.config._attn_implementation, len(model.model.rotary_emb._forward_hooks)
    check_model(model, Geometry.from_config(model.config))
    assert torch.equal(stock_logits(model, tokens), before)
    assert model.config._attn_implementation == implementation
    assert len(model.model.rotary_emb._forward_hooks) == hooks
    assert not [key for key in vars(model.config) if "kvfold" in key]
