"""The benchmarks at tiny sizes: what they report, and that their gates close. No wall-clock time is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from benchmarks.attention import roofline
from torch.nn.functional import linear, scaled_dot_product_attention

from kvfold.bench import attention, decode, pages, rivals
from kvfold.bench.account import Account, TimedAttention, replaced, shares, timed_linears
from kvfold.bench.attention import AttentionRow, bench_attention, check
from kvfold.bench.decode import DecodeRow, bench_decode
from kvfold.bench.pages import PagedCodes, draw
from kvfold.bench.prefix import PrefixRow, bench_prefix
from kvfold.bench.shapes import AttentionShape, random_model
from kvfold.bench.stream import Stream
from kvfold.cli import main
from kvfold.cli.options import parse_names, parse_recipe_list, split_recipes
from kvfold.errors import KVFoldError, RequestError, UnsupportedError
from kvfold.kernels.pages import PagesCall
from kvfold.recipe import Recipe

SMALL = AttentionShape(context=200, batch=3, head_dim=64, group=3, kv_heads=2)
CPU = torch.device("cpu")
BUNDLED = Path(pages.__file__).parents[1] / "bundled" / "calibration.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers: what is tested is not how fast memory is."""
    monkeypatch.setattr("kvfold.bench.stream._BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(pages, "_SWEEP_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})


def codes_of(recipe: str, shape: AttentionShape = SMALL) -> PagedCodes:
    return PagedCodes(Recipe.parse(recipe), shape, draw(shape, CPU, torch.bfloat16))


# == attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_recipe_and_rival_has_a_whole_row(dtype: torch.dtype) -> None:
    recipes = ["raw", "int8", "k8v4,sinks=0", "int4,scales=channel", "int2", "k16v4,block=16"]
    said: list[str] = []
    rows = bench_attention(SMALL, recipes=recipes, dtype=dtype, device=CPU, repeats=2, say=said.append)
    assert [row.recipe for row in rows] == [*recipes, "stock sdpa", "packed sdpa", "packed matmul"]
    assert len(said) == len(recipes) + 1 + 2
    wanted = {field.name for field in fields(AttentionRow)}
    for row in rows:
        found = row.as_json()
        assert set(found) == wanted
        assert json.dumps(found)
        assert row.samples == 2
        assert row.layers >= 1
        assert row.variant
        assert row.seconds > 0
        assert row.vs_raw is not None
        assert row.gb_s == pytest.approx(row.bytes_read / row.seconds / 1e9)
        assert row.fraction_of_stream == pytest.approx(row.gb_s / row.stream_gb_s)
        assert row.rival or row.variant == "unpack" or row.rel_err <= attention.GATE
    best = max(row.vs_best_bf16 for row in rows if row.rival)
    assert best == pytest.approx(1.0)
    assert next(row for row in rows if row.recipe == rivals.STOCK).vs_stock_sdpa == pytest.approx(1.0)


def test_latent_pages_have_one_wide_key() -> None:
    shape = AttentionShape(context=70, batch=2, head_dim=64, rope=16, group=8, kv_heads=1)
    rows = bench_attention(shape, recipes=["raw", "int4"], device=CPU, repeats=1)
    assert [row.rope for row in rows] == [16] * 5
    assert rows[0].bytes_read == 2 * 96 * (64 + 16) * 2
    assert rows[-1].bytes_read == 2 * 70 * (64 + 16) * 2
    assert rows[0].flops == 2 * 2 * 8 * 70 * (64 + 16 + 64)
    assert bench_prefix(shape, recipes=["int4"], device=CPU, repeats=1)[0].rope == 16
    with pytest.raises(RequestError, match="one KV head"):
        AttentionShape(rope=64)
    with pytest.raises(UnsupportedError, match="latents"):
        bench_attention(shape, recipes=[f"int4:calibrated({BUNDLED})"], device=CPU)


def test_bytes_read_are_codes_and_scales_of_whole_blocks() -> None:
    pages_read = SMALL.batch * SMALL.kv_heads * 7  # 200 tokens in blocks of 32
    assert codes_of("raw").bytes_read == pages_read * 32 * 2 * 64 * 2
    assert codes_of("int4").bytes_read == pages_read * 32 * 2 * (32 + 4)
    assert codes_of("int4,scales=channel").bytes_read == pages_read * (32 * (32 + 32 + 4) + 64 * 4)
    assert SMALL.bf16_bytes == SMALL.batch * SMALL.kv_heads * 200 * 2 * 64 * 2


def test_pages_are_scattered_and_layers_apart() -> None:
    codes = codes_of("int4")
    flat = codes.addr.flatten()
    assert flat.unique().numel() == flat.numel()
    assert not torch.equal(codes.addr[0, 0].sort().values, codes.addr[0, 0])
    assert codes.layers > 1
    assert codes.call(1, codes.rows(codes.q)).shift > 0


def test_a_calibrated_recipe_is_measured_on_heads_it_was_made_for() -> None:
    fits = AttentionShape(context=64, batch=2, head_dim=64, group=2, kv_heads=2)
    rows = bench_attention(fits, recipes=[f"int2.5:calibrated({BUNDLED})"], device=CPU, repeats=1)
    assert rows[0].rel_err < attention._ROUNDED_GATE
    assert rows[0].vs_raw is None
    with pytest.raises(UnsupportedError, match="2 KV heads of 64 dims"):
        bench_attention(AttentionShape(context=64, head_dim=32), recipes=[f"int4:calibrated({BUNDLED})"], device=CPU)
    with pytest.raises(UnsupportedError, match="no model"):
        bench_attention(fits, recipes=["int4:calibrated"], device=CPU)


@pytest.mark.parametrize("recipe", ["raw", "int8", "int4", "int2", "int4,scales=channel"])
def test_the_gate_closes_when_codes_are_corrupted(recipe: str) -> None:
    codes = codes_of(recipe)
    truth = codes.truth()
    check(recipe, codes, truth)
    last = codes.call(codes.layers - 1, codes.rows(codes.q)).shift
    page = int(codes.addr[1, 1, 2]) + last  # one page of one head, in the last layer only
    codes.store.arena[page : page + 512].bitwise_xor_(0x55)
    with pytest.raises(KVFoldError, match="correctness gate"):
        check(recipe, codes, truth)


def test_the_gate_closes_on_nan() -> None:
    codes = codes_of("raw")
    truth = codes.truth()
    codes.store.arena.fill_(255)
    with pytest.raises(KVFoldError, match="correctness gate"):
        check("raw", codes, truth)


def test_a_wrong_rival_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "_packed_matmul", lambda cache, k, v: cache.q)
    with pytest.raises(KVFoldError, match="packed matmul"):
        bench_attention(SMALL, recipes=["raw"], device=CPU, repeats=1)


def test_who_is_slow_sits_out() -> None:
    rows = bench_attention(SMALL, recipes=["raw"], device=CPU, repeats=5, seconds=0.0)
    assert {row.samples for row in rows} == {3}


@pytest.mark.parametrize("changes", [{"context": 0}, {"batch": 0}, {"group": -1}])
def test_sizes_are_positive(changes: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="at least 1"):
        AttentionShape(**changes)


def test_a_shared_prefix_is_walked_once_and_for_each() -> None:
    rows = bench_prefix(SMALL, recipes=["raw", "int4"], device=CPU, repeats=2)
    assert [row.recipe for row in rows] == ["raw", "int4"]
    for row in rows:
        assert set(row.as_json()) == {field.name for field in fields(PrefixRow)}
        assert row.batch == SMALL.batch
        assert row.factor == pytest.approx(row.each_seconds / row.cascade_seconds)
        assert row.lse_difference < (0.1 if "unpack" in (row.each_variant, row.cascade_variant) else 1e-4)


def test_a_cascade_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PagedCodes.run

    def wrong(self: PagedCodes, call: PagesCall) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = whole(self, call)
        return o, lse + (0.5 if call.q.shape[0] == SMALL.batch else 0.0)

    monkeypatch.setattr(PagedCodes, "run", wrong)
    with pytest.raises(KVFoldError, match="log-sum-exp"):
        bench_prefix(SMALL, recipes=["raw"], device=CPU, repeats=1)


def test_the_grid_is_drawn() -> None:
    rows = []
    for dim, context in ((32, 64), (32, 128), (64, 64), (64, 128)):
        shape = AttentionShape(context=context, head_dim=dim, kv_heads=1)
        rows += [row.as_json() for row in bench_attention(shape, recipes=["raw", "int4"], device=CPU, repeats=1)]
    assert roofline(rows).startswith(b"\x89PNG")


def test_the_stream_reads() -> None:
    assert Stream(CPU).read() > 0


# == whole steps


def test_the_parts_of_a_step_add_up() -> None:
    model = random_model("tiny", dtype=torch.float32, max_positions=400)
    said: list[str] = []
    rows = bench_decode(
        model, recipes=["int4", "int8,recent=0"], context=70, batch=2, steps=2, rivals=["transformers"], say=said.append
    )
    assert [row.contestant for row in rows] == ["transformers", "int4", "int8,recent=0"]  # raw was for the gate only
    for row in rows:
        assert set(row.as_json()) == {field.name for field in fields(DecodeRow)}
        parts = row.linear_share, row.attention_share, row.write_share, row.other_share
        assert sum(parts) == pytest.approx(1.0)
        assert all(0 < part < 1 for part in parts)
        assert 0 <= row.sealing_share <= row.write_share
        assert row.samples == 2
        assert row.tok_s == pytest.approx(2 / row.seconds)
    assert rows[0].sealing_share == 0
    assert not any(module._forward_hooks for module in model.modules())


def test_a_step_that_seals_is_one_of_those_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed: list[int] = []
    whole = decode.shares

    def noted(*given: object) -> object:
        sealed.append(runner.cache.manager.table(0, 0).packed_ids.size)
        return whole(*given)  # type: ignore[arg-type]

    model = random_model("tiny", dtype=torch.float32, max_positions=400)
    contestant = decode._Paged(model, Recipe.parse("int4,recent=0,sinks=0"), 1, 400)
    runner = contestant.runner
    contestant.fill(decode._chunk(model, 40, 1, torch.Generator().manual_seed(0)))
    monkeypatch.setattr(decode, "shares", noted)
    before = runner.cache.manager.table(0, 0).packed_ids.size
    decode._take_apart(model, contestant, torch.tensor([1]))
    assert sealed == [before + 1]


def test_a_context_that_leaves_no_room_is_refused() -> None:
    model = random_model("tiny", dtype=torch.float32, max_positions=100)
    with pytest.raises(RequestError, match="100 positions"):
        bench_decode(model, recipes=["int4"], context=90, batch=1, steps=2)
    with pytest.raises(RequestError, match="unknown rival"):
        bench_decode(model, recipes=["raw"], context=8, batch=1, steps=2, rivals=["vllm"])


def test_clocks_count_their_part_and_come_off_again() -> None:
    account = Account(CPU)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    x = torch.ones(1, 1, 4, 4)
    with timed_linears(model, account), TimedAttention(account):
        model(x)
        scaled_dot_product_attention(x, x, x)
        linear(x, x[0, 0])
    spent = dict(account.seconds)
    assert spent["linear"] > 0
    assert spent["attention"] > 0
    assert spent["write"] == 0
    model(x)
    scaled_dot_product_attention(x, x, x)
    assert account.seconds == spent


def test_methods_are_put_back() -> None:
    class Thing:
        def name(self) -> str:
            return "own"

    thing = Thing()
    with replaced(thing, name=lambda: "other"):
        assert thing.name() == "other"
    assert thing.name() == "own"
    assert not vars(thing)


def test_a_seal_is_spread_over_the_steps_between_two() -> None:
    account = Account(CPU)
    account.seconds |= {"linear": 2.0, "attention": 1.0, "write": 0.5}
    found = shares(account, total=4.0, steps=4, seal=8.0, seal_every=32)
    assert found.sealing == pytest.approx(1 / 5)  # 8 / 32 in each of 4 steps
    assert found.write == pytest.approx(1.5 / 5)
    assert found.linear == pytest.approx(2 / 5)
    assert found.linear + found.attention + found.write + found.other == pytest.approx(1.0)


# == the command line


@pytest.mark.parametrize(
    ("text", "recipes"),
    [
        ("raw", ["raw"]),
        ("raw,int8,int4,int2", ["raw", "int8", "int4", "int2"]),
        ("raw;int8 , int4", ["raw", "int8", "int4"]),
        ("int4,scales=channel,int2", ["int4,scales=channel", "int2"]),
        ("k8v4, sinks=4 ,recent = 8,raw", ["k8v4, sinks=4 ,recent = 8", "raw"]),
        ("int4:calibrated(a,b),raw", ["int4:calibrated(a,b)", "raw"]),
        ("int4:calibrated(a(x,y),b),recent=5;int2", ["int4:calibrated(a(x,y),b),recent=5", "int2"]),
    ],
)
def test_recipes_are_separated_by_commas_that_are_not_theirs(text: str, recipes: list[str]) -> None:
    assert split_recipes(text) == recipes


@pytest.mark.parametrize("text", ["raw,,int4", "raw;", "int4,scales", "int4,sinks=x,raw", ",raw"])
def test_what_is_no_list_of_recipes_is_refused(text: str) -> None:
    with pytest.raises(KVFoldError, match="bad recipe"):
        parse_recipe_list(text)


def test_names_are_separated_by_either() -> None:
    assert parse_names("a, b;c") == ["a", "b", "c"]


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvfold", "bench", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        out = capsys.readouterr()
        return int(done.value.code or 0), out.out, out.err

    return run


TINY = ("--context", "64", "--kv-heads", "2", "--head-dim", "32", "--repeats", "1")


def test_bench_attention_prints_a_table_or_json(kvfold: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = kvfold("attention", *TINY, "--recipes", "raw,int4")
    assert code == 0, err
    assert "of stream" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, err = kvfold("attention", *TINY, "--recipes", "raw,int4,scales=channel", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    assert found["command"].startswith("kvfold bench attention")
    assert found["hardware"]["threads"] >= 1
    assert [row["recipe"] for row in found["rows"]][:2] == ["raw", "int4,scales=channel"]


def test_bench_attention_knows_shared_prefixes(kvfold: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = kvfold("attention", *TINY, "--recipes", "int4", "--batch", "3", "--shared-prefix")
    assert code == 0, err
    assert "under 3 sequences" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("attention", "--recipes", "int5"), "int5"),
        (("attention", "--dtype", "int8"), "bfloat16"),
        (("attention", "--json", "/no/such/folder/x.json"), "no folder"),
        (("decode", "--shape", "tiny", "--vs", "transformers,vllm", "--context", "8"), "vllm"),
    ],
)
def test_bad_input_is_refused(
    kvfold: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], says: str
) -> None:
    code, _, err = kvfold(*arguments)
    assert code == 2
    assert says in err


def test_help_has_examples(kvfold: Callable[..., tuple[int, str, str]]) -> None:
    for verb in ("attention", "decode"):
        code, out, _ = kvfold(verb, "--help")
        assert code == 0
        assert "Examples:" in out
