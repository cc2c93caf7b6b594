"""The write path against plain torch: rows encoded into pages, blocks sealed, pages unpacked, in bytes of bfloat16.

    python benchmarks/write_path.py --json benchmarks/results/write_path.json

Before anything is timed, what the extension writes must be what plain torch writes: the same codes but for a few that
rounding tips over, and no error beyond that of the codec. Then every operation is timed on one thread and on all,
beside plain torch on as many threads and beside a copy of as many bytes, interleaved: the best of ``--seconds`` of
each. ``gb_s`` counts keys and values as bfloat16, as they come in (or out); ``gb_s_core`` is that for each thread. At
the end: what sealing adds to decode attention, and what a layer's write of a decode step costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvfold.bench.stream import Stream
from kvfold.codecs.pages import PageStore, seal, unseal
from kvfold.formats import PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.cpu.rows import row_variants
from kvfold.kernels.pages import PagesCall
from kvfold.kernels.runs import TokenRuns

BLOCK = 32
AGREE_AT_LEAST = 0.98
LAYERS, HEADS, GROUP = 16, 8, 4  # of a llama-3.2-1b; its head dim is 64


class Bench:
    """Raw and packed pages of ``pages`` pages in one arena, and the rows that lie in them."""

    def __init__(self, bits: int, dim: int, pages: int) -> None:
        self.raw_fmt = PageFormat(BLOCK, VectorFormat.raw(dim, 2), VectorFormat.raw(dim, 2))
        side = VectorFormat(dim, bits, quantized=True, group=128, rotation="hadamard")
        self.fmt = PageFormat(BLOCK, side, side)
        raw_bytes = pages * self.raw_fmt.page_bytes
        self.arena = torch.zeros(raw_bytes + pages * self.fmt.page_bytes, dtype=torch.uint8)
        self.raw = PageStore(self.arena, self.raw_fmt, torch.bfloat16)
        self.packed = PageStore(self.arena, self.fmt, torch.bfloat16)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        self.raw_addr = order * self.raw_fmt.page_bytes
        self.packed_addr = raw_bytes + order.flip(0) * self.fmt.page_bytes
        self.k, self.v = torch.randn(2, pages, BLOCK, dim, generator=torch.Generator().manual_seed(1)).bfloat16()
        self.raw.write_pages(self.raw_addr, self.k, self.v)
        self.bf16_bytes = self.k.nbytes + self.v.nbytes

    def gate(self) -> float:
        """The share of codes that equal those of plain torch; exits if too few do or a row is off by more than a
        code.
        """
        seal(self.raw, self.raw_addr, self.packed, self.packed_addr)
        mine = (
            self.packed.plain.k.codes.pages.take(self.packed_addr),
            self.packed.plain.v.codes.pages.take(self.packed_addr),
        )
        found = [self.packed.plain.read_k(self.packed_addr), self.packed.plain.read_v(self.packed_addr)]
        if not torch.equal(found[0], self.packed.read_k(self.packed_addr)):
            sys.exit("correctness gate: pages are not unpacked as plain torch unpacks them")
        self.packed.plain.write_pages(self.packed_addr, self.k, self.v, None)
        other = (
            self.packed.plain.k.codes.pages.take(self.packed_addr),
            self.packed.plain.v.codes.pages.take(self.packed_addr),
        )
        share = statistics.mean(float((a == b).float().mean()) for a, b in zip(mine, other, strict=True))
        wanted = [self.packed.plain.read_k(self.packed_addr), self.packed.plain.read_v(self.packed_addr)]
        errors = [self._error(pair) for pair in (found, wanted)]
        if share < AGREE_AT_LEAST or errors[0] > 1.001 * errors[1]:
            sys.exit(f"correctness gate: {share:.2%} of the words agree, error {errors[0]:.5f} against {errors[1]:.5f}")
        return share

    def _error(self, found: list[Tensor]) -> float:
        """Root mean square error against the rows, in the stored basis."""
        rows = [self.packed.k_basis.store(x.float(), 0) for x in (self.k, self.v)]
        return statistics.mean(
            float((a.view_as(b).float() - b).pow(2).mean().sqrt()) for a, b in zip(found, rows, strict=True)
        )

    def work(self) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
        """What is timed, natively and in plain torch."""
        packed, at, size = self.packed, self.packed_addr, 256

        def plain_recode(source: PageStore, from_: Tensor, target: PageStore, to: Tensor) -> None:
            for a in range(0, from_.numel(), size):  # as many pages at a time as stay in the cache
                rows = source.plain.decode_pages(from_[a : a + size], None)
                target.plain.write_pages(to[a : a + size], *rows, None)

        return {
            "encode": (
                lambda: packed.write_pages(at, self.k, self.v),
                lambda: packed.plain.write_pages(at, self.k, self.v, None),
            ),
            "seal": (
                lambda: seal(self.raw, self.raw_addr, packed, at),
                lambda: plain_recode(self.raw, self.raw_addr, packed, at),
            ),
            "unpack": (
                lambda: (packed.read_k(at), packed.read_v(at)),
                lambda: (packed.plain.read_k(at), packed.plain.read_v(at)),
            ),
            "unseal": (
                lambda: unseal(packed, at, self.raw, self.raw_addr),
                lambda: plain_recode(packed, at, self.raw, self.raw_addr),
            ),
        }


def best(seconds: float, *works: Callable[[], object], inner: int = 1) -> list[float]:
    """The shortest time of each, interleaved, over ``seconds`` of each: other work on the machine only ever adds."""
    found, spent = [float("inf")] * len(works), [0.0] * len(works)
    for work in works:
        work()
    while min(spent) < seconds:
        for i, work in enumerate(works):
            if spent[i] < seconds:
                begin = time.perf_counter()
                for _ in range(inner):
                    work()
                took = time.perf_counter() - begin
                spent[i] += took
                found[i] = min(found[i], took / inner)
    return found


def rows_of(bench: Bench, bits: int, dim: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """Every operation on one format, on one thread and on all."""
    rows: list[dict[str, object]] = []
    target = torch.empty_like(bench.k)
    for threads in sorted({1, options.threads}):
        torch.set_num_threads(threads)
        for name, (native, plain) in bench.work().items():
            # A copy of the keys, twice, moves as many bytes of bfloat16 in, and as many out.
            spent, torch_s, copy_s = best(
                options.seconds, native, plain, lambda: (target.copy_(bench.k), target.copy_(bench.v))
            )
            rows.append(
                {
                    "operation": name,
                    "bits": bits,
                    "head_dim": dim,
                    "threads": threads,
                    "seconds": spent,
                    "gb_s": bench.bf16_bytes / spent / 1e9,
                    "gb_s_core": bench.bf16_bytes / spent / 1e9 / threads,
                    "copy_gb_s": bench.bf16_bytes / copy_s / 1e9,
                    "torch_gb_s": bench.bf16_bytes / torch_s / 1e9,
                    "vs_torch": torch_s / spent,
                    "vs_copy": copy_s / spent,
                }
            )
    return rows


def sealing(bits: int, context: int, seconds: float) -> dict[str, object]:
    """What sealing a layer's share of a block costs each of the steps that fill it, beside the attention of one such
    step over ``context`` packed tokens.
    """
    bench = Bench(bits, 64, HEADS * context // BLOCK)
    pages = context // BLOCK
    call = PagesCall(
        q=torch.randn(1, HEADS, GROUP, 64), arena=bench.arena, addr=bench.packed_addr.view(1, HEADS, pages), shift=0,
        fmt=bench.fmt, dtype=torch.bfloat16, scale=0.125,
        read=lambda part: (bench.packed.read_k(call.addr[..., part]), bench.packed.read_v(call.addr[..., part])),
    )  # fmt: skip
    block, packed_block = bench.raw_addr[:HEADS].clone(), bench.packed_addr[:HEADS].clone()
    attend_s, seal_s = best(
        seconds, lambda: cpu.attend(call), lambda: seal(bench.raw, block, bench.packed, packed_block), inner=10
    )
    return {
        "bits": bits,
        "head_dim": 64,
        "context": context,
        "attend_s": attend_s,
        "seal_s_step": seal_s / BLOCK,
        "seal_share": seal_s / BLOCK / attend_s,
    }


def layer_write(batch: int, seconds: float) -> dict[str, object]:
    """A layer's write of a decode step: one raw row of each head and sequence, Python included."""
    fmt = PageFormat(BLOCK, VectorFormat.raw(64, 2), VectorFormat.raw(64, 2))
    block = LAYERS * HEADS * fmt.page_bytes
    arena = torch.zeros(batch * block, dtype=torch.uint8)
    store = PageStore(arena, fmt, torch.bfloat16, heads=HEADS, layers=LAYERS)
    table = torch.tensor([[i * block, 1, 7, i] for i in range(batch)])
    runs = TokenRuns(table, batch, HEADS, fmt.page_bytes, arena.device)
    k, v = torch.randn(2, batch, HEADS, 64).bfloat16()
    native, plain = best(
        seconds, lambda: store.write_runs(runs, k, v, 3), lambda: store.plain.write_runs(runs, k, v, 3), inner=200
    )
    return {"batch": batch, "head_dim": 64, "native_us": native * 1e6, "torch_us": plain * 1e6}


def main() -> None:
    options = parse()
    if cpu.available():
        sys.exit(cpu.available())
    before = torch.get_num_threads()
    rows, agree = [], {}
    for dim in options.dims:
        for bits in (8, 4, 2):
            bench = Bench(bits, dim, options.pages)
            agree[f"int{bits}-d{dim}"] = bench.gate()
            found = rows_of(bench, bits, dim, options)
            for row in found:
                print(
                    f"{row['operation']:>7} int{bits} D={dim:<4} {row['threads']} threads  {row['gb_s']:6.2f} GB/s"
                    f"  {row['vs_torch']:5.1f} x torch  {row['vs_copy']:5.2f} x copy"
                )
            rows += found
    torch.set_num_threads(before)
    shares = [sealing(bits, context, options.seconds) for bits in (8, 4, 2) for context in (1024, 16384)]
    for share in shares:
        print(
            f"sealing adds {share['seal_share']:.2%} to attention over {share['context']} tokens in int{share['bits']}"
        )
    writes = [layer_write(batch, options.seconds) for batch in (1, 8, 64)]
    for write in writes:
        print(f"a layer's write, batch {write['batch']}: {write['native_us']:.1f} us, torch {write['torch_us']:.1f} us")
    if options.json:
        stream = Stream(torch.device("cpu"))
        result = {
            "command": "python benchmarks/write_path.py " + " ".join(sys.argv[1:]),
            "threads": options.threads,
            "variant": row_variants()[0],
            "stream_gb_s": max(stream.read() for _ in range(5)),
            "words_equal_to_torch": agree,
            "rows": rows,
            "sealing": shares,
            "layer_write": writes,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--pages", type=int, default=1024, help="pages of keys and values that are moved")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each thing that is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
