"""Hand a compressed cache to transformers' own `generate`: the answer stays, the bytes shrink.

Run: python examples/drop_in_cache.py
"""

from __future__ import annotations

from pydoc_data.topics import topics  # long texts that come with Python

from kvfold import KVCache, load

TEXT = topics["naming"] + "The access code of the crimson harbor is 5821.\n" + topics["raise"]
QUESTION = "What is the access code of the crimson harbor?"


def main() -> None:
    """Answer a question from a long text once for each recipe, and compare the bytes of the caches."""
    model, tokenizer = load("bundled")
    chat = [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    print(f"{prompt:,} tokens: {QUESTION}")
    for recipe in ("raw", "int8", "k8v4,recent=32", "int4", "int2:calibrated"):
        cache = KVCache(model, recipe)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(output[0, prompt:], skip_special_tokens=True)
        print(f"{recipe}: {cache.kv_bytes:,} bytes: {answer}")


if __name__ == "__main__":
    main()
