"""How fast decoding is where the cache matters: for the demo, in a few seconds, on the model that it has shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from transformers import PreTrainedModel

from kvfold.bench.decode import DecodeRow, bench_decode, spare_positions
from kvfold.engine.loading import parse_recipes
from kvfold.errors import KVFoldError
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe

__all__ = ["MOST_SEQUENCES", "demo_speed"]

MOST_SEQUENCES: Final = 16
_MOST_TOKENS: Final = 4096
_LEAST_TOKENS: Final = 256
_ROUND: Final = 128
_STEPS: Final = 8
_SECONDS: Final = 8.0
_MOST_BYTES: Final = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Of the raw cache of all sequences; every recipe holds one beside it."""


def demo_speed(
    model: PreTrainedModel, recipes: Sequence[str], *, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> tuple[list[DecodeRow], str]:
    """Whole decode steps of up to `MOST_SEQUENCES` sequences, as long as the model's positions and memory allow, under
    ``recipes`` and beside transformers; and why there are none, where that is so. The correctness gate comes first.
    """
    geometry = Geometry.from_config(model.config)
    stored = [layer for layer in geometry.layers if layer.stores]
    if any(layer.window is not None or layer.kind != "full" for layer in stored):
        return [], "the model has layers with a window, or of another kind than full attention: see `kvfold bench`"
    parsed = parse_recipes(recipes, model)
    room = geometry.max_positions - _STEPS - spare_positions([Recipe(), *parsed.values()])
    context = min(_MOST_TOKENS, room // _ROUND * _ROUND)
    if context < _LEAST_TOKENS:
        return [], f"the model takes {geometry.max_positions} positions"
    each = geometry.cache_bytes(Recipe(), model.dtype.itemsize, [context])
    batch = min(MOST_SEQUENCES, _MOST_BYTES[model.device.type] // each)
    if batch < 1:
        return [], "one sequence alone would take too much memory for a demo: see `kvfold bench decode`"
    say(f"timing {batch} x {context:,} tokens")
    try:
        rows = bench_decode(
            model,
            recipes=list(parsed),
            context=context,
            batch=batch,
            steps=_STEPS,
            seconds=_SECONDS,
            rivals=["transformers"],
            seed=seed,
        )
    except KVFoldError as error:
        return [], f"{error.what}: {error.why}" if error.why else error.what
    return rows, ""
