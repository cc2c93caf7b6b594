"""All operations with all their implementations."""

from __future__ import annotations

from kvfold.kernels import bounds, cpu, triton
from kvfold.kernels.bounds import BoundsCall
from kvfold.kernels.cpu import retrieval
from kvfold.kernels.cpu.threads import thread_count
from kvfold.kernels.dense import dense_registry
from kvfold.kernels.pages import PagesCall, unpack_with
from kvfold.kernels.reference import best_pages, page_bounds, paged_attend
from kvfold.kernels.registry import OpRegistry

__all__ = ["RAW_ROWS", "full_registry"]

RAW_ROWS = 64
"""Rows of queries for which a list of raw pages is walked where it lies. For more it is gathered: at so many
rows the dense products of matrices make up for the copy. Packed pages are walked for any number, since unpacking costs
more.
"""


def full_registry() -> OpRegistry:
    """A registry that knows ``attend_dense``, ``attend_pages``, ``bound_pages`` and ``choose_pages``. KVFoldError
    if ``KVFOLD_THREADS`` makes no sense.
    """
    thread_count()  # refused here rather than in the middle of a step
    registry = dense_registry()
    registry.register_reference("attend_pages", paged_attend)
    registry.register("attend_pages", "native", _native_refuses, cpu.attend, priority=10)
    registry.register("attend_pages", "triton", triton.refuses, triton.attend, priority=10)
    registry.register("attend_pages", "unpack", _runs_anywhere, unpack_with(registry), priority=0)
    registry.register_reference("bound_pages", page_bounds)
    registry.register_reference("choose_pages", best_pages)
    for op, native, plain in (
        ("bound_pages", retrieval.bound, bounds.bound),
        ("choose_pages", retrieval.choose, bounds.choose),
    ):
        registry.register(op, "native", retrieval.refuses, native, priority=10)
        registry.register(op, "torch", _runs_anywhere, plain, priority=0)
    return registry


def _native_refuses(call: PagesCall) -> str | None:
    rows, reason = call.q.shape[2], cpu.refuses(call)
    if reason is None and rows > RAW_ROWS and not (call.fmt.k.quantized or call.fmt.v.quantized):
        return f"raw pages are faster gathered for {rows} rows of queries, more than {RAW_ROWS}"
    return reason


def _runs_anywhere(call: PagesCall | BoundsCall) -> str | None:
    return None
