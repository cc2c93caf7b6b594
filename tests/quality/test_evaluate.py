"""The evaluation as a whole, on a tiny model: figures, determinism, resuming, comparing with the reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold.engine import Engine
from kvfold.errors import NumericsError, RequestError
from kvfold.geometry import Geometry
from kvfold.quality.contestant import Forced
from kvfold.quality.error_map import error_map, keys_and_values
from kvfold.quality.evaluate import EvalSettings, Workload, build_workload, check_length, evaluate, model_digest
from kvfold.quality.journal import Journal
from kvfold.quality.metrics import agreement, divergence, surprise
from kvfold.quality.recipes import RecipeContestant, recipe_contestants
from kvfold.quality.results import Row
from kvfold.quality.units import Units
from kvfold.recipe import Recipe
from tests.engine.tiny_engine import byte_tokenizer, expected, tiny_model

SETTINGS = EvalSettings(
    tasks=("kv", "copy"),
    context=384,
    samples=2,
    text_windows=2,
    scored_tokens=64,
    generation_tokens=40,
    generation_passages=2,
    decode_steps=4,
)
RECIPES = ("int8", "int2")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(context=512)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    file = tmp_path_factory.mktemp("work") / "text.txt"
    file.write_text("".join(f"line {i * 7919 % 1000} of a text\n" for i in range(300)))
    return build_workload(byte_tokenizer(), replace(SETTINGS, text=file), stop=frozenset({2}))


@pytest.fixture(scope="module")
def rows(model: Any, work: Workload) -> list[Row]:
    contestants = recipe_contestants(model, RECIPES)
    return evaluate(contestants, contestants[0], work)


def without_speed(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, decode_tok_s=0.0) for row in rows]


def test_raw_is_its_own_yardstick(rows: list[Row]) -> None:
    raw = rows[0]
    assert (raw.contestant, raw.recipe, raw.family) == ("raw", "raw", "kvfold")
    assert raw.bits_per_value == 32  # of a float32 model
    assert (raw.compression, raw.kl_mean, raw.kl_p99, raw.top1_agreement, raw.ppl_delta) == (1, 0, 0, 1, 0)
    assert raw.generation is not None
    assert (raw.generation.kl_mean, raw.generation.top1_agreement, raw.generation.first_divergence) == (0, 1, 40)
    assert raw.errors is None


def test_fewer_bits_cost_more(rows: list[Row], model: Any) -> None:
    raw, int8, int2 = rows
    assert [row.contestant for row in rows] == ["raw", *RECIPES]
    assert int2.bits_per_value is not None
    assert int2.bits_per_value < int8.bits_per_value == 8 + 32 / 8  # head dim 8: a scale and a zero for 8 numbers
    assert 0 < int8.kl_mean < int2.kl_mean
    assert int8.kl_mean <= int8.kl_p99
    assert int2.top1_agreement <= int8.top1_agreement <= 1
    assert raw.kv_bytes_per_token > int8.kv_bytes_per_token > int2.kv_bytes_per_token
    assert int8.compression == pytest.approx(raw.kv_bytes_per_token / int8.kv_bytes_per_token)
    assert int2.ppl - raw.ppl == pytest.approx(int2.ppl_delta)
    for row in rows:
        assert row.positions == 128
        assert row.decode_tok_s > 0
        assert set(row.tasks) == {"kv", "copy"}
        assert all(task.n == 2 for task in row.tasks.values())
        assert len(row.kl_by_position) == 16
        assert row.kl_by_position[0][0] == 380 - 64
    held = Geometry.from_config(model.config).cache_bytes(Recipe.parse("int2"), 4, [380])
    assert int2.kv_bytes_per_token * 380 == held  # what the books say, and so the planner


def test_error_maps_are_of_every_layer_and_head(rows: list[Row]) -> None:
    for row, low, high in ((rows[1], 1e-4, 0.02), (rows[2], 0.05, 0.8)):
        assert row.errors is not None
        for side in (row.errors.k, row.errors.v):
            assert [len(heads) for heads in side] == [2, 2]
            assert all(low < error < high for heads in side for error in heads)


def test_the_same_again_and_alone(model: Any, work: Workload, rows: list[Row]) -> None:
    contestants = recipe_contestants(model, ["int2"])
    again = evaluate(contestants[1:], contestants[0], work)
    assert without_speed(again) == without_speed(rows[2:])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 8, 20])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, model: Any, work: Workload, rows: list[Row], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was cut off, nothing is done twice, and the figures are those of a run in one go."""
    contestants = recipe_contestants(model, RECIPES)
    file, seen = tmp_path / "journal", list[str]()

    def stop(what: str, share: float) -> None:
        assert 0 <= share < 1
        if len(seen) == after:
            raise Interrupted
        seen.append(what)

    with Journal(file, {}) as journal, pytest.raises(Interrupted):
        evaluate(contestants, contestants[0], work, journal=journal, progress=stop)
    later = list[str]()
    with Journal(file, {}) as journal:
        assert len(journal) == after
        found = evaluate(
            contestants, contestants[0], work, journal=journal, progress=lambda what, share: later.append(what)
        )
        total = len(journal)
    assert without_speed(found) == without_speed(rows)
    assert len(seen) + len(later) == total


def test_a_contestant_generates_what_transformers_does(model: Any, work: Workload) -> None:
    raw = recipe_contestants(model, [])[0]
    prompts = work.prompts
    free = raw.generate(prompts, max_tokens=24, stop=frozenset())
    assert all(len(tokens) == 24 for tokens in free)
    stopping = raw.generate(prompts, max_tokens=24, stop=frozenset({free[0][5]}))
    assert stopping[0] == free[0][: free[0].index(free[0][5])]
    one = raw.generate(prompts[:1], max_tokens=24, stop=frozenset({2}))[0]
    assert one == [token for token in expected(model, list(prompts[0]), 24) if token != 2]


def test_contexts_reach_the_engine(model: Any, work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt with its own context, where contexts are compressed, and with none elsewhere."""
    contestant = recipe_contestants(model, [])[0]
    seen: list[int | None] = []
    generate = Engine.generate

    def listen(engine: Engine, prompts: Any, params: Any, **options: Any) -> Any:
        seen.extend(each.context_tokens for each in params)
        return generate(engine, prompts, params, **options)

    monkeypatch.setattr(Engine, "generate", listen)
    for compress in ("prompt", "context"):
        asked = replace(work, settings=replace(work.settings, compress=compress), passages=(), prompts=())
        units = Units([contestant], contestant, asked, Journal(None, {}))
        for unit in units.all():
            unit.run()
    contexts = [question.context_tokens for question in work.questions]
    assert seen == [None] * len(contexts) + contexts


def test_scores_of_samples_stay_with_their_row(rows: list[Row]) -> None:
    for row in rows:
        for task in row.tasks.values():
            assert len(task.scores) == task.n
            assert sum(task.scores) / task.n == pytest.approx(task.score)
        assert Row.from_json(json.loads(json.dumps(row.as_json()))) == row


def test_forced_logits_are_the_models(model: Any, work: Workload) -> None:
    raw = recipe_contestants(model, [])[0]
    passage = work.passages[0]
    forced = raw.force(passage, score_from=work.score_from)
    with torch.inference_mode():
        wanted = model(torch.tensor([passage])).logits[0, work.score_from :].float()
    assert forced.decode_tok_s == 0
    assert forced.logits.shape == wanted.shape
    assert agreement(wanted, forced.logits).kl_mean < 1e-6
    for score_from in (0, len(passage)):
        with pytest.raises(ValueError, match="score_from"):
            raw.force(passage, score_from=score_from)


class Broken(RecipeContestant):
    def force(self, tokens: Sequence[int], *, score_from: int, decode_steps: int = 0) -> Forced:
        forced = super().force(tokens, score_from=score_from, decode_steps=decode_steps)
        forced.logits[3, 5] = float("nan")
        return forced


def test_a_contestant_of_nan_is_named(model: Any, work: Workload) -> None:
    raw = recipe_contestants(model, [])[0]
    with pytest.raises(NumericsError, match="of broken are not finite"):
        evaluate([Broken(model, "broken", Recipe.parse("int8"))], raw, work)


def test_a_model_of_few_positions_is_refused(model: Any) -> None:
    check_length(SETTINGS, model)
    with pytest.raises(RequestError, match="512 positions") as refused:
        check_length(replace(SETTINGS, context=1024), model)
    assert "--context" in refused.value.hint
    with pytest.raises(RequestError, match="512 positions") as refused:
        check_length(replace(SETTINGS, generation_tokens=500), model)
    assert "--generation-tokens" in refused.value.hint


def test_a_models_digest(model: Any) -> None:
    assert model_digest(model) == model_digest(tiny_model(context=512))
    assert model_digest(model) != model_digest(tiny_model(context=512, seed=1))
    assert model_digest(model) != model_digest(tiny_model(context=513))


def test_no_error_map_where_nothing_is_packed(model: Any, work: Workload) -> None:
    held = keys_and_values(model, work.passages[0][:80])
    geometry = Geometry.from_config(model.config)
    assert error_map(geometry, Recipe(), held) is None
    assert error_map(geometry, Recipe.parse("int4"), held) is None  # sinks and recent window are all there is
    assert error_map(geometry, Recipe.parse("int4,recent=0"), held) is not None


def test_metrics_in_slices() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(150, 11, generator=generator) for _ in range(2))
    kl, same = divergence(p, q)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl, wanted)
    assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    following = torch.randint(0, 11, (149,), generator=generator)
    wanted = torch.nn.functional.cross_entropy(p[:149], following, reduction="none")
    torch.testing.assert_close(surprise(p, following.tolist()), wanted)
