"""Packed forwards of a transformers model, and the check that they agree with its stock path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.cache import PagedCache, SequenceWork, Step
from kvfold.errors import ModelError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.modeling import ModelStep, StepCache
from kvfold.recipe import Recipe
from kvfold.rotary import Lengths, RopeGuard
from kvfold.switch import AttentionSwitch

__all__ = ["PackedModel", "check_model"]

_CHECK_LENGTHS = (9, 5)
_CHECK_SPLITS = ((6, 5), (3, 0))
"""Tokens of each checked sequence in the first and in the second packed forward."""

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.25
"""Largest difference of a logit, in standard deviations of the logits: rounding stays far below, a wrong mask far
above.
"""

_NOISE_FACTOR = 1.6
"""So much more than a model's own noise may its packed forward differ: 1.25 was seen in int8, 2 and more for masks that
are wrong for a single key.
"""

_NOISE_LIMIT = 0.25
"""Own noise above which a wrong mask could hide."""


class PackedModel:
    """Runs sequences of any length, packed in one row, through a model on a paged step.

    ``attended``: the layers that have attended on pages so far.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.switch = AttentionSwitch(model)
        self.attended: set[int] = set()
        self._rope = RopeGuard(model)

    @torch.inference_mode()
    def forward(
        self,
        step: Step,
        tokens: Tensor,
        positions: Tensor,
        keep: Tensor,
        segments: Sequence[int],
        lengths: Sequence[Lengths] | None = None,
    ) -> Tensor:
        """One forward of ``tokens [N]`` at ``positions [N]``; the logits ``[len(keep), V]`` of the rows ``keep``.

        ``segments``: tokens of each packed sequence, in order; ``lengths``: what their rotary factors follow from, see
        `RopeGuard.over`.
        """
        model_step = ModelStep(step)
        try:
            with self.switch.active(model_step), self._rope.over(segments, lengths):
                output = self.model(
                    input_ids=tokens[None],
                    position_ids=positions[None],
                    past_key_values=StepCache(model_step, positions),
                    use_cache=False,
                    logits_to_keep=keep,
                )
        finally:
            self.attended |= model_step.attended
        logits: Tensor = output.logits[0]
        return logits if logits.shape[0] == keep.numel() else logits.index_select(0, keep)

    def release(self) -> None:
        """Takes everything off the model again."""
        self._rope.remove()


def check_model(model: PreTrainedModel, geometry: Geometry) -> None:
    """Compares a short packed forward (two sequences, one of them in two chunks) with the stock path.

    Raises UnsupportedError, by the model's name and with the reason, if they differ or the packed forward fails. Where
    a model's logits depend on what else is in the batch (dynamically quantized weights), they may differ as much.
    """
    name = geometry.model_type
    reasons = geometry.unsupported()
    if reasons:
        raise UnsupportedError(f"model {name}", reasons)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, geometry.vocab, (n,), generator=generator).to(model.device) for n in _CHECK_LENGTHS]
    training = model.training
    model.eval()
    packed = PackedModel(model)
    try:
        wanted = [_stock_logits(model, prompt) for prompt in prompts]
        found = _packed_logits(packed, geometry, prompts)
    except UnsupportedError as error:
        raise UnsupportedError(f"model {name}", why=str(error)) from error
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        where = "" if packed.attended else " before any layer attends through transformers' attention interface"
        why = f"its packed forward fails{where}, with {type(error).__name__}: {error}"
        raise UnsupportedError(f"model {name}", why=why) from error
    finally:
        packed.release()
        model.train(training)
    if not packed.attended:
        raise UnsupportedError(f"model {name}", why="no layer attends through transformers' attention interface")
    if not all(bool(torch.isfinite(want).all()) for want in wanted):
        raise ModelError(f"model {name}", why="its own logits are not finite", hint="check the weights and the dtype")
    worst = max(_deviation(got, want) for got, want in zip(found, wanted, strict=True))
    if not worst <= _TOLERANCE.get(model.dtype, _HALF_TOLERANCE):
        _judge_noise(model, prompts, wanted, found, f"model {name}")


def _judge_noise(
    model: PreTrainedModel, prompts: Sequence[Tensor], wanted: Sequence[Tensor], found: Sequence[Tensor], what: str
) -> None:
    """Lets a difference pass that is no greater than the model's own; UnsupportedError if it is, or if that cannot be
    told.
    """
    noise = _own_noise(model, prompts)
    hint = "check=False takes it as it is: compare its answers with those of transformers' own cache"
    if noise > _NOISE_LIMIT:
        why = f"its own logits differ by {noise:.2g} standard deviations when prompts share a batch"
        raise UnsupportedError(what, why=f"{why}: too much to tell whether its masks are right", hint=hint)
    if max(_spread(got, want) for got, want in zip(found, wanted, strict=True)) <= _NOISE_FACTOR * noise:
        return
    error = max(_deviation(got, want) for got, want in zip(found, wanted, strict=True))
    own = (
        "it numbers positions in its own way"
        if _own_positions(model, prompts[0])
        else "it has keys or masks of its own"
    )
    why = f"its logits on paged attention differ from the stock path by {error:.2g} standard deviations"
    raise UnsupportedError(what, why=f"{why}: {own}", hint=hint if noise > _TOLERANCE[torch.float32] else "")


def _own_noise(model: PreTrainedModel, prompts: Sequence[Tensor]) -> float:
    """How much a model's own logits change, as :func:`_spread`, when prompts share a batch; 0 if it takes no batch.

    Layers that round by what else is in the batch (dynamically quantized weights) differ there. Masks and positions do
    not: the prompts are cut to pieces of the same length.
    """
    length = min(prompt.numel() for prompt in prompts)
    rows = [row for prompt in prompts for row in prompt.unfold(0, length, 1)]
    batches = [range(len(rows)), *([i, len(rows) - 1] for i in range(len(rows) - 1))]
    try:
        alone = [_stock_logits(model, row) for row in rows]
        with torch.inference_mode():
            together = [model(input_ids=torch.stack([rows[i] for i in batch]), use_cache=False) for batch in batches]
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return 0.0
    return max(
        _spread(logits, alone[i])
        for batch, output in zip(batches, together, strict=True)
        for i, logits in zip(batch, output.logits, strict=True)
    )


def _stock_logits(model: PreTrainedModel, prompt: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits ``[n, V]`` of the model's own forward, in float32, at its own or at the given ``positions [n]``."""
    given = {} if positions is None else {"position_ids": positions[None]}
    with torch.inference_mode():
        output = model(input_ids=prompt[None], use_cache=False, **given)
    if not isinstance(getattr(output, "logits", None), Tensor):
        hint = "pass the model with its language modelling head, as AutoModelForCausalLM gives it"
        raise ModelError(f"a {type(model).__name__}", why="its forward gives no logits", hint=hint)
    logits: Tensor = output.logits[0]
    return logits.float()


def _own_positions(model: PreTrainedModel, prompt: Tensor) -> bool:
    """Whether a model's positions do not start at 0, or are not the ones it is given."""
    own = _stock_logits(model, prompt)
    positions = torch.arange(prompt.numel(), device=prompt.device)
    errors = [_deviation(_stock_logits(model, prompt, given), own) for given in (positions, 2 * positions)]
    return [error < _TOLERANCE[torch.float32] for error in errors] != [True, False]


def _spread(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of a token's difference, at the worst token, in standard deviations of the wanted logits: where
    all logits are noisy, it tells noise from a wrong mask by far better than the largest difference.
    """
    return float((found.float() - wanted).square().mean(-1).sqrt().max() / wanted.std().clamp_min(1e-6))


def _deviation(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of a logit, in standard deviations of the wanted ones."""
    return float((found.float() - wanted).abs().max() / wanted.std().clamp_min(1e-6))


def _packed_logits(packed: PackedModel, geometry: Geometry, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Logits ``[n, V]`` of every token of each prompt, computed in the chunks of ``_CHECK_SPLITS``."""
    cache = PagedCache(geometry, Recipe(), dtype=packed.model.dtype, device=packed.model.device, prefix_caching=False)
    sequences = [cache.create() for _ in prompts]
    parts: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for split in _CHECK_SPLITS:
        work = [(i, count) for i, count in enumerate(split) if count]
        step = cache.begin([SequenceWork(sequences[i], count) for i, count in work])
        tokens = torch.cat([prompts[i][done[i] : done[i] + count] for i, count in work])
        positions = torch.cat([torch.arange(done[i], done[i] + count, device=tokens.device) for i, count in work])
        keep = torch.arange(tokens.numel(), device=tokens.device)
        lengths = [Lengths.whole(prompts[i].numel()) for i, _ in work]
        logits = packed.forward(step, tokens, positions, keep, [count for _, count in work], lengths)
        cache.commit(step)
        for (i, count), part in zip(work, logits.split([count for _, count in work]), strict=True):
            parts[i].append(part)
            done[i] += count
    return [torch.cat(part) for part in parts]
