"""Packed forwards of a transformers model, and the check that they agree with its stock path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.cache import PagedCache, SequenceWork, Step
from kvfold.errors import ModelError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.modeling import STEP_KEYWORD, AttentionSwitch, ModelStep, RopeGuard, StepCache
from kvfold.recipe import Recipe

__all__ = ["PackedModel", "check_model"]

_CHECK_LENGTHS = (9, 5)
_CHECK_SPLITS = ((6, 5), (3, 0))
"""Tokens of each checked sequence in the first and in the second packed forward."""

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.25
"""Largest difference of a logit, in standard deviations of the logits: rounding stays far below, a wrong mask far above."""


class PackedModel:
    """Runs sequences of any length, packed in one row, through a model on a paged step."""

    def __init__(self, model: PreTrainedModel, geometry: Geometry) -> None:
        self.model = model
        self.switch = AttentionSwitch(model)
        self._rope = RopeGuard(model)
        self._latent = any(layer.kind == "latent" for layer in geometry.layers)

    @torch.inference_mode()
    def forward(self, step: Step, tokens: Tensor, positions: Tensor, keep: Tensor, segments: Sequence[int]) -> Tensor:
        """One forward of ``tokens [N]`` at ``positions [N]``; the logits ``[len(keep), V]`` of the rows ``keep``.

        ``segments``: tokens of each packed sequence, in order.
        """
        model_step = ModelStep(step)
        with self.switch.active(), self._rope.over(segments):
            output = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                past_key_values=StepCache(model_step) if self._latent else None,
                use_cache=False,
                logits_to_keep=keep,
                **{STEP_KEYWORD: model_step},
            )
        logits: Tensor = output.logits[0]
        return logits if logits.shape[0] == keep.numel() else logits.index_select(0, keep)

    def release(self) -> None:
        """Takes everything off the model again."""
        self._rope.remove()


def check_model(model: PreTrainedModel, geometry: Geometry) -> None:
    """Compares a short packed forward (two sequences, one of them in two chunks) with the stock path.

    Raises UnsupportedError, by the model's name and with the reason, if they differ or the packed forward fails.
    """
    name = geometry.model_type
    reasons = geometry.unsupported()
    if reasons:
        raise UnsupportedError(f"model {name}", reasons)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, geometry.vocab, (n,), generator=generator).to(model.device) for n in _CHECK_LENGTHS]
    training = model.training
    model.eval()
    packed = PackedModel(model, geometry)
    try:
        with torch.inference_mode():
            wanted = [model(input_ids=prompt[None], use_cache=False).logits[0] for prompt in prompts]
        found = _packed_logits(packed, geometry, prompts)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise UnsupportedError(f"model {name}", why=f"its packed forward fails with {type(error).__name__}: {error}") from error
    finally:
        packed.release()
        model.train(training)
    for want, got in zip(wanted, found, strict=True):
        if not bool(torch.isfinite(want).all()):
            raise ModelError(f"model {name}", why="its own logits are not finite", hint="check the weights and the dtype")
        want, got = want.float(), got.float()
        error_size = float((want - got).abs().max() / want.std().clamp_min(1e-6))
        if not error_size <= _TOLERANCE.get(model.dtype, _HALF_TOLERANCE):
            raise UnsupportedError(
                f"model {name}",
                why=f"its logits on paged attention differ from the stock path by {error_size:.2g} standard deviations",
                hint="this family does something with keys, masks or positions that the paged path does not know",
            )


def _packed_logits(packed: PackedModel, geometry: Geometry, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Logits ``[n, V]`` of every token of each prompt, computed in the chunks of ``_CHECK_SPLITS``."""
    cache = PagedCache(
        geometry, Recipe(), dtype=packed.model.dtype, device=packed.model.device, prefix_caching=False
    )
    sequences = [cache.create() for _ in prompts]
    parts: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for split in _CHECK_SPLITS:
        work = [(i, count) for i, count in enumerate(split) if count]
        step = cache.begin([SequenceWork(sequences[i], count) for i, count in work])
        tokens = torch.cat([prompts[i][done[i] : done[i] + count] for i, count in work])
        positions = torch.cat([torch.arange(done[i], done[i] + count, device=tokens.device) for i, count in work])
        keep = torch.arange(tokens.numel(), device=tokens.device)
        logits = packed.forward(step, tokens, positions, keep, [count for _, count in work])
        cache.commit(step)
        for (i, count), part in zip(work, logits.split([count for _, count in work]), strict=True):
            parts[i].append(part)
            done[i] += count
    return [torch.cat(part) for part in parts]
