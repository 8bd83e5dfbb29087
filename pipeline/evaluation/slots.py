"""Slot error rate for data-to-text: which values of the input the output leaves out, makes up, or says twice.

In: inputs of the form `name : value | name : value` (E2E) or `subject : property : object | …` (WebNLG), and outputs. Out: counts, one
row a record. A value is found where it stands in the text word by word, without case, accents left as they are; so a value said
in other words counts as missing, and the references' own rate says how often that happens.
"""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

# Said by the sentence around them and not by their own words.
_UNSPOKEN = frozenset({"", "yes", "no", "true", "false", "none", "n/a"})

_Words = tuple[str, ...]


def slot_errors(inputs: Sequence[str]) -> Callable[[Sequence[str]], np.ndarray] | None:
    """The slot errors of outputs for `inputs`; None if no input has slots.

    A value of the same slot in another record's input counts as added where the output says it and its own input does not.

    Returns:
        a function from outputs to [N, 4]: missing, added, repeated, values of the input.
    """
    slots = [_slots(text) for text in inputs]
    if not any(slots):
        return None
    known: dict[str, set[_Words]] = {}
    for own in slots:
        for name, value in own:
            known.setdefault(name, set()).add(value)

    def errors(outputs: Sequence[str]) -> np.ndarray:
        return np.array([_errors(text, own, known) for text, own in zip(outputs, slots, strict=True)], dtype=np.float64)

    return errors


def _errors(text: str, slots: Sequence[tuple[str, _Words]], known: dict[str, set[_Words]]) -> tuple[int, int, int, int]:
    words = _words(text)
    wanted = {value for _, value in slots}
    # Longer values first, and each word once: "The Rice Boat" is no second mention of "Rice".
    taken = [False] * len(words)
    found = {value: _take(words, value, taken) for value in sorted(wanted, key=lambda v: (-len(v), v))}
    foreign = {value for name in {name for name, _ in slots} for value in known[name]} - wanted
    added = sum(_take(words, value, taken) > 0 for value in sorted(foreign, key=lambda v: (-len(v), v)))
    missing = sum(not count for count in found.values())
    repeated = sum(count > 1 for count in found.values())
    return missing, added, repeated, len(wanted)


def _take(words: _Words, value: _Words, taken: list[bool]) -> int:
    """How often `value` stands in `words` where nothing is taken yet; takes these places."""
    count, size = 0, len(value)
    for start in range(len(words) - size + 1):
        if words[start : start + size] == value and not any(taken[start : start + size]):
            taken[start : start + size] = [True] * size
            count += 1
    return count


def _slots(text: str) -> list[tuple[str, _Words]]:
    """Slot names and values of one input; a triple gives its subject and its object."""
    found = []
    for part in text.split("|"):
        fields = [field.strip() for field in re.split(r"\s:\s|:\s", part)]
        if len(fields) == 3:
            found += [("subject", fields[0]), (fields[1], fields[2])]
        elif len(fields) == 2:
            found.append((fields[0], fields[1]))
    slots = [(name, _words(value)) for name, value in found if name and value.casefold() not in _UNSPOKEN]
    return list(dict.fromkeys((name, value) for name, value in slots if value))


@functools.lru_cache(maxsize=20_000)
def _words(text: str) -> _Words:
    # 2702.0 and £20-25 are one word; underscores of WebNLG's names are blanks.
    return tuple(re.findall(r"[^\W_]+(?:[.,'-][^\W_]+)*", text.casefold().replace("_", " ")))
