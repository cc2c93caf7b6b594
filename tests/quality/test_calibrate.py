"""Calibrating a model: the file it makes, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvfold.calibration import Calibration
from kvfold.errors import NumericsError, RequestError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.quality.calibrate import CalibrationReport, calibrate, calibration_passages
from kvfold.quality.calibrate.fit import fit
from kvfold.quality.calibrate.observe import Moments, Observer
from kvfold.recipe import Recipe
from tests.calibrations import SMALL, random_moments, tiny, tokens
from tests.command import Done, command
from tests.engine.tiny_engine import byte_tokenizer, tiny_model

PASSAGES = [tokens(60, seed) for seed in range(4)]


@pytest.fixture(scope="module", params=["llama", "gemma3", "mistral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# == what comes of it


def test_a_calibration_is_written_and_serves_the_model(model: PreTrainedModel, tmp_path: Path) -> None:
    said: list[str] = []
    report = calibrate(model, PASSAGES, tmp_path / "c.safetensors", progress=said.append)
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    found = Calibration.load(tmp_path / "c.safetensors")
    assert found.layers == (0, 1, 2)
    assert all(found.shape(layer, side) == (2, 16) for layer in found.layers for side in ("k", "v"))
    geometry = Geometry.from_config(model.config)
    for bits in ("int8", "int2.5", "k3v2"):
        assert Recipe.parse(f"{bits}:calibrated({tmp_path / 'c.safetensors'})").supports(geometry) == []
    assert said == [*(f"passage {i} of 4" for i in range(1, 5)), "fitting"]
    assert_report(report, found)


def assert_report(report: CalibrationReport, found: Calibration) -> None:
    """The report says what is in the file, and is plain data."""
    assert report.tokens == 240
    assert 0 < report.entropy < np.log(SMALL["vocab_size"])
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    for layer in report.layers:
        assert 1 <= layer.k_rank <= layer.k_dim == 16
        assert 1 <= layer.v_rank <= layer.v_dim == 16
        assert layer.k_bands == found.bands("k", 3)[layer.layer]
    costs = [sum(report.costs[bits]) for bits in ("2", "2.5", "3", "4")]
    assert costs == sorted(costs, reverse=True)
    data = json.loads(json.dumps(report.as_json()))
    assert data["file"] == found.path
    assert set(data["costs"]) == {"2", "2.5", "3", "4"}


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    model = tiny("llama")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        calibrate(model, PASSAGES, tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_model_is_what_it_was(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.tensor([PASSAGES[0]])
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    with torch.no_grad():
        wanted = model(ids).logits
    before = model.config._attn_implementation
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    calibrate(model, PASSAGES[:1], tmp_path / "c")
    assert model.config._attn_implementation == before == "sdpa"
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    frozen.requires_grad_(True)


def test_a_model_on_another_attention_is_put_back_on_it(tmp_path: Path) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    calibrate(model, PASSAGES[:1], tmp_path / "c")
    assert model.config._attn_implementation == "eager"


def test_half_precision_models_can_be_calibrated(tmp_path: Path) -> None:
    calibrate(tiny("llama").to(torch.bfloat16), PASSAGES[:2], tmp_path / "c")
    assert Calibration.load(tmp_path / "c").layers == (0, 1, 2)


def test_a_failure_leaves_model_and_file_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = tiny("llama"), tmp_path / "c"
    file.write_text("the old one")

    def stop(what: str) -> None:
        if what in ("passage 2 of 4", "fitting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, PASSAGES, file, progress=stop)
    assert model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad for p in model.parameters())

    def half(arrays: object, path: Path) -> None:
        path.write_text("half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kvfold.quality.calibrate.run.save_file", half)
        with pytest.raises(RequestError, match="No space left"):
            calibrate(model, PASSAGES[:1], file)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert file.read_text() == "the old one"
    with pytest.raises(RequestError, match="cannot write"):
        calibrate(model, PASSAGES[:1], tmp_path / "no" / "folder")


# == what is refused


def moe(**options: object) -> GptOssConfig:
    return GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, **options)


REFUSED = {
    "softcap": (Gemma2Config(**SMALL, attn_logit_softcapping=5.0), "softcap"),
    "sinks": (moe(), "s_aux"),
    "odd dims": (LlamaConfig(**{**SMALL, "head_dim": 12}), "multiples of 8, not 12"),
    "latent": (
        DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4, "head_dim": 8}, q_lora_rank=24, kv_lora_rank=32, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
            moe_intermediate_size=32, first_k_dense_replace=1,
        ),
        "layers 0, 1, 2 keep latents",
    ),
    "recurrent": (MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=99), "recurrent"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_observed_is_refused_by_its_reason(which: str, tmp_path: Path) -> None:
    config, says = REFUSED[which]
    model = build(config)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError) as refused:
        calibrate(model, PASSAGES[:1], tmp_path / "c")
    assert "calibration" in refused.value.what
    assert says in refused.value.why
    assert not list(tmp_path.iterdir())
    assert model.config._attn_implementation == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_hides_its_attention_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(UnsupportedError, match="layer 0 does not hand its keys and values"):
        calibrate(model, PASSAGES[:1], tmp_path / "c")


def test_nothing_to_calibrate_on_is_refused(tmp_path: Path) -> None:
    for passages in ([], [[]], [PASSAGES[0], []]):
        with pytest.raises(RequestError, match="nothing"):
            calibrate(tiny("llama"), passages, tmp_path / "c")


def test_a_model_that_answers_nan_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        calibrate(model, PASSAGES[:1], tmp_path / "c")
    assert not list(tmp_path.iterdir())


# == observing and fitting


def test_keys_and_values_are_those_of_the_cache(model: PreTrainedModel) -> None:
    from transformers import DynamicCache

    observer = Observer(model)
    try:
        observer.observe(PASSAGES[0], torch.Generator().manual_seed(0))
    finally:
        observer.release()
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([PASSAGES[0]]), past_key_values=cache)
    for layer, sides in observer.moments.items():
        for moments, kept in zip(sides, (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
            assert moments.count == 60
            wide = kept[0].double()
            assert torch.allclose(moments.vectors, wide.mT @ wide, rtol=1e-3, atol=1e-3)
            assert torch.allclose(moments.rows[0].float(), kept[0], atol=1e-2)
            assert (torch.linalg.eigvalsh(moments.gradients)[:, -1] > 0).all()


def test_the_basis_decorrelates_and_sorts() -> None:
    moments = random_moments(2, 32)
    arrays = fit(moments)
    encode, decode = arrays["encode"].double(), arrays["decode"].double()
    assert torch.allclose(encode @ decode, torch.eye(32, dtype=torch.float64).expand(2, 32, 32), atol=1e-4)
    second = encode.mT @ (moments.vectors / moments.count) @ encode
    assert torch.allclose(second, torch.eye(32, dtype=torch.float64).expand(2, 32, 32), atol=1e-3)
    fisher = decode @ (moments.gradients / moments.count) @ decode.mT
    weight = fisher.diagonal(dim1=1, dim2=2)
    assert torch.allclose(fisher, torch.diag_embed(weight), atol=1e-3 * float(weight.max()))
    assert (weight.diff(dim=1) <= 1e-3 * weight[:, :1]).all()
    nothing = arrays["distortion"][:, 3].double()
    assert torch.allclose(nothing, weight / 2, rtol=0.05, atol=1e-4 * float(weight.max()))


def test_more_bits_round_finer() -> None:
    arrays = fit(random_moments(2, 16))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in arrays.values())
    assert (arrays["distortion"].diff(dim=1) > 0).all()  # 8, 4, 2 and no bits
    assert (arrays["step"].diff(dim=1) > 0).all()


@pytest.mark.parametrize("dead", ["vectors", "gradients", "both"])
def test_a_head_that_does_nothing_stays_finite(dead: str) -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 100, 16), torch.randn(2, 100, 16)
    if dead in ("vectors", "both"):
        x[1] = 0
    if dead in ("gradients", "both"):
        gradient[1] = 0
    moments = Moments.zero(2, 16, torch.device("cpu"))
    moments.add(x, gradient)
    arrays = fit(moments)
    assert all(tensor.isfinite().all() for tensor in arrays.values())
    assert (arrays["distortion"][1] < 1e-6).all()


# == passages


def test_passages_of_a_text_are_spread_over_it() -> None:
    text = "".join(chr(97 + i // 100) for i in range(1000))
    found = calibration_passages(byte_tokenizer(), text=text, tokens=330, length=100, seed=0)
    assert {len(passage) for passage in found} <= {50, 100}  # some of them are halved
    joined = byte_tokenizer().decode([token for passage in found for token in passage])
    assert len(joined) == 300
    assert [joined[i] for i in (0, 100, 200)] == ["a", "d", "g"]


def test_without_a_text_there_are_code_questions_and_prose() -> None:
    tokenizer = byte_tokenizer()
    found = calibration_passages(tokenizer, text=None, tokens=6 * 400, length=400, seed=1)
    assert 0.7 * 2400 < sum(map(len, found)) <= 2400
    assert all(0 < len(passage) <= 400 for passage in found)
    texts = [tokenizer.decode(passage) for passage in found]
    assert sum(text.startswith("user:") for text in texts) == 2
    again = byte_tokenizer()
    again.chat_template = None
    bare = calibration_passages(again, text=None, tokens=6 * 400, length=400, seed=1)
    assert not any(tokenizer.decode(passage).startswith("user:") for passage in bare)
    assert len([passage for passage in bare if passage in found]) >= 4  # the same for the same seed


def test_short_passages() -> None:
    found = calibration_passages(byte_tokenizer(), text=None, tokens=6 * 16, length=16, seed=2)
    assert sum(map(len, found)) == 6 * 16
    assert all(0 < len(passage) <= 16 for passage in found)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(RequestError, match="a text of 11 tokens") as refused:
        calibration_passages(byte_tokenizer(), text="eleven here", tokens=99, length=12, seed=0)
    assert "--length" in refused.value.hint


# == the command


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    return command(capsys, monkeypatch, "calibrate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 40)
    (folder / "short.txt").write_text("too short")
    return folder


def test_the_command_writes_a_file_and_a_table(kvfold: Callable[..., Done], folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    text = ("--model", folder, "--text", folder / "text.txt", "--tokens", 300, "--length", 100)
    done = kvfold(*text, "-o", file)
    assert done.returncode == 0, done.stderr
    assert Calibration.load(file).layers == (0, 1)
    assert f"int2.5:calibrated({file})" in done.stdout
    assert "99 %" in done.stdout


def test_json_is_all_of_stdout(kvfold: Callable[..., Done], folder: Path, tmp_path: Path) -> None:
    options = ("--model", folder, "--tokens", 300, "--length", 5000, "-o", tmp_path / "c", "--json", "-")
    done = kvfold(*options)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["file"] == str(tmp_path / "c")
    assert data["tokens"] == 512  # a passage is no longer than the model's context
    assert len(data["layers"]) == 2
    done = kvfold(*options[:-1], tmp_path / "c.json", "--text", folder / "text.txt")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "c.json").read_text())["tokens"] == 512


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-o", "{folder}"), ["it is a folder", "hint"]),
        (("-o", "{folder}/no/c.safetensors"), ["there is no folder", "hint"]),
        (("-o", "{folder}/c", "--text", "{folder}/short.txt"), ["a text of 9 tokens", "--length"]),
        (("-o", "{folder}/c", "--text", "{folder}/none.txt"), ["none.txt", "hint"]),
        (("-o", "{folder}/c", "--json", "{folder}/no/c.json"), ["no folder", "hint"]),
        (("-o", "{folder}/c", "--length", "3"), ["--length"]),
        ((), ["--output"]),
    ],
)
def test_bad_options_are_one_clear_error(
    kvfold: Callable[..., Done], folder: Path, options: tuple[str, ...], says: list[str]
) -> None:
    done = kvfold("--model", folder, *(option.format(folder=folder) for option in options))
    assert done.returncode == 2
    assert not done.stdout
    assert "Traceback" not in done.stderr
    for words in says:
        assert words in done.stderr
    assert not (folder / "c").exists()


def test_help_says_how(kvfold: Callable[..., Done]) -> None:
    done = kvfold("--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert "--output" in done.stdout
