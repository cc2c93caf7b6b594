"""Hand a compressed cache to transformers' own `generate`: the answer stays, the bytes shrink.

Run: python examples/drop_in_cache.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

from kvfold import KVCache, load

CODES = {"crimson harbor": "5821"}
MANUAL = topics["compound"][:8000]  # a long text: Python's own documentation


def main() -> None:
    """Ask for a fact in the middle of the text under each recipe, and print the bytes of the caches."""
    model, tokenizer = load("bundled")
    for name, code in CODES.items():
        text = f"{MANUAL[:4000]}\nThe access code of the {name} is {code}.\n{MANUAL[4000:]}"
        chat = [{"role": "user", "content": f"{text}\n\nWhat is the access code of the {name}?"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for recipe in ("raw", "int8", "int4", "k8v4,recent=32", "int2:calibrated"):
            cache = KVCache(model, recipe)
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"{recipe:>15}: {cache.kv_bytes:>9,} bytes for {output.shape[1]} tokens. {answer}")


if __name__ == "__main__":
    main()
