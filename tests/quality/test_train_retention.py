"""Training a scorer: it foretells better than a constant, its file is checked, and the method serves with it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.engine.loading import load
from kvfold.errors import ModelError, RequestError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.quality.train_retention import HeadFit, LayerFit, TrainingReport, train_retention, training_passages
from kvfold.quality.train_retention.collect import LayerPairs, collect
from kvfold.quality.train_retention.fit import fit_layer, log_scores
from kvfold.recipe import Recipe
from kvfold.report import training_report
from kvfold.retention.scorer import Scorer, TokenMap
from tests.calibrations import tiny, tokens
from tests.command import Done, command
from tests.engine.tiny_engine import byte_tokenizer, tiny_model
from tests.retention.replaying import INSTRUCTION, next_logits, read, repeat, runner_of, scores

PASSAGES = [tokens(160, seed) for seed in range(8)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def trained(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> TrainingReport:
    file = tmp_path_factory.mktemp("scorers") / "scorer.safetensors"
    return train_retention(model, PASSAGES, file, instruction=INSTRUCTION, width=16)


# == learning


def test_it_foretells_better_than_a_constant(trained: TrainingReport) -> None:
    assert [layer.layer for layer in trained.layers] == [0, 1, 2]
    heads = [head for layer in trained.layers for head in layer.heads]
    assert len(heads) == 6
    assert sum(head.r2 for head in heads) / 6 > 0.1
    assert sum(head.spearman for head in heads) / 6 > 0.3
    assert trained.tokens == 1280
    assert trained.held_out == 160
    assert trained.bytes == Path(trained.file).stat().st_size
    assert json.loads(json.dumps(trained.as_json()))["layers"][0]["heads"][0]["r2"] == trained.layers[0].heads[0].r2


def test_pairs_are_what_a_layer_is_given_and_what_kvzip_finds(model: PreTrainedModel) -> None:
    pairs = collect(model, PASSAGES[:2], INSTRUCTION)
    runner = runner_of(model, "raw+kvzip(keep=1.0)")
    seq = read(runner, PASSAGES[1])
    repeat(runner, seq, PASSAGES[1])
    with torch.no_grad():
        entering = model(torch.tensor([PASSAGES[1]]), output_hidden_states=True).hidden_states
    for layer, own in pairs.items():
        second = own.passage == 1
        assert own.hidden.shape == (2 * 156, 64)  # without the sinks
        torch.testing.assert_close(own.scores[second], scores(runner, seq)[layer].T[4:], atol=1e-6, rtol=1e-4)
        wanted = model.model.layers[layer].input_layernorm(entering[layer])[0, 4:].detach()
        torch.testing.assert_close(own.hidden[second].float(), wanted, atol=1e-2, rtol=1e-2)


def test_layers_with_a_window_are_left_out(tmp_path: Path) -> None:
    report = train_retention(tiny("gemma3"), PASSAGES[:3], tmp_path / "s", instruction=INSTRUCTION, width=0)
    assert [(layer.layer, layer.kind) for layer in report.layers] == [(1, "linear")]
    geometry = Geometry.from_config(tiny("gemma3").config)
    assert Scorer.load(tmp_path / "s").refusals(geometry) == []
    assert len(Scorer.load(tmp_path / "s").refusals(Geometry.from_config(tiny("llama").config))) == 1


def test_the_same_seed_gives_the_same_file(model: PreTrainedModel, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_retention(model, PASSAGES[:3], tmp_path / name, width=8, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def pairs_of(rule: Callable[[Tensor], Tensor]) -> LayerPairs:
    x = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 12) + 3.0
    return LayerPairs(x.half(), rule((x.half().float() - 3.0) / torch.logspace(-1, 2, 12)).exp(), torch.arange(4000))


def test_a_linear_rule_is_found_and_a_bent_one_needs_a_layer_between() -> None:
    judges = torch.arange(4000) % 8 == 7
    straight = pairs_of(lambda x: torch.stack((x[:, 0] - 4.0, x[:, 1] * 0.5 - x[:, 2] - 6.0), dim=1))
    fitted = fit_layer(straight, judges, width=16, seed=0)
    assert min(fitted.r2) > 0.98
    assert fit_layer(straight, judges, width=0, seed=0).kind == "linear"
    found = fitted.map(straight.hidden.float())
    torch.testing.assert_close(found, log_scores(straight.scores), atol=0.5, rtol=0.1)
    bent = pairs_of(lambda x: torch.stack((x[:, 0].abs() - 4.0, x[:, 1].abs() - 6.0), dim=1))
    fitted = fit_layer(bent, judges, width=32, seed=0)
    assert fitted.kind == "mlp"
    assert min(fitted.r2) > 0.8 > 0.2 > max(fit_layer(bent, judges, width=0, seed=0).r2)


def test_passages_of_a_text_come_with_texts_to_look_things_up_in() -> None:
    text = "A line of some text that is long enough.\n" * 200
    found = training_passages(byte_tokenizer(), text=text, tokens=6 * 400, length=400, seed=1)
    texts = [byte_tokenizer().decode(passage) for passage in found]
    assert sum(text.startswith("user:") for text in texts) == 2
    assert sum("some text that is long" in text for text in texts) >= 4
    bare = training_passages(byte_tokenizer(), text=None, tokens=6 * 400, length=400, seed=1)
    assert 0.7 * 2400 < sum(map(len, bare)) <= 2400


def test_what_cannot_be_learnt_from_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="1 passages") as refused:
        train_retention(model, PASSAGES[:1], tmp_path / "s")
    assert "--length" in refused.value.hint
    with pytest.raises(RequestError, match="nothing"):
        train_retention(model, [PASSAGES[0], []], tmp_path / "s")
    with pytest.raises(UnsupportedError, match="every layer that keeps a cache"):
        train_retention(tiny("mistral"), PASSAGES[:2], tmp_path / "s")
    with pytest.raises(ModelError, match="cannot write"):
        train_retention(model, PASSAGES[:2], tmp_path / "no" / "s", width=0)
    assert not list(tmp_path.iterdir())


def test_a_model_with_windows_only_is_refused_in_words_about_the_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as refused:
        train_retention(tiny("mistral"), PASSAGES[:2], tmp_path / "s")
    said = str(refused.value)
    assert "kvzip" not in said
    assert "mistral" in said
    assert "every layer" in said
    assert f"last {tiny('mistral').config.sliding_window} tokens" in said
    assert "hint: " in said


def report_of(*r2: float) -> TrainingReport:
    heads = tuple(HeadFit(r2=value, spearman=0.5) for value in r2)
    return TrainingReport("s.safetensors", 1280, 160, 4096, (LayerFit(0, "linear", heads),))


@pytest.mark.parametrize(
    ("r2", "useful"),
    [
        ((0.5, 0.6), True),
        ((0.1, 0.1), True),
        ((0.0, 0.09), False),
        ((0.5, 0.6, 0.7, -217.0), False),
        ((-0.2, 0.9), True),
        ((math.nan, 0.9), False),
        ((), False),
    ],
)
def test_only_a_useful_scorer_is_recommended(r2: tuple[float, ...], useful: bool) -> None:
    report = report_of(*r2)
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        training_report(console, report)
    said = " ".join(capture.get().split())
    assert report.as_json()["useful"] is useful
    assert ("A recipe to try: raw+learned" in said) is useful
    if not useful:
        assert "No recipe is recommended" in said
        assert "R²" in said
        assert "--tokens" in said
    if -217.0 in r2:
        assert "-53.8" in said


# == serving


def test_every_token_is_scored_once_however_it_comes(model: PreTrainedModel, trained: TrainingReport) -> None:
    text, more = tokens(150, seed=50), tokens(10, seed=51)
    found = []
    for splits in ((150,), (64, 100, 150)):
        runner = runner_of(model, f"raw,block=16,recent=16+learned({trained.file},keep=0.5)")
        seq = runner.create()
        for start, stop in zip((0, *splits), splits, strict=False):
            read(runner, text[:stop], seq=seq, start=start)
        next_logits(runner, seq, more, len(text))
        found.append(scores(runner, seq))
    with torch.no_grad():
        entering = model(torch.tensor([[*text, *more]]), output_hidden_states=True).hidden_states
    maps = Scorer.load(trained.file).maps
    for layer, own in found[0].items():
        assert own.shape == (2, 160)
        torch.testing.assert_close(found[1][layer], own, atol=1e-4, rtol=1e-4)
        wanted = maps[layer](model.model.layers[layer].input_layernorm(entering[layer])[0]).T
        torch.testing.assert_close(own, wanted.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("words", ["raw", "int4"])
def test_it_drops_again_while_decoding(model: PreTrainedModel, trained: TrainingReport, words: str) -> None:
    runner = runner_of(model, f"{words},block=16,recent=16+learned({trained.file},keep=0.4)")
    text = tokens(150, seed=52)
    seq = read(runner, text)
    assert runner.cache.retain(seq)
    held = runner.manager.bytes_in_use()
    next_logits(runner, seq, tokens(100, seed=53), len(text))
    assert runner.cache.retain(seq)
    assert runner.manager.bytes_in_use() < 2 * held
    assert all(bool(found.isfinite().all()) for found in scores(runner, seq).values())
    runner.manager.check()
    runner.free(seq)
    assert runner.cache.bytes_in_use() == 0


def test_scores_go_along_with_the_tokens_that_stay(model: PreTrainedModel, trained: TrainingReport) -> None:
    """Heads keep other numbers of tokens, in every layer: each token's score is still its own."""
    text = tokens(150, seed=57)
    runner = runner_of(model, f"raw,block=16,recent=16+learned({trained.file},keep=0.4)")
    seq = read(runner, text)
    retainer = runner.cache.retainer
    assert retainer is not None
    before = scores(runner, seq)
    keys = {layer: retainer._view(0, layer, seq, 150).keys().clone() for layer in before}
    runner.cache.retain(seq)
    kept = retainer.kept(0, seq)
    assert kept is not None
    assert len(set(kept.counts.max(1).values.tolist())) > 1  # or there is nothing to test
    for layer, after in scores(runner, seq).items():
        view = retainer._view(0, layer, seq, 150)
        assert after.shape == (2, view.columns)
        for head in range(2):
            shown = view.shown[head]
            same = torch.cdist(view.keys()[head][shown], keys[layer][head]).argmin(1)
            assert torch.equal(after[head][shown], before[layer][head][same])


def test_tokens_that_were_not_seen_are_an_error_not_a_guess(model: PreTrainedModel, trained: TrainingReport) -> None:
    runner = runner_of(model, f"raw,block=16,recent=16+learned({trained.file},keep=0.4)", prefixes=True)
    text = tokens(150, seed=54)
    read(runner, text)
    seq = runner.create()
    hit = runner.adopt(seq, text, b"")
    read(runner, text, seq=seq, start=hit)
    before = runner.manager.bytes_in_use()
    with pytest.raises(UnsupportedError, match="were read by another one"):
        runner.cache.retain(seq)
    assert runner.manager.bytes_in_use() == before
    runner.manager.check()


def test_the_file_beside_the_weights_is_meant_where_none_is_named(tmp_path: Path, trained: TrainingReport) -> None:
    text = "raw+learned(keep=0.5)"
    geometry = Geometry.from_config(tiny("llama").config)
    with pytest.raises(UnsupportedError, match="lies beside its weights: make it"):
        runner_of(tiny("llama"), text)
    assert Recipe.of(text, tmp_path) == Recipe.parse(text)
    (tmp_path / "scorer.safetensors").write_bytes(Path(trained.file).read_bytes())
    found = Recipe.of(text, tmp_path)
    assert str(found) == f"raw+learned({tmp_path / 'scorer.safetensors'},keep=0.5)"
    assert Recipe.parse(str(found)) == found
    assert Scorer.load(tmp_path / "scorer.safetensors").refusals(geometry) == []
    named = Recipe.parse("raw+learned(other.safetensors,keep=0.5)")
    assert named.located(tmp_path) == named


def test_the_bundled_model_brings_a_scorer() -> None:
    model, _ = load("bundled", dtype=torch.float32)
    recipe = Recipe.of("raw+learned(keep=0.5)", model.name_or_path)
    assert recipe.method is not None
    file = Path(recipe.method.inner[0].name)
    assert file.stat().st_size <= 500_000
    assert Scorer.load(file).refusals(Geometry.from_config(model.config)) == []


# == the file


def test_a_file_gives_the_map_that_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    maps = {
        0: TokenMap(torch.randn(2, 6), torch.randn(2)),
        3: TokenMap(torch.randn(2, 4), torch.randn(2), (torch.randn(4, 6), torch.randn(4))),
    }
    Scorer(str(tmp_path / "s"), "llama", maps).save(torch.float32, {"tokens": "5"})
    found = Scorer.load(tmp_path / "s")
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    assert (found.model_type, sorted(found.maps)) == ("llama", [0, 3])
    x = torch.randn(7, 6)
    for layer, wanted in maps.items():
        assert found.maps[layer].shape == (6, 2)
        assert torch.equal(found.maps[layer](x), wanted(x))


def spoil(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = "1.out.bias"
    if how == "missing":
        return {key: x for key, x in tensors.items() if key != name}
    if how == "more":
        return {**tensors, "1.out.scale": torch.ones(2)}
    changed = {
        "shape": tensors[name][:-1].clone(),
        "nan": torch.full_like(tensors[name], torch.nan),
        "whole numbers": tensors[name].int(),
    }
    return {**tensors, name: changed[how]}


@pytest.mark.parametrize("how", ["missing", "more", "shape", "nan", "whole numbers"])
def test_tensors_that_are_no_maps_are_refused(trained: TrainingReport, tmp_path: Path, how: str) -> None:
    facts = {"kvfold-scorer": json.dumps({"version": 1, "model_type": "llama"})}
    save_file(spoil(load_file(trained.file), how), tmp_path / "s", facts)
    with pytest.raises(ModelError, match="no scorer in") as refused:
        Scorer.load(tmp_path / "s")
    assert "train-retention" in refused.value.hint
    geometry = Geometry.from_config(tiny("llama").config)
    with pytest.raises(UnsupportedError, match="no scorer in"):
        runner_of(tiny("llama"), f"raw+learned({tmp_path / 's'},keep=0.5)")
    assert geometry.unsupported() == []


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "say nothing of a kvfold-scorer"),
        ({"kvfold-scorer": "[]"}, "say nothing of a kvfold-scorer"),
        ({"kvfold-scorer": '{"version": 9}'}, "its version is 9"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, facts: dict[str, str], says: str) -> None:
    save_file({"0.out.weight": torch.ones(2, 3), "0.out.bias": torch.ones(2)}, tmp_path / "s", facts)
    with pytest.raises(ModelError, match=says):
        Scorer.load(tmp_path / "s")
    (tmp_path / "t").write_bytes(b"\x80\x04 no pickle is ever read")
    for name in ("t", "nothing"):
        with pytest.raises(ModelError, match="no scorer"):
            Scorer.load(tmp_path / name)


def test_scorers_of_other_models_are_refused(trained: TrainingReport) -> None:
    scorer, config = Scorer.load(trained.file), tiny("llama").config
    for name, value, says in (
        ("num_key_value_heads", 4, "other widths at layers 0, 1, 2"),
        ("hidden_size", 32, "other widths"),
        ("num_hidden_layers", 5, "no map for layers 3, 4"),
        ("model_type", "qwen3", "of a llama model, not of qwen3"),
    ):
        other = tiny("llama").config
        setattr(other, name, value)
        assert [says in reason for reason in scorer.refusals(Geometry.from_config(other))] == [True]
    assert scorer.refusals(Geometry.from_config(config)) == []


# == the command


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    return command(capsys, monkeypatch, "train-retention")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("Some words, and more of them, in a line.\n" * 60)
    return folder


def test_the_command_trains_and_says_how_well(kvfold: Callable[..., Done], folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "s.safetensors", tmp_path / "s.json"
    given = ("--model", folder, "--text", folder / "text.txt", "--tokens", 900, "--length", 100, "-o", file)
    done = kvfold(*given, "--width", 8, "--json", out)
    assert done.returncode == 0, done.stderr
    assert "Spearman" in done.stdout
    assert f"raw+learned({file},keep=0.25)" in done.stdout
    assert json.loads(out.read_text())["file"] == str(file)
    done = kvfold(*given, "--width", 0, "--json", "-")
    assert {layer["kind"] for layer in json.loads(done.stdout)["layers"]} == {"linear"}


def test_bad_input_is_one_error_with_a_hint(kvfold: Callable[..., Done], folder: Path, tmp_path: Path) -> None:
    good = ("--model", folder, "-o", tmp_path / "s")
    for arguments, says in (
        (("--model", folder, "-o", tmp_path / "no" / "s"), "there is no folder"),
        (("--model", folder, "-o", tmp_path), "it is a folder"),
        (("--model", tmp_path / "none", "-o", tmp_path / "s"), "no model at"),
        ((*good, "--text", tmp_path / "none"), "no such file"),
        ((*good, "--tokens", 64, "--length", 64), "one of them is held out"),
        ((*good, "--json", tmp_path / "no" / "j"), "there is no folder"),
    ):
        done = kvfold(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert says in done.stderr
        assert "hint:" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_has_examples(kvfold: Callable[..., Done]) -> None:
    done = kvfold("--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
