"""Train the byte-level BPE tokenizer and write it in the form transformers loads.

Digits are tokens of their own, so that recalling a number means recalling each digit; the words of the recall tasks
are single tokens, so that a key-value line has the same length whatever its words.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import training_texts
from kvfold.quality.tasks.words import ADJECTIVES, ATTRIBUTES, NAMES, NOUNS

VOCABULARY = 4096
SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{%- else %}"
    "{{- '<|user|>\\n' + message['content'] + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)


def _texts() -> Iterator[str]:
    """The corpus, and each task word often enough to become one token in every place it is used."""
    yield from training_texts()
    words = " ".join(part for attribute, _ in ATTRIBUTES for part in attribute.split())
    phrases = f" The the What Who is value Values of Copy line come to does {words}"
    for _ in range(4000):
        yield phrases
        yield " " + " ".join((*ADJECTIVES, *NOUNS, *NAMES))
        # After a hyphen, and as the first word of an answer, a word carries no leading space.
        yield "-" + "-".join((*NOUNS, *NAMES))


def train_tokenizer() -> Tokenizer:
    """Train the tokenizer on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("build/training/tokenizer"))
    arguments = parser.parse_args()
    write_tokenizer(train_tokenizer(), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
