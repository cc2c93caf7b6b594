"""Tokens to text, one at a time: whole characters only, and stop strings that may straddle tokens.

A token need not be a character: `TextStream` holds tokens back until their text no longer ends in a cut-off character,
and decodes each piece together with the piece before it, so that spaces between tokens come out as in the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

__all__ = ["Decoder", "TextStream", "decode"]

_CUT: Final = "\ufffd"
_LONGEST_CHARACTER: Final = 12
"""Tokens held back at most. No character has more than four bytes, so what is still unreadable then is not text."""


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> Any:
        """Text of ``token_ids``."""


def decode(tokenizer: Decoder, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Text of ``tokens``, as a str also where a tokenizer's own signature promises less."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))


class TextStream:
    """The text of one completion while it grows.

    ``stop``: texts that end it; on a match the text is cut before it (after it, with ``include_stop``).
    """

    def __init__(
        self,
        tokenizer: Decoder,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._longest_stop = max(map(len, self._stop), default=0)
        self._tokens: list[int] = []
        # tokens[:_context] are decoded for good; tokens[_context:_read] too, and are decoded again with the next piece.
        self._context = 0
        self._read = 0
        self._context_text = ""
        self._search_from = 0
        self._taken = 0
        self.text = ""
        """All text so far that ends in a whole character; cut at the stop string once there was one."""
        self.stop_match: str | None = None
        """The stop string that was met."""

    def push(self, token: int, *, search: bool = True) -> bool:
        """Append a token; True if a stop string is complete now. ``search=False``: its text may not hold a stop
        string.
        """
        self._tokens.append(token)
        piece = self._piece(final=False)
        if not search:
            self.text += piece
            self._search_from = len(self.text)
            return False
        return self._append(piece)

    def finish(self) -> None:
        """No further token comes: text held back for a cut-off character is released, as the tokenizer writes it."""
        if self.stop_match is None:
            self._append(self._piece(final=True))

    def take(self, *, final: bool = False) -> str:
        """The text since the last take; what may become a stop string is left for later, unless ``final``."""
        end = len(self.text)
        if not final and self.stop_match is None:
            end -= self._possible_stop()
        end = max(end, self._taken)
        delta = self.text[self._taken : end]
        self._taken = end
        return delta

    def copy(self) -> TextStream:
        """An independent stream in the same state, for a fork."""
        twin = TextStream(
            self._tokenizer,
            stop=self._stop,
            include_stop=self._include_stop,
            skip_special_tokens=self._skip_special,
        )
        twin.__dict__.update(self.__dict__)
        twin._tokens = list(self._tokens)
        return twin

    def _piece(self, *, final: bool) -> str:
        """Text of the tokens not read yet, or "" as long as it ends within a character."""
        if self._read == len(self._tokens):
            return ""
        text = decode(self._tokenizer, self._tokens[self._context :], skip_special_tokens=self._skip_special)
        held = len(self._tokens) - self._read
        cut_off = len(text) <= len(self._context_text) or text.endswith(_CUT)
        if cut_off and held < _LONGEST_CHARACTER and not final:
            return ""
        piece = text[len(self._context_text) :]
        self._context, self._read = self._read, len(self._tokens)
        self._context_text = decode(
            self._tokenizer, self._tokens[self._context : self._read], skip_special_tokens=self._skip_special
        )
        return piece

    def _append(self, piece: str) -> bool:
        if not piece:
            return False
        begin = max(self._search_from, len(self.text) - self._longest_stop + 1)
        self.text += piece
        met = [(at, text) for text in self._stop if (at := self.text.find(text, begin)) >= 0]
        if not met:
            return False
        at, self.stop_match = min(met)
        self.text = self.text[: at + len(self.stop_match)] if self._include_stop else self.text[:at]
        return True

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(text.startswith(end) for text in self._stop):
                return length
        return 0
