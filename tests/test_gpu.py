"""The same runtime on a GPU: what the CPU tests promise, on CUDA tensors."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold import Engine, KVCache, SamplingParams
from kvfold.codecs.pages import PageStore, copy_blocks, seal, unseal, zero_blocks
from kvfold.engine.loading import load, parse_recipes
from kvfold.engine.runner import ModelRunner
from kvfold.formats import PageFormat, VectorFormat
from kvfold.quality.forced import teacher_force
from kvfold.quality.metrics import agreement
from kvfold.recipe import Recipe
from tests.calibrations import calibrated, tiny, tokens
from tests.test_hf import CONFIGS, MODES, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]


# == pages


def stores(fmt: PageFormat, dtype: torch.dtype, pages: int) -> dict[str, PageStore]:
    """A store on each device, over memory full of NaN."""
    arena = torch.full((pages * fmt.page_bytes,), 255, dtype=torch.uint8)
    return {device: PageStore(arena.to(device, copy=True), fmt, dtype) for device in ("cpu", "cuda")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("scales", ["token", "channel"])
def test_pages_are_written_as_on_a_cpu(bits: int, dtype: torch.dtype, scales: str) -> None:
    """Not rotated, so that the same float32 numbers are coded: the bytes are the same."""
    if bits == 16:
        side = VectorFormat.raw(96, dtype.itemsize)
    else:
        side = VectorFormat(96, bits, True, 48, "none", scales)
    found = stores(PageFormat(32, side, side), dtype, 6)
    order = torch.tensor([3, 0, 5]) * found["cpu"].fmt.page_bytes
    k, v = torch.randn(2, 3, 32, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    for device, store in found.items():
        store.write_pages(order.to(device), k.to(device), (v * 3 + 1).to(device))
    assert torch.equal(found["cpu"].arena, found["cuda"].arena.cpu())
    for name in ("read_k", "read_v"):
        want, got = (getattr(store, name)(order.to(device)) for device, store in found.items())
        assert torch.equal(want, got.cpu())


@pytest.mark.parametrize("recipe", ["int8", "int4", "int2", "k8v2", "int4,scales=channel"])
def test_seal_unseal_copy_and_clear(recipe: str) -> None:
    parsed = Recipe.parse(recipe)
    raw = VectorFormat.raw(64, 4)
    packed = PageFormat(
        32,
        parsed.packed_format(64, parsed.k_bits, 4, parsed.scales),
        parsed.packed_format(64, parsed.v_bits, 4),
    )
    size = 4 * (PageFormat(32, raw, raw).page_bytes + packed.page_bytes)
    k, v = torch.randn(2, 4, 32, 64, generator=torch.Generator().manual_seed(0))
    back: list[tuple[Tensor, Tensor]] = []
    for device in ("cpu", "cuda"):
        arena = torch.full((size,), 255, dtype=torch.uint8, device=device)
        low, high = (PageStore(arena, fmt, torch.float32) for fmt in (PageFormat(32, raw, raw), packed))
        at = torch.arange(4, device=device) * low.fmt.page_bytes
        to = torch.arange(4, device=device) * high.fmt.page_bytes + 4 * low.fmt.page_bytes
        low.write_pages(at, k.to(device), v.to(device))
        seal(low, at, high, to)
        codes = high.arena[4 * low.fmt.page_bytes :].clone()
        zero_blocks(arena, at, low.fmt.page_bytes)
        assert not arena[: 4 * low.fmt.page_bytes].any()
        copy_blocks(arena, to[:2], to[2:], high.fmt.page_bytes)
        assert torch.equal(high.read_k(to[:2]), high.read_k(to[2:]))
        high.arena[4 * low.fmt.page_bytes :] = codes
        unseal(high, to, low, at)
        back.append(tuple(x.cpu() for x in low.decode_pages(at)))  # type: ignore[arg-type]
    for want, got, exact in zip(*back, (k, v), strict=True):
        lost = (want - exact).norm()
        assert (got - exact).norm() <= 1.01 * lost
        assert (got - want).norm() <= 0.1 * lost + 1e-3  # a code may tip over where a rotation sums in another order


# == the drop-in cache


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = make(request.param).to("cuda")
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # some releases of transformers take SDPA, which knows no soft-capping
    return model


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("cuda") for name, value in inputs.items()}


@pytest.mark.parametrize("mode", ["greedy", "batch", "left padded", "prompt lookup"])
def test_raw_gives_stock_tokens(family: PreTrainedModel, mode: str) -> None:
    """Full, sliding, soft-capped and latent layers, sinks."""
    inputs, options = MODES[mode]
    wanted = family.generate(**on_gpu(inputs), **options)
    assert torch.equal(wanted, family.generate(**on_gpu(inputs), **options, past_key_values=KVCache(family)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ["raw", "int8", "int4", "int2", "int4,scales=channel,block=64"])
def test_half_precision_runs(dtype: torch.dtype, recipe: str) -> None:
    model = make("llama").to("cuda", dtype)
    inputs = on_gpu(MODES["batch"][0])
    tokens = model.generate(**inputs, max_new_tokens=80, past_key_values=KVCache(model, recipe))
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_calibrated_codes_agree_with_a_cpu(tmp_path: Path) -> None:
    model = tiny("llama")
    file = calibrated(model, tmp_path / "c.safetensors")
    ids = torch.tensor([tokens(150)])
    logits = []
    for device in ("cpu", "cuda"):
        moved = deepcopy(model).to(device)
        cache = KVCache(moved, f"int4:calibrated({file}),recent=0,block=8")
        with torch.inference_mode():
            moved(ids[:, :149].to(device), past_key_values=cache)
            logits.append(moved(ids[:, 149:].to(device), past_key_values=cache).logits.float().cpu())
    assert (logits[0] - logits[1]).norm() <= 0.02 * logits[0].norm()


# == the bundled model


@pytest.fixture(scope="module")
def bundled() -> tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase]:
    models = {device: load("bundled", dtype=torch.float32, device=device) for device in ("cpu", "cuda")}
    return {device: model for device, (model, _) in models.items()}, models["cpu"][1]


@pytest.mark.parametrize(
    ("recipe", "bound"), [("raw", 1e-6), ("int8", 1e-4), ("int4", 5e-3), ("int2", 5e-2), ("int4:calibrated", 5e-3)]
)
def test_logits_are_those_of_a_cpu(
    bundled: tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase], recipe: str, bound: float
) -> None:
    """Mean divergence (nats) of a forced text; what is packed may differ by codes that tip over."""
    models, tokenizer = bundled
    text = Path(__file__).with_name("test_gpu.py").read_text()
    ids = tokenizer.encode(text, add_special_tokens=False)[:700]
    logits = []
    for model in models.values():
        parsed = parse_recipes([recipe], model)[recipe]
        runner = ModelRunner(model, recipe=parsed, kv_memory=32 << 20)
        try:
            logits.append(teacher_force(runner, ids, score_from=300).logits.cpu())
        finally:
            runner.release()
    assert logits[0].shape[0] == 400
    assert agreement(*logits).kl_mean <= bound


@pytest.mark.parametrize("recipe", ["raw", "int8", "int4", "int2"])
def test_the_engine_runs_every_recipe_and_ends_empty(
    bundled: tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase], recipe: str
) -> None:
    models, _ = bundled
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 4000, (n,), generator=generator).tolist() for n in (150, 40, 300, 150)]
    said = []
    for model in models.values() if recipe == "raw" else [models["cuda"]]:
        with Engine(model, recipe=recipe, kv_memory="64MiB") as engine:
            outputs = engine.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True), progress=False)
            assert all(len(output.token_ids) == 60 for output in outputs)
            assert engine.stats()["kv_in_use_bytes"] == 0
        said.append([output.token_ids for output in outputs])
    assert recipe != "raw" or said[0] == said[1]
