"""What the memory manager is told of a layer group under a recipe."""

from __future__ import annotations

from kvfold.formats import TABLE_ENTRY_BYTES
from kvfold.geometry import LayerGroup
from kvfold.memory.manager import GroupSpec
from kvfold.recipe import Recipe
from kvfold.retention.build import build_method

__all__ = ["group_spec"]


def group_spec(group: LayerGroup, margin: int = 0, recipe: Recipe | None = None) -> GroupSpec:
    """What the books are told of a layer group. ``margin``: tokens to keep behind its window. ``recipe``: whose
    retention runs on groups without a window (None: none does).
    """
    rule = recipe.rule if recipe is not None and group.window is None else None
    biased = (
        rule is not None and recipe is not None and recipe.method is not None and build_method(recipe.method).merges
    )
    return GroupSpec(
        name=group.name,
        raw_block_bytes=group.raw_block_bytes,
        packed_block_bytes=group.packed_block_bytes,
        sinks=group.sinks,
        recent=group.recent,
        kind=group.kind,
        window=group.window,
        margin=margin,
        pages=group.pages_per_block,
        rule=rule,
        # The biases of a page's tokens, float32, counted in entries of tables.
        page_entries=1 + -(-4 * group.raw.block_size // TABLE_ENTRY_BYTES) if biased else 1,
    )
