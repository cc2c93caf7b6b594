"""A tiny random Llama, a byte-level tokenizer, and engines over them: shared by the engine's tests."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kvfold.engine import Engine, RequestOutput

VOCAB = 320
EOS = 2


def tiny_model(*, layers: int = 2, hidden: int = 32, context: int = 512, seed: int = 0) -> LlamaForCausalLM:
    """Float32, random weights large enough that attention matters; never ends by itself but by token 2."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[1] ** -0.5)
    return model


def windowed_model(window: int) -> Gemma3ForCausalLM:
    """A layer with a window and one without, so that two layer groups share one prefix. Float32, random weights."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
    )
    return Gemma3ForCausalLM(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 3 to 258), then a few words; ``</s>`` is 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(alphabet, 3)}
    vocab |= {f"word{i}": i for i in range(len(vocab), VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    return fast


def prompts_of(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def expected(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' generate says, greedily."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def assert_idle(engine: Engine) -> None:
    """Nothing is referenced, and the books are in order."""
    books = engine._runner.manager
    assert not engine.has_unfinished()
    assert books.sequences() == ()
    assert books.bytes_in_use() == 0
    books.check()


def engine_of(model: Any, **options: Any) -> Engine:
    """A raw cache of small blocks, unless ``options`` say otherwise."""
    return Engine(model, **({"kv_memory": "4MiB", "recipe": "raw,block=8", "check": False} | options))


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Steps until nothing is left; what ended, by id."""
    done = {}
    while engine.has_unfinished():
        done |= {output.request_id: output for output in engine.step()}
    return done
