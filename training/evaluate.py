"""Score a model folder: recall tasks on held-out keys, the demo document, and perplexity on held-out text.

Everything runs through plain transformers with its ordinary full cache and greedy decoding; an answer counts when it
equals the expected text exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from corpus import heldout_texts
from kvfold.quality.tasks import TASKS, demo_document, make_sample


class Scorer:
    """A model, its tokenizer, and the scores taken from them."""

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def reply(self, messages: list[dict[str, str]], limit: int = 80) -> str:
        """The model's next turn, decoded greedily."""
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, use_cache=True
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def task(self, task: str, length: int, count: int, seed: int) -> float:
        """Share of samples of a task answered exactly."""
        right = 0
        for index in range(count):
            sample = make_sample(task, seed + index, length, self.count)
            right += self.reply([{"role": "user", "content": sample.prompt}]) == sample.answer
        return right / count

    def demo(self, tokens: int, documents: int, seed: int) -> tuple[float, float]:
        """Share of the demo documents' questions answered: each asked alone, and all in one conversation."""
        alone = together = asked = 0
        for index in range(documents):
            document = demo_document(seed + index, tokens, self.count)
            turns: list[dict[str, str]] = []
            for fact in document.facts:
                first = {"role": "user", "content": f"{document.text}\n\n{fact.question}"}
                alone += self.reply([first]) == fact.answer
                turns.append({"role": "user", "content": fact.question} if turns else first)
                reply = self.reply(turns)
                turns.append({"role": "assistant", "content": reply})
                together += reply == fact.answer
                asked += 1
        return alone / asked, together / asked

    @torch.inference_mode()
    def perplexity(self, windows: int, length: int = 1024) -> float:
        """Perplexity per token on windows of the held-out sources, spread evenly."""
        ids = [i for text in heldout_texts() for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        step = max((len(ids) - length) // windows, 1)
        total = 0.0
        for start in range(0, step * windows, step):
            window = torch.tensor([ids[start : start + length]])
            total += float(self.model(window, labels=window).loss)
        return math.exp(total / windows)


def scores(scorer: Scorer, arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """All scores, each shown as soon as it is known."""
    out: dict[str, Any] = {}
    for length in arguments.lengths:
        for task in arguments.tasks:
            out[f"{task}@{length}"] = scorer.task(task, length, arguments.count, arguments.seed)
            show(f"{task:8} {length:5} tokens  {out[f'{task}@{length}']:7.1%}")
    if arguments.documents:
        out["demo_alone"], out["demo_conversation"] = scorer.demo(1800, arguments.documents, arguments.seed)
        show(f"demo document, each question alone {out['demo_alone']:7.1%}; as turns {out['demo_conversation']:7.1%}")
    if arguments.windows:
        out["perplexity"] = scorer.perplexity(arguments.windows)
        show(f"perplexity on held-out sources  {out['perplexity']:.2f}")
    return out


def main() -> None:
    """Print the scores, and write them to ``--json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="src/kvfold/bundled")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, default=100, help="samples per task and length")
    parser.add_argument("--documents", type=int, default=12, help="demo documents (8 questions each)")
    parser.add_argument("--windows", type=int, default=64, help="windows of held-out text")
    parser.add_argument("--seed", type=int, default=500_000)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scorer = Scorer(arguments.model, getattr(torch, arguments.dtype))
    found = scores(scorer, arguments, lambda line: print(line, flush=True))
    found |= {"samples": arguments.count, "dtype": arguments.dtype, "seed": arguments.seed}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
