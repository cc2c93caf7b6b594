"""Retrieval heads: built by hand and found, the texts they are looked for in, and what is left without the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.attention.pieces import LayerCall
from kvfold.engine.loading import load
from kvfold.errors import RequestError
from kvfold.geometry import Geometry
from kvfold.quality.profile.lookups import Lookup, lookup_texts, repeated_texts
from kvfold.quality.profile.retrieval import GateTally, check_counts, checked, find_gates, find_retrieval, gated_layers
from kvfold.quality.tasks import heldout_text
from kvfold.quality.watch import Attended
from tests.engine.tiny_engine import byte_tokenizer
from tests.quality.test_profile import model_of

SINKS, RECENT, TOKENS, DIM = 4, 16, 200, 64


@pytest.fixture(scope="module")
def bundled() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load("bundled")


@pytest.fixture(scope="module")
def texts(bundled: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> list[Lookup]:
    return lookup_texts(bundled[1], tokens=512, near=68, seed=0, vocab=4096)


# == heads built by hand

ASKED = Lookup("repeat", (0,) * TOKENS, tuple(range(150, 190)), tuple((at - 100, at - 99) for at in range(150, 190)))


def head(target: Callable[[Tensor], Tensor], keys: Tensor, sharpness: float = 8.0) -> Tensor:
    """Queries ``[T, D]`` that find the keys at ``target`` of their own positions."""
    return keys[target(torch.arange(TOKENS)).clamp(0, TOKENS - 1)] * sharpness


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "retrieves": lambda t: t - 100,
    "copies what follows": lambda t: t - 99,
    "itself": lambda t: t,
    "the one before": lambda t: t - 1,
    "the first": lambda t: t * 0,
    "far, but something else": lambda t: t - 120,
}


def halves_of(
    names: list[str], *, silent: bool = False, sinks: Tensor | None = None
) -> tuple[list[float], list[float]]:
    """Recall and change of two KV heads with two query heads each."""
    generator = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(TOKENS, 2, DIM, generator=generator), dim=-1)
    v = torch.randn(TOKENS, 2, DIM, generator=generator)
    if silent:
        v[:, 0] *= 1e-3
    q = torch.stack([head(HEADS[name], k[:, number // 2]) for number, name in enumerate(names)], dim=1)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * 2.0
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -1e30)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, TOKENS, 1)), dim=-1)
    p = scores.softmax(-1)[..., :TOKENS]
    output = torch.einsum("hts,shd->thd", p, v.repeat_interleave(2, 1))
    tally = GateTally(4)
    tally.add(Attended(0, q, k, v, LayerCall(scale=2.0, sinks=sinks), output), ASKED, SINKS, RECENT)
    return tally.halves(2)


def gates_of(names: list[str], **options: object) -> list[float]:
    return [(recall + change) / 2 for recall, change in zip(*halves_of(names, **options), strict=True)]  # type: ignore[arg-type]


def test_a_head_that_finds_far_tokens_has_a_high_gate_and_a_streaming_head_a_low_one() -> None:
    retrieval, streaming = gates_of(["itself", "retrieves", "the one before", "the first"])
    assert retrieval > 0.95
    assert streaming < 0.02


def test_one_query_head_is_enough_whichever_it_is() -> None:
    assert gates_of(["retrieves", "itself", "itself", "copies what follows"]) == pytest.approx([1, 1], abs=0.05)


def test_a_head_that_looks_far_at_other_things_is_half_needed() -> None:
    (recall, _), (change, _) = halves_of(["far, but something else", "itself", "itself", "itself"])
    assert recall < 0.02
    assert change > 0.9


def test_a_head_that_says_nothing_needs_nothing() -> None:
    loud, silent = (halves_of(["far, but something else"] + ["itself"] * 3, silent=off)[1][0] for off in (False, True))
    assert silent < 0.01 < 0.9 < loud


def test_what_a_learned_sink_takes_is_no_recall() -> None:
    names = ["retrieves", "itself", "itself", "itself"]
    (recall, _), _ = halves_of(names, sinks=torch.tensor([16.0, -9.0, -9.0, -9.0]))
    assert recall == pytest.approx(0.5, abs=0.05)  # its logit is that of the key that is found
    assert halves_of(names, sinks=torch.full((4,), -9.0))[0][0] > 0.95


# == where they are looked for


def test_answers_stand_far_back_in_the_text(
    bundled: tuple[PreTrainedModel, PreTrainedTokenizerBase], texts: list[Lookup]
) -> None:
    tokenizer = bundled[1]
    assert len(texts) >= 4
    for text in texts:
        assert text.kind == "question"
        assert len(text.tokens) <= 512
        answer = tokenizer.decode([text.tokens[at + 1] for at in text.asked])
        assert len(set(text.right)) == 1
        statement = tokenizer.decode([text.tokens[at] for at in text.right[0]])
        assert statement.strip(" .\n").endswith(answer.strip(" .\n"))
        assert min(text.asked) - max(text.right[0]) > 68
        said = tokenizer.decode(text.tokens)
        assert "<|assistant|>" in said[said.index(statement) :]
    again = lookup_texts(tokenizer, tokens=512, near=68, seed=0, vocab=4096)
    assert again == texts
    assert lookup_texts(tokenizer, tokens=512, near=68, seed=1, vocab=4096) != texts


def test_a_base_model_reads_random_tokens_twice() -> None:
    texts = repeated_texts(range(10, 50), [1], tokens=200, near=20, seed=3)
    assert len(texts) == 4
    for text in texts:
        assert text.tokens[0] == 1
        assert text.tokens[1:100] == text.tokens[100:]
        assert set(text.tokens[1:]) <= set(range(10, 50))
        for at, right in zip(text.asked, text.right, strict=True):
            first, following = right
            assert text.tokens[first] == text.tokens[at]
            assert text.tokens[following] == text.tokens[at + 1]
            assert at - following > 20
        assert text.asked == tuple(sorted(text.asked))
    assert texts == repeated_texts(range(10, 50), [1], tokens=200, near=20, seed=3)


def test_a_tokenizer_without_a_template_means_a_base_model() -> None:
    tokenizer = byte_tokenizer()
    assert {text.kind for text in lookup_texts(tokenizer, tokens=500, near=40, seed=0, vocab=320)} == {"question"}
    tokenizer.chat_template = None
    found = lookup_texts(tokenizer, tokens=100, near=40, seed=0, vocab=320)
    assert {text.kind for text in found} == {"repeat"}
    assert not {0, 1, 2} & {token for text in found for token in text.tokens[1:]}  # nothing special


def test_texts_without_room_are_refused() -> None:
    with pytest.raises(RequestError, match="more than 68 tokens back") as refused:
        repeated_texts(range(9), [], tokens=100, near=68, seed=0)
    assert "--context" in refused.value.hint
    with pytest.raises(RequestError, match="of 90 tokens"):
        lookup_texts(byte_tokenizer(), tokens=90, near=68, seed=0, vocab=320)


# == what comes of it


def test_the_bundled_model_has_one_retrieval_head(
    bundled: tuple[PreTrainedModel, PreTrainedTokenizerBase], texts: list[Lookup]
) -> None:
    model, tokenizer = bundled
    said: list[str] = []
    passage = tokenizer.encode(heldout_text()[:4000])[:512]
    found = find_retrieval(model, texts[:3], [passage], 4, 64, said.append)
    assert found.gates.model_type == "llama"
    assert found.gates.heads[1][1] > 0.9
    others = [
        gate for layer, gates in found.gates.heads.items() for h, gate in enumerate(gates) if (layer, h) != (1, 1)
    ]
    assert max(others) < 0.4
    for layer, gates in found.gates.heads.items():
        halves = zip(found.recall[layer], found.change[layer], strict=True)
        assert gates == pytest.approx([(r + c) / 2 for r, c in halves], abs=1e-4)
    none, one, *_, everything = found.checks
    assert (none.full, one.full, everything.full) == (0, 1, 8)
    assert none.answers < 0.5 < 0.95 < one.answers
    assert everything.answers == 1
    assert none.kl > one.kl > everything.kl == 0
    assert len(said) == 3 + len(found.checks) * (3 + 1)  # each of them a forward


def test_both_kinds_of_texts_find_the_same_head(bundled: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    texts = repeated_texts(range(3, 4096), [1], tokens=300, near=68, seed=0)
    gates, recall, _ = find_gates(bundled[0], texts[:2], 4, 64)
    assert gates.full(1)[1] == (False, True)
    assert recall[1][1] > 0.3 > 10 * max(values[0] for values in recall.values())


def test_heads_that_forget_nothing_change_nothing() -> None:
    model = model_of("gemma3n")
    texts = repeated_texts(range(3, 90), [], tokens=60, near=10, seed=0)
    gates, _, _ = find_gates(model, texts, 4, 20)
    assert list(gates.heads) == [1]  # layer 0 slides; layers 2 and 3 read the pages of others
    passage = list(texts[0].tokens)
    strict = checked(model, texts, [passage], gates)
    assert strict[0].kl > 1e-4
    lenient = type(gates)(model_type="x", sinks=4, recent=60, heads=gates.heads)
    for check in checked(model, texts, [passage], lenient):
        assert check.kl == pytest.approx(0, abs=1e-5)
        assert check.loss == pytest.approx(strict[-1].loss, abs=1e-4)


def test_only_layers_with_something_to_give_up_have_gates() -> None:
    geometry = Geometry.from_config(model_of("gemma2").config)  # windows of 8
    assert [layer.index for layer in gated_layers(geometry, 7)] == [0, 1, 2, 3]
    assert [layer.index for layer in gated_layers(geometry, 8)] == [1, 3]


def test_checks_go_from_none_to_all() -> None:
    assert check_counts(1) == [0, 1]
    assert check_counts(8) == [0, 1, 2, 3, 4, 6, 8]
    for heads in range(1, 300):
        counts = check_counts(heads)
        assert counts == sorted(set(counts))
        assert (counts[0], counts[-1]) == (0, heads)
