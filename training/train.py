"""Train the bundled model, within a given number of minutes, on a CPU or a GPU.

The schedule follows the clock, not a number of steps: the learning rate is constant for the first part of the
minutes and then falls to nearly zero, and sequences grow from 64 to 4,096 tokens as soon as the answers come right
at one length, or at the latest when that length's share of the time is over.  Interrupted runs go on from the last
checkpoint in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data import Mixture, Source
from kvfold.quality.tasks import TASKS, make_sample
from model import Decoder, Shape


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum."""

    length: int
    until: float  # share of the minutes at which the stage ends at the latest
    mixture: Mixture


_NOTHING = dict.fromkeys(Mixture.__slots__, 0.0)

STAGES = (
    # Looking back has to be learnt first, and from nothing else: in a mixture its signal drowns.
    Stage(64, 0.15, Mixture(**_NOTHING | {"spans": 1.0})),
    Stage(128, 0.25, Mixture(**_NOTHING | {"kv": 3, "needle": 1, "copy": 0.5, "text": 0.7, "spans": 1, "echo": 2})),
    Stage(256, 0.34, Mixture(kv=2, chain=2, text=2, spans=0.4, echo=1.2)),
    Stage(512, 0.44, Mixture(kv=2, chain=2, text=2)),
    Stage(1024, 0.56, Mixture(text=3, spans=0.1)),
    Stage(2048, 0.80, Mixture(text=3.5, spans=0.1, echo=0.2)),
    Stage(4096, 1.01, Mixture(text=3.5, spans=0.1, echo=0.2)),
)
#: Sequences in a batch, by length.
ROWS = {64: 32, 128: 16, 256: 16, 512: 8, 1024: 8, 2048: 4, 4096: 2}
#: A stage is over once this share of answer tokens is predicted right (a running mean).
ADVANCE_AT = 0.93


@dataclass(slots=True)
class Progress:
    """Where a run stands; written beside every checkpoint."""

    step: int = 0
    tokens: int = 0
    minutes: float = 0.0
    stage: int = 0
    accuracy: float = 0.0


def optimizers(model: Decoder, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks")]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and n.startswith("blocks"))]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def rate_at(progress: Progress, minutes: float, warmup: int = 100, hold: float = 0.6) -> float:
    """The learning rate's factor: warm-up by steps, constant, then linear to 2 % by the clock."""
    done = min(progress.minutes / minutes, 1.0)
    fall = 1.0 if done < hold else 0.02 + 0.98 * (1.0 - done) / (1.0 - hold)
    return min((progress.step + 1) / warmup, fall)


def save(out: Path, model: Decoder, optimizer: Iterable[torch.optim.Optimizer], progress: Progress) -> None:
    """Write a checkpoint; each file is complete before it takes the place of the old one."""
    state: dict[str, Tensor] = {}
    for index, one in enumerate(optimizer):
        for number, entries in one.state_dict()["state"].items():
            state |= {f"{index}/{number}/{name}": torch.as_tensor(value).clone() for name, value in entries.items()}
    folder = out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensors in (("model", weights), ("optimizer", state)):
        save_file(tensors, folder / f"{name}.tmp")
        os.replace(folder / f"{name}.tmp", folder / f"{name}.safetensors")
    document = {"shape": model.shape.to_json()} | {n: getattr(progress, n) for n in Progress.__slots__}
    (folder / "state.tmp").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / "state.tmp", folder / "state.json")


def load(folder: Path, device: str, rate: float) -> tuple[Decoder, list[torch.optim.Optimizer], Progress]:
    """Read a checkpoint."""
    document: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    model = Decoder(Shape(**document.pop("shape"))).to(device)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    states: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, number, name = key.split("/")
        states.setdefault(int(index), {}).setdefault(int(number), {})[name] = tensor
    made = optimizers(model, rate)
    for index, one in enumerate(made):
        one.load_state_dict({"state": states[index], "param_groups": one.state_dict()["param_groups"]})
    return model, made, Progress(**document)


def loss_of(model: Decoder, ids: Tensor, weights: Tensor) -> tuple[Tensor, float, float]:
    """The weighted loss, the share of right answer tokens, and the text's loss in nats per token."""
    hidden = model(ids)[:, :-1]
    wanted = weights[:, 1:]
    chosen = wanted > 0
    weight = wanted[chosen]
    target = ids[:, 1:][chosen]
    scores = model.logits(hidden[chosen]).float()
    losses = F.cross_entropy(scores, target, reduction="none")
    answers = weight >= 1.0
    with torch.no_grad():
        right = (scores[answers].argmax(-1) == target[answers]).float().mean().item() if answers.any() else float("nan")
        plain = losses[weight < 0.5].mean().item() if (weight < 0.5).any() else float("nan")
    return (losses * weight).sum() / weight.sum(), right, plain


@torch.no_grad()
def recall(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, task: str, length: int, count: int = 10, seed: int = 10_000
) -> float:
    """Share of held-out samples whose every answer token is the most likely one (greedy decoding is right)."""
    device = model.embed.device
    end = tokenizer.eos_token_id

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    right = 0
    for index in range(count):
        sample = make_sample(task, seed + index, length, count_tokens)
        turn = [{"role": "user", "content": sample.prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        answer = [*tokenizer(sample.answer, add_special_tokens=False)["input_ids"], end]
        ids = torch.tensor([[*prompt, *answer]], device=device)
        scores = model.logits(model(ids)[0, len(prompt) - 1 : -1])
        right += bool((scores.argmax(-1) == ids[0, len(prompt) :]).all())
    return right / count


def main() -> None:
    """Train until the minutes are over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/training"))
    parser.add_argument("--tokenizer", type=Path, help="default: the folder 'tokenizer' in --out")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--stage", type=int, help="go on in this stage, whatever the checkpoint says")
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--save-every", type=float, default=2.0, help="minutes between checkpoints")
    parser.add_argument("--score-every", type=float, default=5.0, help="minutes between held-out scores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.out / "tokenizer")
    source = Source(tokenizer, arguments.seed)
    folder = arguments.out / "checkpoint"
    if (folder / "state.json").exists():
        model, optimizer, progress = load(folder, arguments.device, arguments.rate)
    else:
        model = Decoder(Shape(layers=arguments.layers, vocabulary=len(tokenizer)), arguments.seed).to(arguments.device)
        optimizer, progress = optimizers(model, arguments.rate), Progress()
    if arguments.compile:
        # One graph for each of the few batch shapes; about a fifth faster on a CPU, where gcc is at hand.
        torch._dynamo.config.recompile_limit = 64
        for block in model.blocks:
            block.compile(dynamic=False)
    if arguments.stage is not None:
        progress.stage, progress.accuracy = arguments.stage, 0.0
    log = (arguments.out / "log.jsonl").open("a", encoding="utf-8")

    def write(**entry: Any) -> None:
        entry = {"step": progress.step, "minutes": round(progress.minutes, 2), "tokens": progress.tokens} | entry
        print(json.dumps(entry), file=log, flush=True)
        print(entry, flush=True)

    write(parameters=sum(p.numel() for p in model.parameters()), threads=arguments.threads)
    clock = time.monotonic()
    saved = scored = progress.minutes
    while progress.minutes < arguments.minutes:
        stage = STAGES[progress.stage]
        rng = random.Random(f"{arguments.seed}/length/{progress.step}")
        length = stage.length
        if rng.random() < 0.2:
            # Shorter lengths are kept alive.
            length = rng.choice([s.length for s in STAGES[: progress.stage + 1]])
        arrays = source.batch(progress.step, length, ROWS[length], stage.mixture)
        ids, weights = (torch.from_numpy(array).to(arguments.device) for array in arrays)
        loss, right, plain = loss_of(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizer:
            for group in one.param_groups:
                group["lr"] = arguments.rate * rate_at(progress, arguments.minutes)
            one.step()
            one.zero_grad(set_to_none=True)
        now = time.monotonic()
        progress.minutes += (now - clock) / 60
        clock = now
        progress.step += 1
        progress.tokens += ids.numel()
        if right == right and length >= stage.length:
            progress.accuracy += (right - progress.accuracy) * 0.02
        if progress.step % 50 == 0:
            write(
                length=length,
                loss=round(loss.item(), 4),
                text=round(plain, 3),
                answers=round(progress.accuracy, 4),
                rate=round(arguments.rate * rate_at(progress, arguments.minutes), 6),
            )
        last = progress.stage == len(STAGES) - 1
        if not last and (progress.accuracy > ADVANCE_AT or progress.minutes / arguments.minutes > stage.until):
            progress.stage, progress.accuracy = progress.stage + 1, 0.0
            write(stage=progress.stage)
        if progress.minutes - saved > arguments.save_every:
            save(arguments.out, model, optimizer, progress)
            saved = progress.minutes
        if progress.minutes - scored > arguments.score_every and stage.length > 64:
            with torch.compiler.set_stance("force_eager"):  # prompts have all lengths; do not compile for each
                scores = {task: recall(model, tokenizer, task, stage.length) for task in TASKS}
            write(scored_at=stage.length, **scores)
            scored = progress.minutes
    save(arguments.out, model, optimizer, progress)
    write(finished=True)


if __name__ == "__main__":
    main()
