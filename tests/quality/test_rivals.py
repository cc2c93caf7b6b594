"""Rivals: the harness and truncation always; hqq and quanto where benchmarks/rivals/setup.sh put them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.rivals import __main__ as command
from benchmarks.rivals import catalog
from benchmarks.rivals.catalog import DEFAULT, check_installed, make_rival, parse_rivals
from benchmarks.rivals.held import held_bytes
from benchmarks.rivals.pressed import PRESSES
from benchmarks.rivals.quantized import RESIDUAL, legal_multiple
from benchmarks.rivals.session import RivalPlan, run_rivals, run_table
from benchmarks.rivals.truncated import SINKS
from transformers import PreTrainedModel, QuantizedCache

from kvfold.errors import RequestError
from kvfold.quality.metrics import divergence
from kvfold.quality.results import Evaluation
from kvfold.quality.settings import EvalSettings
from tests.quality.rival_samples import PROMPT, TOKENS, bytes_per_token, float_model, needs, source_tokens


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return float_model()


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return source_tokens()


# == the reference


def test_the_full_cache_gives_the_logits_of_one_stock_forward(model, tokens):
    forced = make_rival("transformers-full", model).force(tokens, score_from=PROMPT)
    with torch.inference_mode():
        whole = model(torch.tensor([tokens])).logits[0, PROMPT:].float()
    torch.testing.assert_close(forced.logits, whole, atol=2e-4, rtol=0)
    assert forced.kv_bytes == TOKENS * bytes_per_token(model)
    assert forced.decode_tok_s == 0


def test_it_generates_what_transformers_generates(model, tokens):
    rival, prompt = make_rival("transformers-full", model), tokens[:64]
    out = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
    stock = out[0, len(prompt) :].tolist()
    assert rival.generate([prompt, prompt[:32]], max_tokens=24, stop=frozenset())[0] == stock
    stop = stock[10]
    said = rival.generate([prompt], max_tokens=24, stop=frozenset([stop]))[0]
    assert said == stock[: stock.index(stop)]


def test_steps_behind_the_tokens_are_timed_but_not_counted(model, tokens):
    rival = make_rival("transformers-full", model)
    forced = rival.force(tokens, score_from=PROMPT, decode_steps=3)
    assert forced.decode_tok_s > 0
    assert forced.kv_bytes == TOKENS * bytes_per_token(model)
    assert len(forced.logits) == TOKENS - PROMPT


# == truncation


def test_truncation_is_attention_to_the_first_and_the_last_tokens(model, tokens):
    """Against the stock model with a mask that hides what should be gone."""
    kept = round(PROMPT * 0.25)
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    for start in range(PROMPT, TOKENS, 32):  # a chunk sees the sinks, the last tokens of its past, and itself
        hidden[start : start + 32, SINKS : start - (kept - SINKS)] = True
    mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(hidden, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]), attention_mask=mask).logits[0, PROMPT:]
    forced = make_rival("truncation-0.75", model).force(tokens, score_from=PROMPT)
    torch.testing.assert_close(forced.logits, expected, atol=2e-4, rtol=0)
    assert forced.kv_bytes == kept * bytes_per_token(model)


def test_truncation_generates_with_a_cache_that_does_not_grow(model, tokens):
    rival = make_rival("truncation-0.5", model)
    said = rival.generate([tokens[:100]], max_tokens=20, stop=frozenset())[0]
    assert len(said) == 20
    reader, _ = rival.begin(tokens[:100])
    for token in said:
        reader.read([token])
        assert held_bytes(reader.cache) == 50 * bytes_per_token(model)
    assert reader.position == 120


# == bytes


def test_a_storage_counts_whole_and_once():
    class Holder:
        def __init__(self):
            numbers = torch.zeros(100, dtype=torch.float32)
            self.parts = {"codes": [numbers[:10], numbers[50:]], "more": (torch.zeros(8, dtype=torch.uint8), None)}
            self.itself = self
            self.kind = torch.Tensor

    assert held_bytes(Holder()) == 408


@pytest.mark.parametrize(
    ("axis", "bits", "group", "heads", "width", "multiple"),
    [
        (0, 4, 64, 2, 64, 1),
        (0, 4, 128, 1, 64, 2),
        (-1, 4, 64, 2, 64, 32),
        (-1, 2, 64, 8, 128, 8),
        (1, 4, 64, 2, 64, 1),
        (1, 2, 64, 2, 64, 2),
        (1, 8, 64, 1, 64, 1),
    ],
)
def test_lengths_that_can_be_quantized(axis, bits, group, heads, width, multiple):
    assert legal_multiple(axis, bits, group, heads, width) == multiple


# == quantized caches


def test_fp8_holds_a_byte_for_a_number(model, tokens):
    rival = make_rival("transformers-fp8", model)
    forced = rival.force(tokens, score_from=PROMPT)
    scales = 2 * 4 * model.config.num_hidden_layers
    assert forced.kv_bytes == TOKENS * bytes_per_token(model) // 4 + scales


QUANTIZED = [name for name in DEFAULT if "hqq" in name or "quanto" in name]


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_caches_hold_what_their_bits_say(name, model, tokens):
    needs(name)
    rival = make_rival(name, model)
    reference = make_rival("transformers-full", model).force(tokens, score_from=PROMPT)
    forced = rival.force(tokens, score_from=PROMPT)
    raw = RESIDUAL * bytes_per_token(model)
    packed = TOKENS * bytes_per_token(model) * rival.bits_per_value / 32
    assert packed <= forced.kv_bytes < packed + raw
    kl, _ = divergence(reference.logits, forced.logits)
    worst = {8: 1e-3, 4: 0.1, 2: 3.0}[rival.bits]
    assert 0 < float(kl.mean()) < worst


@pytest.mark.parametrize("name", ["transformers-hqq-4bit", "transformers-quanto-2bit-channel-g32"])
def test_they_are_the_stock_cache(name, model, tokens):
    """Chunk by chunk what transformers gives for its own class, used by hand."""
    needs(name)
    rival = make_rival(name, model)
    key, value = rival.axes
    options = {"nbits": rival.bits, "axis_key": key, "axis_value": value, "q_group_size": rival.group}
    cache = QuantizedCache(rival.backend, model.config, **options, residual_length=RESIDUAL)
    ids = torch.tensor([tokens])
    expected = []
    with torch.inference_mode():
        model(ids[:, :PROMPT], past_key_values=cache)
        for start in range(PROMPT, TOKENS, 32):
            expected.append(model(ids[:, start : start + 32], past_key_values=cache).logits[0])
    forced = rival.force(tokens, score_from=PROMPT)
    torch.testing.assert_close(forced.logits, torch.cat(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["transformers-quanto-4bit-channel", "transformers-hqq-2bit-mixed"])
def test_prompts_of_any_length_and_more_than_a_residual_behind_them(name, model, tokens):
    needs(name)
    rival = make_rival(name, model)
    forced = rival.force(tokens[:257], score_from=99)
    assert len(forced.logits) == 158
    assert len(rival.generate([tokens[:67]], max_tokens=RESIDUAL + 10, stop=frozenset())[0]) == RESIDUAL + 10


def test_a_prompt_too_short_to_be_quantized_is_refused(model, tokens):
    needs("transformers-quanto-4bit-channel")
    with pytest.raises(RequestError, match="a prompt of 31 tokens"):
        make_rival("transformers-quanto-4bit-channel", model).generate([tokens[:31]], max_tokens=1, stop=frozenset())


# == names


def test_every_default_has_a_meaning_and_every_press_a_name():
    assert parse_rivals("all") == DEFAULT
    assert parse_rivals(",".join(DEFAULT)) == DEFAULT
    assert set(catalog.PRESSES) == set(PRESSES)


def test_every_press_has_five_ratios():
    names = parse_rivals("kvpress-*")
    assert len(names) == 5 * len(PRESSES)
    assert {name.rpartition("-")[2] for name in names} == {"0.25", "0.5", "0.75", "0.875", "0.9375"}
    assert parse_rivals("kvpress-criticaladakv-expected-attention-0.9375")[0] in names


def test_patterns_and_names_of_the_same_kind():
    assert parse_rivals("truncation-*, truncation-0.5,truncation-0.9") == (
        *("truncation-0.5", "truncation-0.75", "truncation-0.875"),
        "truncation-0.9",
    )
    assert parse_rivals("transformers-quanto-2bit-channel-g16") == ("transformers-quanto-2bit-channel-g16",)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("quanto", "known: all, transformers-full"),
        ("transformers-quanto-8bit", "quanto has bits 2, 4"),
        ("transformers-hqq-4bit-kivi", "hqq has layouts strided, token, mixed"),
        ("kvpress-zip-0.5", "presses: random, knorm"),
        ("kvpress-zip-*", "known: transformers-full"),
        (" , ", "known: all"),
    ],
)
def test_names_that_mean_nothing(text, hint):
    with pytest.raises(RequestError) as caught:
        parse_rivals(text)
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["transformers-hqq-4bit", "transformers-quanto-4bit", "kvpress-tova-0.5"])
def test_a_rival_that_is_not_installed(name, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "_is_installed", lambda package: False)
    check_installed(["transformers-full", "transformers-fp8", "truncation-0.5"])
    monkeypatch.setattr(sys, "argv", ["rivals", "--rivals", name])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"rival {name}: " in said
    assert "benchmarks/rivals/setup.sh" in said


# == whole runs

SETTINGS = EvalSettings(
    tasks=("kv",),
    context=256,
    samples=1,
    text_windows=1,
    scored_tokens=32,
    generation_tokens=8,
    generation_passages=1,
    decode_steps=2,
)
RIVALS = ("transformers-full", "transformers-fp8", "truncation-0.5")


def plan(file: Path | None, settings: EvalSettings = SETTINGS, rivals: tuple[str, ...] = RIVALS) -> RivalPlan:
    return RivalPlan(model="bundled", rivals=rivals, settings=settings, command="test", result=file)


def writer(file: Path):
    return lambda found: file.write_text(json.dumps(found.as_json()), encoding="utf-8")


def test_a_table_of_rivals_and_recipes(tmp_path):
    theirs, table = tmp_path / "rivals.json", tmp_path / "table.json"
    rivals = run_rivals(plan(theirs), save=writer(theirs))
    assert [row.contestant for row in rivals.rows] == list(RIVALS)
    full, fp8, truncated = rivals.rows
    assert (full.kl_mean, full.compression, full.bits_per_value) == (0, 1, 16)
    assert fp8.kl_mean > 0 < truncated.kl_mean
    assert truncated.kv_bytes_per_token < fp8.kv_bytes_per_token < full.kv_bytes_per_token
    assert truncated.bits_per_value is None
    whole = run_table(plan(theirs), ["raw", "int4"], table, save=writer(table))
    assert [row.contestant for row in whole.rows] == ["raw", "int4", *RIVALS]
    assert Evaluation.read(table) == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rivals.json", "table.json"]


def test_an_interrupted_run_goes_on_and_a_finished_one_is_taken(tmp_path):
    file = tmp_path / "rivals.json"
    begun: list[str] = []

    def interrupt(what: str, share: float) -> None:
        begun.append(what)
        if len(begun) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rivals(plan(file), progress=interrupt, save=writer(file))
    assert not file.exists()
    with pytest.raises(RequestError, match="other settings"):
        run_rivals(plan(file, rivals=RIVALS[:2]), save=writer(file))

    rest: list[str] = []
    result = run_rivals(plan(file), progress=lambda what, share: rest.append(what), save=writer(file))
    assert rest[0] == begun[3]
    assert not set(rest) & set(begun[:3])

    rest.clear()
    again = run_rivals(plan(file), progress=lambda what, share: rest.append(what), save=writer(file))
    assert again == result
    assert not rest


def test_the_command_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rivals.json"
    options = "--tasks none --context 128 --windows 1 --scored 16 --generation-tokens 0 --rivals truncation-0.5 --json"
    monkeypatch.setattr(sys, "argv", ["rivals", *options.split(), str(file)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert "truncation" in capsys.readouterr().out
    found = Evaluation.read(file)
    assert [row.contestant for row in found.rows] == ["truncation-0.5"]
    assert found.command.startswith("python -m benchmarks.rivals --tasks none")


def test_the_table_needs_a_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rivals", "--recipes", "raw", "--rivals", "truncation-0.5"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "--json FILE" in capsys.readouterr().err
