"""Slot error rate for data-to-text: which values of the input the output leaves out, makes up, or says twice.

In: inputs of the form `name : value | name : value` (E2E) or `subject : property : object | …` (WebNLG), and outputs. Out: counts, one
row a record. A value is found where it stands in the text word by word, without case, accents left as they are; so a value said
in other words counts as missing, and the references' own rate says how often that happens. Scripts that write no blanks between
words, or hang particles on them, are searched sign by sign. Knows only the values of the inputs that it is given: what is made up
and stands in none of them is not seen.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

# Said by the sentence around them and not by their own words.
_UNSPOKEN = frozenset({"", "yes", "no", "true", "false", "none", "n/a"})
# A value of one of these is no sign of a slot that the input does not have: any sentence may hold it.
_COMMON = frozenset(
    {
        *(
            "all",
            "and",
            "any",
            "are",
            "but",
            "can",
            "for",
            "from",
            "good",
            "great",
            "has",
            "have",
            "here",
            "its",
            "more",
            "most",
            "new",
            "not",
            "now",
        ),
        *(
            "off",
            "one",
            "open",
            "our",
            "out",
            "over",
            "the",
            "there",
            "they",
            "this",
            "two",
            "was",
            "well",
            "with",
            "you",
            "your",
        ),
    }
)
# Kana, ideographs, Hangul (blanks, but particles on the words), Thai, Lao, Tibetan, Burmese, Khmer.
_SIGN = (
    r"[\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
    r"\u0e01-\u0e4e\u0e81-\u0ece\u0f40-\u0fbc\u1000-\u103f\u1050-\u109f\u1780-\u17d3\U00020000-\U0003ffff]"
)
_LETTER = rf"(?:(?!{_SIGN})[^\W_])"
# 2702.0 and £20-25 are one word.
_WORD = re.compile(rf"{_SIGN}|{_LETTER}+(?:[.,'-]{_LETTER}+)*")

_Words = tuple[str, ...]
_Slots = list[tuple[str, _Words]]


def slot_errors(inputs: Sequence[str]) -> Callable[[Sequence[str]], np.ndarray] | None:
    """The slot errors of outputs for `inputs`; None if no input has slots.

    A value of another record's input counts as added where the output says it and its own input does not. If its own input does not even have such a
    slot, the value must be telling: of three letters or more (two signs), no very common word, and no part of a value that the input has.

    Returns:
        a function from outputs to [N, 4]: missing, added, repeated, values of the input.
    """
    slots = _parsed(inputs)
    if not any(slots):
        return None
    known: dict[_Words, set[str]] = {}
    for own in slots:
        for name, value in own:
            known.setdefault(value, set()).add(name)
    by_first: dict[str, list[_Words]] = {}
    for value in sorted(known, key=_longest_first):
        by_first.setdefault(value[0], []).append(value)

    def errors(outputs: Sequence[str]) -> np.ndarray:
        rows = [_errors(text, own, known, by_first) for text, own in zip(outputs, slots, strict=True)]
        return np.array(rows, dtype=np.float64)

    return errors


def _errors(
    text: str, slots: _Slots, known: Mapping[_Words, set[str]], by_first: Mapping[str, Sequence[_Words]]
) -> tuple[int, int, int, int]:
    words = _words(text)
    wanted = {value for _, value in slots}
    names = {name for name, _ in slots}
    # Longer values first, and each word once: "The Rice Boat" is no second mention of "Rice".
    taken = [False] * len(words)
    found = {value: _take(words, value, taken) for value in sorted(wanted, key=_longest_first)}
    said = {value for i, word in enumerate(words) for value in by_first.get(word, ()) if words[i : i + len(value)] == value}
    foreign = [value for value in said - wanted if known[value] & names or _is_telling(value, wanted)]
    added = sum(_take(words, value, taken) > 0 for value in sorted(foreign, key=_longest_first))
    missing = sum(not count for count in found.values())
    repeated = sum(count > 1 for count in found.values())
    return missing, added, repeated, len(wanted)


def _longest_first(value: _Words) -> tuple[int, _Words]:
    return -len(value), value


def _is_telling(value: _Words, wanted: Iterable[_Words]) -> bool:
    """Whether a value in the text shows that a slot was made up which the input does not have at all."""
    least = 2 if re.match(_SIGN, value[0]) else 3
    if sum(map(len, value)) < least or (len(value) == 1 and value[0] in _COMMON):
        return False
    return not any(_take(own, value, [False] * len(own)) for own in wanted)


def _take(words: _Words, value: _Words, taken: list[bool]) -> int:
    """How often `value` stands in `words` where nothing is taken yet; takes these places."""
    count, size = 0, len(value)
    for start in range(len(words) - size + 1):
        if words[start : start + size] == value and not any(taken[start : start + size]):
            taken[start : start + size] = [True] * size
            count += 1
    return count


def _parsed(inputs: Sequence[str]) -> list[_Slots]:
    """Slot names and values of each input.

    They are triples where every part of every input that holds ` : ` holds it twice or more; a third one belongs to the object. Otherwise a part is
    a name and a value, cut at its first ` : `, or else at its first `: `; whatever follows belongs to the value (`title : Alien: Covenant`).
    """
    parts = [text.split("|") for text in inputs]
    fields = [[re.split(r"\s:\s", part.strip(), maxsplit=2) for part in own] for own in parts]
    separated = [of for own in fields for of in own if len(of) > 1]
    triples = bool(separated) and all(len(of) == 3 for of in separated)
    return [_slots(own, triples) for own in parts]


def _slots(parts: Sequence[str], triples: bool) -> _Slots:
    """The slots of one input; a triple gives its subject and its object."""
    found = []
    for part in parts:
        fields = [field.strip() for field in re.split(r"\s:\s", part.strip(), maxsplit=2 if triples else 1)]
        if len(fields) == 1:
            fields = [field.strip() for field in part.split(": ", 1)]
        if len(fields) == 3:
            found += [("subject", fields[0]), (fields[1], fields[2])]
        elif len(fields) == 2:
            found.append((fields[0], fields[1]))
    slots = [(name, _words(value)) for name, value in found if name and value.casefold() not in _UNSPOKEN]
    return list(dict.fromkeys((name, value) for name, value in slots if value))


@functools.lru_cache(maxsize=20_000)
def _words(text: str) -> _Words:
    # Underscores of WebNLG's names are blanks.
    return tuple(_WORD.findall(unicodedata.normalize("NFC", text.casefold()).replace("_", " ")))
