"""What this machine is to kvfold: its processor, the kernel that runs here and why, threads, memory, and a self-test.

The self-test holds every build of the kernel that the processor can run, and the way through torch, to the float32
reference on the same random pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from kvfold.available import available_memory
from kvfold.bench.stream import Stream
from kvfold.codecs.pages import PageStore
from kvfold.formats import PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.cpu.threads import explain_threads, thread_count, usable_cpus
from kvfold.kernels.dense import dense_registry
from kvfold.kernels.merge import Piece
from kvfold.kernels.pages import HIDDEN, PagesCall, unpack_with
from kvfold.kernels.reference import attend
from kvfold.quality.environment import hardware, versions

__all__ = ["STORAGES", "Examination", "SelfTest", "examine", "self_test"]

STORAGES: Final = ("bfloat16", "8 bits", "4 bits", "2 bits")
"""What the pages of the self-test hold."""

_NATIVE_ERROR = 2e-3  # the kernels' promise: integer products round the query and the weights
_TORCH_ERROR = 2e-2  # torch computes in the dtype of raw pages, bfloat16
_WAKE_PAUSE_SECONDS = 2e-3  # between jobs: longer than a thread looks for work before it sleeps
_WAKE_REPEATS = 21
_SEQUENCES, _HEADS, _GROUP, _DIM, _SIZE = 2, 2, 4, 128, 32
_LENGTHS = (1003, 517)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """One kernel on pages of one storage, against the float32 reference."""

    kernel: str
    storage: str
    error: float
    """The larger of the relative error of the output (in norm) and the error of the log-sum-exp."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What `examine` found. Nothing is hidden from JSON."""

    versions: dict[str, str]
    processor: str
    cpus: int
    """Processors that this process may use, by affinity and quota."""
    features: dict[str, bool]
    kernel: str
    """What decode attention on this processor runs on: ``native BUILD``, or ``torch``."""
    passed_over: dict[str, str]
    """The other builds, and why each is not the chosen one."""
    missing: str | None
    """Why there is no native kernel; None if there is."""
    threads: int
    threads_from: str
    wake_seconds: float | None
    """Median time from a call, after a pause, until all threads work; None without the native kernel."""
    memory_bytes: int
    """What could be allocated now, without swapping."""
    stream_gb_s: float
    cuda: str | None
    """The name of the GPU."""
    no_cuda: str | None
    """Why there is none."""
    tests: tuple[SelfTest, ...]

    @property
    def passed(self) -> bool:
        """Whether every self-test passed."""
        return all(test.passed for test in self.tests)

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the verdicts."""
        tests = [asdict(test) | {"passed": test.passed} for test in self.tests]
        return asdict(self) | {"tests": tests, "passed": self.passed}


def examine() -> Examination:
    """Look at everything; takes a second or two. Raises KVFoldError if the environment makes no sense."""
    threads, no_cuda = thread_count(), _why_no_cuda()
    chosen = (*cpu.variants(), None)[0]
    return Examination(
        versions=versions(),
        processor=str(hardware(torch.device("cpu"))["processor"]),
        cpus=usable_cpus(),
        features=cpu.features(),
        kernel="torch" if chosen is None else f"native {chosen}",
        passed_over=_passed_over(chosen),
        missing=cpu.available(),
        threads=threads,
        threads_from=explain_threads(),
        wake_seconds=_median_wake(threads),
        memory_bytes=available_memory(torch.device("cpu")),
        stream_gb_s=_stream_gb_s(),
        cuda=torch.cuda.get_device_name() if no_cuda is None else None,
        no_cuda=no_cuda,
        tests=tuple(self_test()),
    )


def _passed_over(chosen: str | None) -> dict[str, str]:
    reasons = {}
    for build, lacks in cpu.builds().items():
        if build != chosen:
            reasons[build] = f"this processor lacks {lacks}" if lacks else f"{chosen} has precedence"
    return reasons


def _stream_gb_s() -> float:
    stream = Stream(torch.device("cpu"))
    return sorted(stream.read() for _ in range(3))[1]


def _median_wake(threads: int) -> float | None:
    times = [cpu.wake_seconds(threads, _WAKE_PAUSE_SECONDS) for _ in range(_WAKE_REPEATS)]
    known = sorted(time for time in times if time is not None)
    return known[len(known) // 2] if known else None


def _why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"this torch was built for CUDA {torch.version.cuda}, and finds no device with a driver for it"


# == the self-test


def self_test(seed: int = 0) -> list[SelfTest]:
    """Every kernel that can run here on every storage."""
    kernels: dict[str, tuple[Callable[[PagesCall], Piece], float]] = {
        f"native {name}": (partial(cpu.attend, variant=index), _NATIVE_ERROR)
        for index, name in enumerate(cpu.variants())
    }
    kernels["torch"] = unpack_with(dense_registry()), _TORCH_ERROR
    found = []
    for storage in STORAGES:
        call, want = _case(storage, torch.Generator().manual_seed(seed))
        for kernel, (run, tolerance) in kernels.items():
            error = _error(run(call), want)
            found.append(SelfTest(kernel=kernel, storage=storage, error=error, tolerance=tolerance))
    return found


def _case(storage: str, generator: torch.Generator) -> tuple[PagesCall, Piece]:
    """A call over random pages in random order, the last ones partly hidden, and what the reference says of it."""
    raw = storage == "bfloat16"
    dtype = torch.bfloat16 if raw else torch.float32
    bits = 16 if raw else int(storage.split()[0])
    side = VectorFormat(dim=_DIM, bits=bits, quantized=not raw, group=_DIM, rotation="none" if raw else "hadamard")
    fmt, pages = PageFormat(_SIZE, side, side), -(-max(_LENGTHS) // _SIZE)
    normal = partial(torch.randn, generator=generator)
    order = torch.randperm(_SEQUENCES * _HEADS * pages, generator=generator)
    store = PageStore(torch.zeros(order.numel() * fmt.page_bytes, dtype=torch.uint8), fmt, dtype)
    k, v = (normal(order.numel(), _SIZE, _DIM).to(dtype) for _ in range(2))
    store.write_pages(order * fmt.page_bytes, k, v, 0)
    addr = order.view(_SEQUENCES, _HEADS, pages) * fmt.page_bytes
    seen = torch.arange(pages * _SIZE) < torch.tensor(_LENGTHS)[:, None]
    call = PagesCall(
        q=normal(_SEQUENCES, _HEADS, _GROUP, _DIM),
        arena=store.arena,
        addr=addr,
        shift=0,
        fmt=fmt,
        dtype=dtype,
        scale=_DIM**-0.5,
        read=lambda part: (store.read_k(addr[..., part]), store.read_v(addr[..., part])),
        bias=torch.where(seen, 0.0, HIDDEN),
    )
    return call, _truth(call, store)


def _truth(call: PagesCall, store: PageStore) -> Piece:
    pieces = []
    for rows, addr, length in zip(call.q, call.addr, _LENGTHS, strict=True):
        k, v = (stored.transpose(0, 1)[:length] for stored in (store.read_k(addr), store.read_v(addr)))
        q_pos, k_pos = torch.tensor([length]), torch.arange(length)
        pieces.append(attend(rows.flatten(0, 1)[None], k, v, q_pos=q_pos, k_pos=k_pos, scale=call.scale))
    o, lse = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return o.view(*call.q.shape[:-1], -1), lse.view(call.q.shape[:-1])


def _error(found: Piece, want: Piece) -> float:
    def largest(difference: Tensor) -> float:
        return float(difference.max())

    away = (found[0] - want[0]).flatten(-2).norm(dim=-1) / want[0].flatten(-2).norm(dim=-1)
    return max(largest(away), largest((found[1] - want[1]).abs()), key=lambda error: (error != error, error))
