"""Text as it grows: the pieces are the whole, characters stay whole, stop strings may straddle tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.engine.detokenize import TextStream
from tests.engine.tiny_engine import byte_tokenizer

TOKENIZER = byte_tokenizer()


class Spaces:
    """Writes a space between words but none before the first, as sentencepiece tokenizers do."""

    words = ("a", "bc", "", "d")

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join(self.words[token] for token in token_ids if token != 2 or not skip_special_tokens)


def grow(stream: TextStream, tokens: list[int]) -> list[str]:
    """Feeds ``tokens``, up to a stop; what was taken on the way."""
    pieces = []
    for token in tokens:
        stopped = stream.push(token)
        pieces.append(stream.take())
        if stopped:
            break
    stream.finish()
    return [*pieces, stream.take(final=True)]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.lists(st.sampled_from(["a", "ab", "é!", "🙂", "\n"]), max_size=3))
def test_the_pieces_are_the_whole_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    stream = TextStream(TOKENIZER, stop=stops)
    pieces = grow(stream, tokens)
    whole = TOKENIZER.decode(tokens)
    ends = [whole.index(stop) for stop in stops if stop in whole]
    assert "".join(pieces) == stream.text
    # One token is one byte: the first stop string to be complete is the one that ends the text.
    if ends:
        assert stream.stop_match in stops
        assert stream.text + str(stream.stop_match) == whole[: len(stream.text) + len(str(stream.stop_match))]
    else:
        assert stream.stop_match is None
        assert stream.text == whole


def test_no_half_character_is_ever_taken() -> None:
    stream = TextStream(TOKENIZER)
    pieces = grow(stream, TOKENIZER.encode("né🙂ü", add_special_tokens=False))
    assert [piece for piece in pieces if piece] == ["n", "é", "🙂", "ü"]


def test_what_is_no_text_comes_out_at_the_end_at_the_latest() -> None:
    cut = TOKENIZER.encode("🙂", add_special_tokens=False)[:2]
    stream = TextStream(TOKENIZER)
    assert "".join(grow(stream, cut)) == TOKENIZER.decode(cut)
    endless = TextStream(TOKENIZER)
    pieces = grow(endless, cut * 100)
    assert sum(bool(piece) for piece in pieces) > 5


def test_special_tokens_hold_nothing_up() -> None:
    stream = TextStream(TOKENIZER)
    assert "".join(grow(stream, [2] * 40 + TOKENIZER.encode("x", add_special_tokens=False))) == "x"


def test_spaces_between_tokens_come_out_as_in_the_whole_text() -> None:
    tokens = [0, 1, 2, 3, 0, 2, 2, 1]
    stream = TextStream(Spaces())
    assert "".join(grow(stream, tokens)) == Spaces().decode(tokens) == "a bc d a bc"


@pytest.mark.parametrize(("include", "wanted"), [(False, "one "), (True, "one END")])
def test_a_stop_string_over_several_tokens(include: bool, wanted: str) -> None:
    stream = TextStream(TOKENIZER, stop=["END", "never"], include_stop=include)
    pieces = grow(stream, TOKENIZER.encode("one END two", add_special_tokens=False))
    assert stream.text == "".join(pieces) == wanted
    assert stream.stop_match == "END"


def test_what_may_become_a_stop_string_is_held_back_and_released() -> None:
    stream = TextStream(TOKENIZER, stop=["abc"])
    shown = []
    for token in TOKENIZER.encode("xababd", add_special_tokens=False):
        stream.push(token)
        shown.append(stream.take())
    assert shown == ["x", "", "", "ab", "", "abd"]


def test_text_before_the_search_holds_no_stop_string() -> None:
    stream = TextStream(TOKENIZER, stop=["ab"])
    first, second, third, fourth = TOKENIZER.encode("abab", add_special_tokens=False)
    assert not stream.push(first, search=False)
    assert not stream.push(second, search=False)
    assert not stream.push(third)
    assert stream.push(fourth)
    assert stream.text == "ab"


def test_a_copy_goes_on_alone() -> None:
    stream = TextStream(TOKENIZER, stop=["zz"])
    half, *rest = TOKENIZER.encode("é!", add_special_tokens=False)
    stream.push(half)
    twin = stream.copy()
    for token in rest:
        twin.push(token)
    assert (stream.text, twin.text) == ("", "é!")
    assert "".join(grow(stream, TOKENIZER.encode("q", add_special_tokens=False))).endswith("q")
