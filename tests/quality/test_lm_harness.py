"""kvfold under EleutherAI's harness: against plain transformers, on tasks of our own, without a hub."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvfold import load
from kvfold.cli import app
from kvfold.errors import ModelError, RecipeError, RequestError, UnsupportedError
from kvfold.quality.lm_harness import model_class, register, run_lm_eval
from tests.engine.tiny_engine import byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "tests" / "data" / "lm_eval_task"
NAMES = ["kvfold_lookup", "kvfold_choice"]

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install 'kvfold[lm-eval]'"
)


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    """In float32, so that two ways to one number differ by rounding only."""
    return load("bundled", dtype=torch.float32, device="cpu")


@pytest.fixture
def face(bundled) -> Any:
    return model_class()(bundled[0], "raw", tokenizer=bundled[1], check=False)


@pytest.fixture
def no_hub(monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def ask(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def document(name: str, row: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[row])
    return found


def chat(tokenizer: Any, prompt: str) -> str:
    return str(
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    )


def log_softmax(model: Any, tokens: list[int], scored: int) -> tuple[float, bool]:
    """Of the last ``scored`` of ``tokens``, from one forward of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0, -scored:]
    ids = torch.tensor(tokens[-scored:])
    return float(logits.log_softmax(-1).gather(1, ids[:, None]).sum()), bool((logits.argmax(-1) == ids).all())


# == without the harness


def test_a_missing_harness_is_said_before_any_work(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model_class.cache_clear()
    for attempt in (register, model_class, lambda: run_lm_eval("no such model", ["raw"], ["gsm8k"])):
        with pytest.raises(UnsupportedError, match=r"pip install 'kvfold\[lm-eval\]'"):
            attempt()


# == likelihoods


@needs_harness
def test_loglikelihood_is_what_transformers_says(bundled, face) -> None:
    model, tokenizer = bundled
    asked = document("choice")
    prompt = chat(tokenizer, asked["prompt"])
    pairs = [(prompt, choice) for choice in asked["choices"]]
    pairs += [("The first ship was called", " the"), ("", "A list is a sequence"), ("A list ", "is")]
    found = face.loglikelihood([ask(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        begin = [] if context.startswith("<|bos|>") else [tokenizer.bos_token_id] * (context == "")
        tokens = begin + tokenizer.encode(context + continuation, add_special_tokens=False)
        # The harness counts white space at the end of a context to the continuation.
        scored = len(tokens) - len(begin) - len(tokenizer.encode(context.rstrip(), add_special_tokens=False))
        wanted = log_softmax(model, tokens, scored)
        assert logprob == pytest.approx(wanted[0], abs=1e-3)
        assert greedy == wanted[1]
    best = max(range(len(asked["choices"])), key=lambda i: found[i][0])
    assert best == asked["label"]


@needs_harness
def test_a_context_too_long_is_cut_from_the_left(bundled, caplog) -> None:
    model, tokenizer = bundled
    short = model_class()(model, tokenizer=tokenizer, max_length=64, check=False)
    text = document("lookup")["prompt"]
    found = short.loglikelihood([ask(text, " 17")], disable_tqdm=True)[0]
    tokens = tokenizer.encode(text + " 17", add_special_tokens=False)[-65:]
    scored = len(tokenizer.encode(text + " 17")) - len(tokenizer.encode(text))
    assert found[0] == pytest.approx(log_softmax(model, tokens, scored)[0], abs=1e-3)
    assert "1 contexts were cut from the left" in caplog.text


@needs_harness
@pytest.mark.parametrize("length", [200, 4096])
def test_rolling_is_what_transformers_says(bundled, length) -> None:
    """Each token once, behind the beginning token, in windows of ``length``."""
    model, tokenizer = bundled
    face = model_class()(model, tokenizer=tokenizer, max_length=length, check=False)
    texts = [document("lookup", row)["prompt"][:1500] for row in (0, 1)]
    wanted = []
    for text in texts:
        tokens = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        total, done = 0.0, 1
        while done < len(tokens):
            end = min(done + length, len(tokens))
            total += log_softmax(model, tokens[max(0, end - length - 1) : end], end - done)[0]
            done = end
        wanted.append(total)
    found = face.loglikelihood_rolling([ask(text) for text in texts])
    assert found == pytest.approx(wanted, abs=2e-2)


@needs_harness
def test_a_packed_recipe_is_really_read(bundled) -> None:
    asked = document("choice")
    prompt = chat(bundled[1], asked["prompt"])
    pair = ask(prompt, asked["choices"][asked["label"]])
    raw, coarse = (
        model_class()(bundled[0], recipe, tokenizer=bundled[1], check=False) for recipe in ("raw", "int2;recent=32")
    )
    one, other = (face.loglikelihood([pair], disable_tqdm=True)[0][0] for face in (raw, coarse))
    assert abs(one - other) > 1e-4  # the same computation twice gives the same bits
    assert coarse.peak_bytes < 0.5 * raw.peak_bytes


@needs_harness
def test_an_empty_continuation_is_refused(face) -> None:
    with pytest.raises(RequestError, match="cannot be scored"):
        face._loglikelihood_tokens([(("a", ""), [5], [])])


# == generation


@needs_harness
def test_generate_until_is_what_transformers_says(bundled, face) -> None:
    model, tokenizer = bundled
    options = {"until": ["\n"], "max_gen_toks": 24, "do_sample": False}
    prompts = [chat(tokenizer, document("lookup", row)["prompt"]) for row in range(3)]
    prompts += ["A list is", "The module"]
    said = face.generate_until([ask(prompt, options) for prompt in prompts])
    for prompt, text in zip(prompts, said, strict=True):
        ids = tokenizer.encode(prompt, add_special_tokens=False, return_tensors="pt")
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(out, skip_special_tokens=True).split("\n")[0]
    assert said[:3] == [document("lookup", row)["answer"] for row in range(3)]


@needs_harness
def test_requests_of_one_call_may_differ(bundled, face) -> None:
    free, short, stopped = (
        {"until": [], "max_gen_toks": 12, "temperature": 0.0},
        {"until": None, "max_new_tokens": 3},
        {"until": [" "], "max_gen_toks": 12},
    )
    whole, start, word = face.generate_until([ask("A list is", one) for one in (free, short, stopped)])
    assert whole.startswith(start)
    assert len(start) < len(whole)
    assert word == whole.split(" ")[0]


@needs_harness
def test_a_seed_fixes_what_is_drawn(bundled) -> None:
    options = {"do_sample": True, "temperature": 1.2, "top_p": 0.95, "max_gen_toks": 12, "until": []}

    def draw(seed: int) -> list[str]:
        face = model_class()(bundled[0], tokenizer=bundled[1], seed=seed, check=False)
        return face.generate_until([ask("A list is", options)] * 3)

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) > 1  # the harness repeats a request for self-consistency


@needs_harness
def test_a_special_token_among_the_stop_strings_stops(bundled, face) -> None:
    prompt = chat(bundled[1], document("lookup")["prompt"])
    options = {"until": ["<|end|>"], "max_gen_toks": 40}
    assert face.generate_until([ask(prompt, options)]) == [document("lookup")["answer"]]


@needs_harness
def test_more_tokens_than_the_context_are_refused(face) -> None:
    with pytest.raises(RequestError, match="leaves no room for a prompt"):
        face.generate_until([ask("A list is", {"until": [], "max_gen_toks": 4096})])


# == chat, names, arguments


@needs_harness
def test_chat_template_and_names(bundled, face) -> None:
    history = [{"role": "user", "content": "Hello."}]
    assert face.apply_chat_template(history) == "<|bos|><|user|>\nHello.\n<|assistant|>\n"
    assert face.tok_encode(face.apply_chat_template(history)).count(bundled[1].bos_token_id) == 1
    begun = [*history, {"role": "assistant", "content": "The answer"}]
    assert face.apply_chat_template(begun, add_generation_prompt=False).endswith("The answer")
    assert face.chat_template(True) == bundled[1].chat_template
    assert "/" not in face.tokenizer_name
    assert face.get_model_info()["kvfold_recipe"] == "raw"
    assert (face.max_length, face.max_gen_toks, face.eot_token_id, face.prefix_token_id) == (4096, 256, 2, 1)


@needs_harness
def test_the_harness_makes_the_model_from_its_arguments() -> None:
    from lm_eval.api.registry import get_model

    register()
    register()
    face = get_model("kvfold").create_from_arg_string(
        "model=bundled,recipe=int4;recent=32,max_length=512,dtype=float32",
        {"batch_size": 4, "max_batch_size": None, "device": "cpu"},
    )
    assert (face.tokenizer_name, str(face.recipe), face.max_length) == ("bundled", "int4,recent=32", 512)
    assert face.model.dtype is torch.float32


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"pretrained": "bundled"}, RequestError, "known: model"),
        ({"recipe": "int9"}, RecipeError, "int9"),
        ({"max_length": 1}, RequestError, "max_length"),
        ({"max_length": 9999}, RequestError, "4096"),
        ({"batch_size": "many"}, RequestError, "batch_size"),
        ({"dtype": "int4"}, RequestError, "float32"),
        ({"model": "./nothing"}, ModelError, "nothing"),
        ({"model": tiny_model()}, ModelError, "tokenizer"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, says) -> None:
    with pytest.raises(error, match=says):
        model_class()(**arguments)


@needs_harness
def test_a_model_without_chat_template_cannot_chat() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    face = model_class()(tiny_model(), tokenizer=tokenizer, check=False)
    with pytest.raises(RequestError, match="no chat template"):
        face.apply_chat_template([{"role": "user", "content": "Hello."}])


# == whole runs


@needs_harness
def test_local_tasks_under_two_recipes(no_hub, bundled) -> None:
    model, tokenizer = bundled
    said: list[str] = []
    found = run_lm_eval(
        model, ["raw", "int4"], NAMES, tokenizer=tokenizer, include_path=TASKS, chat=True, limit=4, say=said.append
    )
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert list(found["recipes"]) == ["raw", "int4"]
    assert (found["tasks"], found["limit"], found["dtype"]) == (NAMES, 4, "float32")
    for outcome in found["recipes"].values():
        assert outcome["results"]["kvfold_lookup"]["exact_match,none"] >= 0.75
        assert outcome["results"]["kvfold_choice"]["acc,none"] >= 0.75
        assert outcome["n-samples"]["kvfold_choice"] == {"original": 6, "effective": 4}
    assert found["recipes"]["int4"]["kv_peak_bytes"] < 0.6 * found["recipes"]["raw"]["kv_peak_bytes"]
    assert [line.split(":")[0] for line in said[1:]] == ["raw", "int4"]


@needs_harness
@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"tasks": []}, RequestError, "no task"),
        ({"include_path": TASKS / "nothing"}, RequestError, "no folder"),
        ({"limit": 0}, RequestError, "limit"),
        ({"recipes": ["int9"]}, RecipeError, "int9"),
        ({"model_args": {"dtype": "int4"}}, RequestError, "dtype"),
        ({"model": "./nothing"}, ModelError, "nothing"),
    ],
)
def test_bad_runs_are_refused(changed, error, says) -> None:
    wanted = {"model": "bundled", "recipes": ["raw"], "tasks": NAMES, "include_path": TASKS} | changed
    with pytest.raises(error, match=says):
        run_lm_eval(wanted.pop("model"), wanted.pop("recipes"), wanted.pop("tasks"), **wanted)


@needs_harness
@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("dataset_path: kvfold/no-such-data", RequestError, "hub"),
        ("custom_dataset: !function missing.rows", UnsupportedError, "no_such_package"),
    ],
)
def test_data_that_cannot_be_had(no_hub, tmp_path, source, error, says) -> None:
    (tmp_path / "missing.py").write_text("import no_such_package\nrows = None\n", encoding="utf-8")
    lines = ["task: kvfold_far", source, "test_split: test", "output_type: generate_until", "doc_to_text: q"]
    (tmp_path / "far.yaml").write_text("\n".join([*lines, "doc_to_target: a", ""]), encoding="utf-8")
    with pytest.raises(error, match=says) as caught:
        run_lm_eval("no such model", ["raw"], ["kvfold_far"], include_path=tmp_path)
    assert caught.value.hint


@needs_harness
def test_kvfold_eval_runs_the_tasks(no_hub) -> None:
    command = ["eval", "--recipes", "int4", "--lm-eval", ",".join(NAMES), "--lm-eval-path", str(TASKS)]
    done = CliRunner().invoke(app, [*command, "--lm-eval-chat", "--limit", "2"])
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in [*NAMES, "exact_match", "acc", "raw", "int4", "first 2 documents"])
    done = CliRunner().invoke(app, [*command, "--limit", "1", "--dtype", "float32", "--json", "-"])
    found = json.loads(done.stdout)
    assert (list(found["recipes"]), found["dtype"]) == (["raw", "int4"], "float32")


@pytest.mark.parametrize("arguments", [["--limit", "3"], ["--lm-eval", "gsm8k", "--report", "somewhere"]])
def test_options_that_would_do_nothing_are_refused(arguments) -> None:
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert isinstance(done.exception, RequestError)
    assert "--lm-eval" in str(done.exception)


@needs_harness
@pytest.mark.slow  # the harness reads its own fourteen thousand tasks
def test_unknown_tasks_and_the_tasks_of_the_documentation() -> None:
    with pytest.raises(RequestError, match="did you mean gsm8k"):
        run_lm_eval("bundled", ["raw"], ["gsm8kk", *NAMES], include_path=TASKS)
    from lm_eval.tasks import TaskManager

    page = (ROOT / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    asked = re.findall(r"--(?:lm-eval|tasks) ([\w,-]+)", page)
    named = {name for names in asked for name in names.split(",")} - {"NAMES", "all"}
    named |= set(re.findall(r"`((?:longbench|aime|ruler|niah|gsm8k)\w*)`", page))
    known = set(TaskManager(include_path=str(TASKS)).all_tasks)
    assert {"gsm8k", "ruler", "longbench", "longbench2", "aime24", *NAMES} <= named <= known


@needs_harness
@pytest.mark.slow
def test_the_harness_own_command_line(tmp_path) -> None:
    command = [sys.executable, "-m", "kvfold.quality.lm_harness", "run", "--model", "kvfold", "--model_args"]
    options = ["--include_path", str(TASKS), "--apply_chat_template", "--limit", "2", "--output_path", str(tmp_path)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    run = {"capture_output": True, "text": True, "env": env, "timeout": 300, "check": False}
    good = subprocess.run([*command, "model=bundled,recipe=int4", "--tasks", ",".join(NAMES), *options], **run)
    assert good.returncode == 0, good.stderr
    assert all(name in good.stdout for name in NAMES)
    (result,) = tmp_path.rglob("results_*.json")
    assert json.loads(result.read_text(encoding="utf-8"))["config"]["kvfold_recipe"] == "int4"
