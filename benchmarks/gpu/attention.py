"""The GPU kernel of decode attention against SDPA in bfloat16, beside the speed of memory.

    python -m benchmarks.gpu.attention --json benchmarks/results/gpu-attention.json

Every implementation is first held against float32 attention on the same stored numbers; what fails is not timed. Calls
are captured into a CUDA graph over several sets of pages, together far larger than the cache of the device, and the
median of many replays counts: what Python spends on a launch is not measured here (see `kvfold bench decode`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvfold.bench.stream import Stream
from kvfold.codecs.pages import PageStore
from kvfold.formats import PageFormat, VectorFormat
from kvfold.kernels import triton
from kvfold.kernels.catalog import full_registry
from kvfold.kernels.pages import PagesCall

SIZE = 32
GATE = 2e-3  # relative error of the output
ROTATED = 2 * 50e6  # bytes that one replay reads at least: twice the second-level cache of an H100
RECIPES = ("raw", "int8", "int4", "int2")


@dataclass(frozen=True)
class Setting:
    batch: int
    context: int
    dim: int
    group: int
    heads: int

    @property
    def scale(self) -> float:
        return self.dim**-0.5


def formats(recipe: str, dim: int) -> PageFormat:
    if recipe == "raw":
        side = VectorFormat.raw(dim, 2)
    else:
        side = VectorFormat(dim, int(recipe[3:]), quantized=True, group=dim, rotation="hadamard")
    return PageFormat(SIZE, side, side)


def paged(recipe: str, at: Setting, sets: int) -> list[PagesCall]:
    """Calls over ``sets`` sets of pages in random places of one arena; the arena's rest is NaN."""
    fmt = formats(recipe, at.dim)
    shape = (sets, at.batch, at.heads, at.context // SIZE)
    count = sets * at.batch * at.heads * shape[3]
    arena = torch.full(((count + 1) * fmt.page_bytes,), 255, dtype=torch.uint8, device="cuda")
    store = PageStore(arena, fmt, torch.bfloat16)
    addr = (torch.randperm(count, device="cuda") * fmt.page_bytes).view(shape)
    for flat in addr.view(-1).split(1 << 14):
        k, v = (torch.randn(len(flat), SIZE, at.dim, device="cuda").bfloat16() for _ in range(2))
        store.write_pages(flat, k, v)
    q = torch.randn(at.batch, at.heads, at.group, at.dim, device="cuda").bfloat16().float()

    def call(addr: Tensor) -> PagesCall:
        def read(pages: slice) -> tuple[Tensor, Tensor]:
            return store.read_k(addr[..., pages]), store.read_v(addr[..., pages])

        return PagesCall(q, arena, addr, 0, fmt, torch.bfloat16, at.scale, read)

    return [call(each.contiguous()) for each in addr]


def truth(call: PagesCall) -> Tensor:
    """Float32 attention of the first sequence over what its pages hold, decoded in float32."""
    store = PageStore(call.arena, call.fmt, torch.bfloat16)
    wide = torch.float32 if call.fmt.k.quantized else torch.bfloat16
    k, v = (side.read(call.addr[0], wide).double() for side in (store.plain.k, store.plain.v))
    return torch.softmax(call.q[0].double() @ k.mT * call.scale, -1) @ v


def error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


def seconds(run: list[Callable[[], object]], repeats: int = 20) -> float:
    """Of one of the calls, from replays of a graph of all of them."""
    for one in run:
        one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in run:
            one()
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(run))
    return statistics.median(times[3:])


def sets_for(recipe: str, at: Setting) -> int:
    pages = at.batch * at.heads * at.context // SIZE * formats(recipe, at.dim).page_bytes
    return max(2, -(-int(ROTATED) // pages))


def rivals(at: Setting) -> dict[str, tuple[float, float]]:
    """Seconds and error of each way to call SDPA on dense bfloat16 keys and values."""
    sets = sets_for("raw", at)
    dense = [
        tuple(torch.randn(at.batch, at.heads, at.context, at.dim, device="cuda").bfloat16() for _ in range(2))
        for _ in range(sets)
    ]
    q = torch.randn(at.batch, at.heads, at.group, at.dim, device="cuda").bfloat16()
    lone, options = q.flatten(1, 2).unsqueeze(2), {"scale": at.scale}

    def repeated(x: Tensor) -> Tensor:  # as transformers' repeat_kv
        return x[:, :, None].expand(-1, -1, at.group, -1, -1).reshape(at.batch, -1, at.context, at.dim)

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sdpa, enable_gqa": lambda k, v: sdpa(lone, k, v, enable_gqa=True, **options),
        "sdpa, repeated heads": lambda k, v: sdpa(lone, repeated(k), repeated(v), **options),
        "sdpa, group as rows": lambda k, v: sdpa(q, k, v, **options),
    }
    k, v = (x[0].double() for x in dense[0])
    want = torch.softmax(q[0].double() @ k.mT * at.scale, -1) @ v
    found = {}
    for name, way in ways.items():
        wrong = error(way(*dense[0])[0].reshape(want.shape), want)
        found[name] = seconds([lambda way=way, pair=pair: way(*pair) for pair in dense]), wrong
    return found


def rows(at: Setting, recipes: list[str]) -> list[dict[str, object]]:
    unpack = next(i.run for i in full_registry().implementations("attend_pages") if i.name == "unpack")
    yardstick = Stream(torch.device("cuda"))
    stream = max(yardstick.read() for _ in range(5))
    dense_bytes = at.batch * at.heads * at.context * at.dim * 4
    base = {"head_dim": at.dim, "group": at.group, "kv_heads": at.heads, "context": at.context, "batch": at.batch}
    timed: list[tuple[str, float, float, int]] = []
    for name, (each, wrong) in rivals(at).items():
        timed.append((name, each, wrong, dense_bytes))
    torch.cuda.empty_cache()
    for recipe in recipes:
        calls = paged(recipe, at, sets_for(recipe, at))
        wrong = error(triton.attend(calls[0])[0][0], truth(calls[0]))
        if not wrong <= GATE:
            raise SystemExit(f"{recipe}: relative error {wrong:.2g}")
        fmt = calls[0].fmt
        walked = at.batch * at.heads * at.context * (fmt.k.token_bytes + fmt.v.token_bytes)
        timed.append((recipe, seconds([lambda c=c: triton.attend(c) for c in calls]), wrong, walked))
        if recipe != "raw":
            wrong = error(unpack(calls[0])[0][0], truth(calls[0]))
            timed.append((f"{recipe}, unpacked by torch", seconds([lambda call=calls[0]: unpack(call)]), wrong, walked))
        calls.clear()
        torch.cuda.empty_cache()
    stock = min(each for name, each, _, _ in timed if "repeated" in name)
    best = min(each for name, each, _, _ in timed if name.startswith("sdpa"))
    return [
        base
        | {
            "contestant": name,
            "seconds": each,
            "bytes_read": walked,
            "gb_s": walked / each / 1e9,
            "stream_gb_s": stream,
            "fraction_of_stream": walked / each / 1e9 / stream,
            "vs_best_bf16": best / each,
            "vs_repeated_sdpa": stock / each,
            "relative_error": wrong,
        }
        for name, each, wrong, walked in timed
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--recipes", default=";".join(RECIPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    found: list[dict[str, object]] = []
    for batch in args.batch:
        found += rows(Setting(batch, args.context, args.head_dim, args.group, args.kv_heads), args.recipes.split(";"))
    for row in found:
        print(
            f"batch {row['batch']:<3} {row['contestant']:<24} {row['seconds'] * 1e6:10.1f} us {row['gb_s']:8.0f} GB/s"
            f" {row['fraction_of_stream']:5.2f} of stream  {row['vs_best_bf16']:6.2f} x best bf16"
            f" {row['vs_repeated_sdpa']:6.2f} x repeated  error {row['relative_error']:.1e}"
        )
    if args.json:
        about = {
            "command": " ".join(["python -m benchmarks.gpu.attention", *sys.argv[1:]]),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps(about | {"rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
