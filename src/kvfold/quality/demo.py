"""The main job in two minutes: one real document, planted facts, the same questions under several recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.engine import Engine, SamplingParams
from kvfold.engine.loading import available_recipes, parse_recipes
from kvfold.engine.runner import ModelRunner
from kvfold.errors import RequestError
from kvfold.geometry import Geometry
from kvfold.quality.contestant import Forced
from kvfold.quality.forced import teacher_force
from kvfold.quality.metrics import agreement
from kvfold.quality.tasks import Document, demo_document
from kvfold.recipe import Recipe

__all__ = ["DEMO_RECIPES", "Answer", "DemoRow", "run_demo"]

DEMO_RECIPES = ("raw", "int8", "int4", "int2:calibrated", "int2")
"""Compared where nothing else is asked for, as far as the model can be served with them."""

_ANSWER_TOKENS = 16
_SCORED_FROM = 256  # before that, most of the context is still inside the sinks and the recent window
_STEP_TOKENS = 512  # of all questions together in one step of the engine
_POOL_SLACK = 64 << 10

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one question."""

    question: str
    expected: str
    said: str

    @property
    def right(self) -> bool:
        """Exact match."""
        return self.said.strip() == self.expected


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One recipe on the demo's document. ``compression``: bytes of ``raw`` over ``kv_bytes``, for the same tokens.

    ``kl`` (nats, mean) and ``top1_agreement`` compare with ``raw`` over ``positions`` teacher-forced tokens; None if
    methods of the recipe (``idle``) never acted on them.
    """

    recipe: str
    kv_bytes: int
    compression: float
    answers_right: int
    answers_total: int
    kl: float | None
    kl_p99: float | None
    top1_agreement: float | None
    positions: int
    context_tokens: int
    answers: tuple[Answer, ...]
    idle: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipes: Sequence[str] | None = None,
    target_tokens: int = 1800,
    seed: int = 0,
    say: Say = lambda _: None,
) -> tuple[Document, list[DemoRow]]:
    """Asks every question of the document under every recipe; ``raw`` always runs first, as the yardstick.

    ``say`` is told what is happening, one line at a time. Raises RequestError for a tokenizer without a chat template
    or a text the model is too short for, RecipeError or UnsupportedError for a recipe; all before anything runs.
    """
    recipes = available_recipes(DEMO_RECIPES, model) if recipes is None else recipes
    parsed = parse_recipes(["raw", *recipes], model)
    if not tokenizer.chat_template:
        raise RequestError(
            "the demo asks questions",
            why="the tokenizer has no chat template",
            hint="take a model that is made for chat, or 'bundled'",
        )
    document = demo_document(seed, target_tokens, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    prompts = [_ask(tokenizer, document.text, fact.question) for fact in document.facts]
    forced = _transcript(tokenizer, document)
    longest = max(len(forced), max(map(len, prompts)) + _ANSWER_TOKENS)
    if longest > (limit := Geometry.from_config(model.config).max_positions):
        why = f"the model takes {limit} positions"
        raise RequestError(f"{longest} tokens of document and questions", why=why, hint="ask for a shorter document")
    rows: list[DemoRow] = []
    reference, raw_bytes = None, 0
    for text, recipe in parsed.items():
        pool = _pool_bytes(model, recipe, longest)
        say(f"{text}: reading {len(forced)} tokens")
        result = _read(model, recipe, pool, forced, check=reference is None)
        if reference is None:
            reference, raw_bytes = result.logits, result.kv_bytes
        against = agreement(reference, result.logits)
        say(f"{text}: answering {len(prompts)} questions")
        answers = _answers(model, tokenizer, recipe, pool, prompts, document)
        if text != "raw" or "raw" in recipes:
            rows.append(
                DemoRow(
                    recipe=text,
                    kv_bytes=result.kv_bytes,
                    compression=raw_bytes / result.kv_bytes,
                    answers_right=sum(answer.right for answer in answers),
                    answers_total=len(answers),
                    kl=None if result.idle else against.kl_mean,
                    kl_p99=None if result.idle else against.kl_p99,
                    top1_agreement=None if result.idle else against.top1,
                    positions=against.positions,
                    context_tokens=len(forced),
                    answers=answers,
                    idle=result.idle,
                )
            )
    return document, rows


def _pool_bytes(model: PreTrainedModel, recipe: Recipe, longest: int) -> int:
    """Twice what two private sequences of ``longest`` tokens and a step need, raw or under ``recipe``."""
    geometry, width = Geometry.from_config(model.config), model.dtype.itemsize
    held = max(geometry.cache_bytes(each, width, [longest] * 2) for each in (Recipe(), recipe))
    raw_block = sum(group.raw_block_bytes for group in geometry.groups(recipe, width))
    return 2 * (held + raw_block * (_STEP_TOKENS // recipe.block_size + 1)) + _POOL_SLACK


def _read(model: PreTrainedModel, recipe: Recipe, pool: int, tokens: Sequence[int], *, check: bool) -> Forced:
    """``tokens`` teacher-forced under ``recipe``; the pool is gone afterwards."""
    runner = ModelRunner(model, recipe=recipe, kv_memory=pool, check=check)
    try:
        return teacher_force(runner, tokens, score_from=_SCORED_FROM)
    finally:
        runner.release()


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    pool: int,
    prompts: Sequence[list[int]],
    document: Document,
) -> tuple[Answer, ...]:
    with Engine(
        model, tokenizer=tokenizer, recipe=recipe, kv_memory=pool, max_batched_tokens=_STEP_TOKENS, check=False
    ) as engine:
        outputs = engine.generate(list(prompts), SamplingParams(max_tokens=_ANSWER_TOKENS), progress=False)
    return tuple(
        Answer(fact.question, fact.answer, output.text) for fact, output in zip(document.facts, outputs, strict=True)
    )


def _ask(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> list[int]:
    messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def _transcript(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """The document and all questions with their right answers, as one conversation."""
    messages = []
    for i, fact in enumerate(document.facts):
        content = f"{document.text}\n\n{fact.question}" if i == 0 else fact.question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": fact.answer}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    return list(tokenizer.encode(rendered, add_special_tokens=False))
