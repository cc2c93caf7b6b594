"""Hand a compressed cache to transformers' own `generate`, and look at what it takes.

Run: python examples/drop_in_cache.py
"""

from __future__ import annotations

from kvfold import KVCache, load

PROMPT = "The password of the north gate is violet. The password of the south gate is copper.\n" * 8


def main() -> None:
    """Generate once for each recipe and compare the bytes of the caches."""
    model, tokenizer = load("bundled")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    for recipe in ("raw", "int8", "int4", "k8v4,recent=32"):
        cache = KVCache(model, recipe)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        print(f"{recipe:>15}: {cache.kv_bytes:>9,} bytes for {output.shape[1]} tokens: {tokenizer.decode(new)!r}")


if __name__ == "__main__":
    main()
