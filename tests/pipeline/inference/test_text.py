"""Pieces of text while tokens come: they join to the whole, never change, and stop where they must."""

import itertools
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.inference.text import TextStream

TEXTS = [
    "  The café at 12 °C: naïve “quotes”, 東京の店, \U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f1e9\U0001f1ea. \n\n Two lines.  ",
    "no stop",
    "   ",
    "a\ufffdb",
]


@pytest.fixture(scope="module")
def tokenizer(example_base: Path) -> object:
    """Bytes and pieces of words: characters may be spread over several tokens."""
    return AutoTokenizer.from_pretrained(example_base)


def streamed(tokenizer: object, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str]:
    stream = TextStream(tokenizer, stop, wanted=True)
    pieces, stopped = [], False
    for token in ids:
        piece, stopped = stream.add(token)
        pieces.append(piece)
        if stopped:
            break
    last, whole = stream.finish(stopped)
    return [*pieces, last], whole


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_text_without_white_space_around_it(tokenizer: object, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    pieces, whole = streamed(tokenizer, ids)
    assert "".join(pieces) == whole == text.strip()
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    lazy = TextStream(tokenizer, (), wanted=False)
    assert all(lazy.add(token) == ("", False) for token in ids)
    assert lazy.finish(False) == (whole, whole)


def test_text_is_cut_before_a_stop_string_wherever_token_borders_are(tokenizer: object) -> None:
    drawn = random.Random(0)
    text = TEXTS[0].strip()
    for _ in range(60):
        start = drawn.randrange(len(text))
        stop = text[start : start + drawn.randrange(1, 9)]
        # The same text in tokens of any lengths.
        cuts = sorted({0, len(text), *(drawn.randrange(len(text)) for _ in range(12))})
        ids = [i for a, b in itertools.pairwise(cuts) for i in tokenizer(text[a:b], add_special_tokens=False)["input_ids"]]  # type: ignore[operator]
        pieces, whole = streamed(tokenizer, ids, (stop, "never there"))
        assert "".join(pieces) == whole == text[: text.index(stop)].strip(), stop


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_certain(tokenizer: object) -> None:
    stream = TextStream(tokenizer, ("END.",), wanted=True)
    pieces = [stream.add(token)[0] for token in tokenizer("go EN", add_special_tokens=False)["input_ids"]]  # type: ignore[operator]
    assert "".join(pieces) == "go"
    pieces += [stream.add(token)[0] for token in tokenizer("TER", add_special_tokens=False)["input_ids"]]  # type: ignore[operator]
    assert "".join(pieces) == "go ENTER"
    assert not stream.stops(tokenizer("END", add_special_tokens=False)["input_ids"])  # type: ignore[operator]
    assert stream.stops(tokenizer("a END. b", add_special_tokens=False)["input_ids"])  # type: ignore[operator]
