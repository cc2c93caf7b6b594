"""Text is scored as it would be served: what acts only while decoding acts, and what never acted is not measured."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kvfold.engine import Engine, SamplingParams
from kvfold.engine.loading import load
from kvfold.engine.runner import ModelRunner
from kvfold.errors import UnsupportedError
from kvfold.quality.demo import run_demo
from kvfold.quality.evaluate import EvalSettings, Workload, build_workload, evaluate
from kvfold.quality.lm_model import HarnessModel
from kvfold.quality.lm_score import Likelihood, Scorer, Window
from kvfold.quality.recipes import recipe_contestants
from kvfold.quality.report import write_report
from kvfold.quality.results import Evaluation, Row
from kvfold.recipe import Recipe
from kvfold.report import eval_report
from tests.engine.tiny_engine import VOCAB, byte_tokenizer, tiny_model

CONTEXT = 512
BASE = "sinks=4,recent=16,block=8"
ACTING = [
    f"raw,{BASE}+quest(pages=2,dense=0)",
    f"int4,{BASE}+quest(pages=2,dense=0)",
    f"raw,{BASE}+bounded(pages=2,base=2,dense=0,eps=0.5,delta=0.5)",
    f"raw,{BASE}+streaming(budget=64,every=8)",
    f"raw,{BASE}+snapkv(budget=200,every=8,window=8)",
    f"int8,{BASE}+streaming(keep=0.25)",
    f"int8,{BASE}+streaming(keep=0.5)+quest(pages=2,dense=0)",
]
IDLE = [
    "raw+quest(pages=64,dense=0)",
    "int4+quest(pages=64,dense=0)",
    "raw+streaming(budget=4096)",
    "raw+snapkv(keep=1)",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(context=CONTEXT)


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(count)]


@pytest.mark.parametrize("recipe", ACTING)
def test_scores_are_those_of_the_engine_that_serves(model: Any, recipe: str) -> None:
    """The engine's own log-probabilities of what it generates, and those of the same tokens given."""
    prompt = tokens(380, 1)
    with Engine(model, recipe=recipe, kv_memory="16MiB", check=False) as engine:
        (output,) = engine.generate(
            [prompt], SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0), progress=False
        )
    found = output.outputs[0]
    contestant = recipe_contestants(model, [recipe])[1]
    forced = contestant.force([*prompt, *found.token_ids[:-1]], score_from=len(prompt))
    chosen = torch.tensor(found.token_ids[1:])
    ours = forced.logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    served = torch.tensor([step[token].logprob for step, token in zip(found.logprobs, found.token_ids, strict=True)])
    difference = (ours - served[1:]).abs()  # packed pages differ in a few codes, and then in a page that is chosen
    assert difference.median() < 1e-2
    assert difference.max() < 0.5
    raw = recipe_contestants(model, [])[0].force([*prompt, *found.token_ids[:-1]], score_from=len(prompt))
    assert (raw.logits - forced.logits).abs().max() > 0.01


@pytest.mark.parametrize("recipe", ACTING)
def test_likelihoods_are_of_the_recipe(model: Any, recipe: str) -> None:
    """Scored beside others whose prompts begin alike, and as forced."""
    shared = tokens(360, 2)
    windows = [
        Window(tuple(shared + tokens(20, 3)), tuple(tokens(30, 4)), tuple(tokens(30, 5))),
        Window(tuple(shared + tokens(30, 6)), tuple(tokens(9, 7)), tuple(tokens(9, 8))),
        Window(tuple(shared), tuple(tokens(9, 9)), tuple(tokens(9, 10))),
    ]
    runner = ModelRunner(model, recipe=Recipe.parse(recipe), kv_memory=16 << 20, prefix_caching=False, check=False)
    try:
        found: dict[int, Likelihood] = dict(Scorer(runner).score(windows))
        assert not runner.manager.sequences()
    finally:
        runner.release()
    contestant = recipe_contestants(model, [recipe])[1]
    for i, window in enumerate(windows):
        forced = contestant.force([*window.prompt, *window.inputs], score_from=len(window.prompt))
        chosen = forced.logits.log_softmax(-1).gather(1, torch.tensor(window.targets)[:, None])
        assert found[i].logprob == pytest.approx(float(chosen.sum()), abs=1e-2)


# == a whole evaluation


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    file = tmp_path_factory.mktemp("work") / "text.txt"
    file.write_text("".join(f"line {i * 7919 % 1000} of a text\n" for i in range(300)))
    settings = EvalSettings(
        tasks=(), context=384, samples=1, text_windows=1, scored_tokens=32, generation_tokens=16,
        generation_passages=1, decode_steps=0, text=file,
    )  # fmt: skip
    return build_workload(byte_tokenizer(), settings, stop=frozenset({2}))


@pytest.fixture(scope="module")
def rows(model: Any, work: Workload) -> dict[str, Row]:
    contestants = recipe_contestants(model, [*IDLE, *ACTING])
    return {row.contestant: row for row in evaluate(contestants, contestants[0], work)}


def told(rows: Sequence[Row]) -> str:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as said:
        eval_report(console, as_evaluation(rows))
    return said.get()


def as_evaluation(rows: Sequence[Row]) -> Evaluation:
    return Evaluation(
        command="kvfold eval", seed=0, model="tiny", settings={"context": 384, "tasks": [], "samples": 1}, versions={},
        hardware={}, rows=list(rows),
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ACTING)
def test_what_acts_is_measured(rows: dict[str, Row], recipe: str) -> None:
    row = rows[recipe]
    assert row.idle == ()
    assert row.kl_mean is not None
    assert row.kl_mean > 0
    assert row.positions == rows["raw"].positions == 32


@pytest.mark.parametrize("recipe", IDLE)
def test_what_never_acted_is_not_measured(rows: dict[str, Row], recipe: str, tmp_path: Path) -> None:
    row = rows[recipe]
    assert len(row.idle) == 1
    assert (row.kl_mean, row.kl_p99, row.top1_agreement, row.ppl, row.ppl_delta) == (None,) * 5
    assert row.kl_by_position == []
    assert row.generation is not None
    assert (row.generation.kl_mean, row.generation.top1_agreement, row.generation.first_divergence) == (None,) * 3
    assert row.generation.idle == row.idle
    data = json.loads(json.dumps(row.as_json()))
    assert data["kl_mean"] is None
    assert Row.from_json(data) == row
    said = told([rows["raw"], row])
    assert "not measured" in said
    assert row.idle[0] in said
    write_report(as_evaluation([rows["raw"], row, rows[ACTING[0]]]), tmp_path)
    assert "not measured" in (tmp_path / "index.html").read_text()


def test_results_of_earlier_versions_are_read(rows: dict[str, Row]) -> None:
    data = rows["raw"].as_json()
    del data["idle"]
    assert Row.from_json(json.loads(json.dumps(data))) == replace(rows["raw"], idle=())


def test_rolling_likelihoods_have_no_prompt_to_drop_from(model: Any) -> None:
    face = HarnessModel(model, "raw+streaming(keep=0.25)", tokenizer=byte_tokenizer(), check=False)
    with pytest.raises(UnsupportedError, match="rolling likelihoods"):
        face.loglikelihood_rolling([])


@pytest.mark.parametrize(("pages", "idle"), [(2, ()), (64, ("quest(dense=0,pages=64)",))])
def test_likelihoods_without_an_act_of_the_method_are_named(model: Any, pages: int, idle: tuple[str, ...]) -> None:
    recipe = f"raw,{BASE}+quest(pages={pages},dense=0)"
    face = HarnessModel(model, recipe, tokenizer=byte_tokenizer(), check=False)
    assert face.idle is None
    assert len(list(face._likelihoods([Window(tuple(tokens(400, 1)), tuple(tokens(4, 2)), tuple(tokens(4, 3)))]))) == 1
    assert face.idle == idle


def test_the_demo_follows_the_same_rule() -> None:
    model, tokenizer = load("bundled")
    recipes = ["raw,recent=16+quest(pages=4)", "raw+quest(pages=64)"]
    _, rows = run_demo(model, tokenizer, recipes=recipes, target_tokens=300)
    acting, idle = rows
    assert acting.idle == ()
    assert acting.kl is not None
    assert acting.kl > 0
    assert (idle.kl, idle.kl_p99, idle.top1_agreement, idle.idle) == (None, None, None, ("quest(pages=64)",))
