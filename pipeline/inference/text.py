"""From tokens to text while they come: pieces that never change afterwards, cut before stop strings.

In: one token after another. Out: pieces of text. A character may be spread over several tokens, and a stop string too, so a piece is held back until
it is certain. The text of an answer is without white space around it, as evaluation judges it.
"""

from collections.abc import Sequence
from typing import Any

# The last tokens that are decoded again with the next one: what a token says may depend on the one before.
_CONTEXT = 6
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a character of which not all bytes are there


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: of the base.
        stop: see `Decoding.stop`.
        wanted: whether pieces are wanted while tokens come. Without that, and without stop strings, nothing is decoded before the end.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], wanted: bool) -> None:
        self._tokenizer, self._stop, self._live = tokenizer, tuple(stop), wanted or bool(stop)
        self._ids: list[int] = []
        self._context = self._read = 0  # tokens[context:read] are decoded with those after `read`
        self._text = ""  # of tokens[:read], not stripped
        self._given = 0  # characters of `_text` that went out or are leading white space

    def add(self, token: int) -> tuple[str, bool]:
        """One more token.

        Returns:
            the next piece of text, perhaps empty, and whether a stop string is complete.
        """
        self._ids.append(token)
        if not self._live:
            return "", False
        before = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        if whole.endswith(_UNFINISHED) and len(self._ids) - self._read < 8:
            return "", False
        self._text += whole[len(before) :]
        self._read = len(self._ids)
        self._context = max(0, self._read - _CONTEXT)
        cut = self._first_stop(self._text)
        if cut is not None:
            self._text = self._text[:cut]
            return self._release(len(self._text)), True
        return self._release(len(self._text) - self._held_back()), False

    def finish(self, stopped: bool) -> tuple[str, str]:
        """No more tokens.

        Args:
            stopped: whether `add` said that a stop string is complete.

        Returns:
            the last piece, and the whole text.
        """
        if not stopped:
            whole = self._decode(self._ids)
            cut = self._first_stop(whole)
            whole = whole if cut is None else whole[:cut]
            # Some tokenizers clean up what stands at the end; what went out stays.
            self._text = whole if whole.startswith(self._text[: self._given]) else self._text
        return self._release(len(self._text)), self._text.strip()

    def stops(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens has a stop string: for beams, which do not grow token by token."""
        return bool(self._stop) and self._first_stop(self._decode(list(tokens))) is not None

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _first_stop(self, text: str) -> int | None:
        return min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max((_overlap(self._text, stop) for stop in self._stop), default=0)

    def _release(self, end: int) -> str:
        """The piece up to `end`. White space at either end of the answer is none of it, so it goes out with what follows."""
        if not self._text[: self._given].strip():
            self._given = max(self._given, len(self._text) - len(self._text.lstrip()))
        piece = self._text[self._given : end].rstrip()
        self._given += len(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` with which `stop` begins, all of them apart."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
