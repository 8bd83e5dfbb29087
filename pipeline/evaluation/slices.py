"""Parts of a test split: by any field of its records, or by the length of the input.

In: records and names. Out: for each name, its values and the records that have each. Every record is in exactly one value of each slice.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.data import Record

INPUT_LENGTH = "input_length"
_OTHER, _NONE = "(other)", "(none)"
_MOST_VALUES = 12
_LONGEST = 80  # letters of a value's name


def slices_of(records: Sequence[Record], names: Sequence[str]) -> tuple[dict[str, dict[str, list[int]]], list[str]]:
    """Cut the records by each name.

    A field with more than 12 values is cut into thirds where they are numbers; otherwise the 11 most frequent values and `(other)` remain.
    Records without the field are `(none)`. Long values are shortened for show, and stay apart.

    Returns:
        name -> value -> places of the records, and a sentence for each name that cuts nothing.
    """
    slices: dict[str, dict[str, list[int]]] = {}
    remarks = []
    for name in names:
        if name == INPUT_LENGTH:
            of = _thirds([len(record.prompt_ids) for record in records], "tokens")
        elif all(name not in record.fields for record in records):
            remarks.append(f"There is no slice by {name}: no record of the test split has such a field.")
            continue
        else:
            of = _by_value([record.fields.get(name) for record in records])
        if len(set(of)) < 2:
            remarks.append(f"There is no slice by {name}: all records have the same ({of[0]}).")
            continue
        slices[name] = {value: [i for i, own in enumerate(of) if own == value] for value in sorted(set(of), key=_order(of))}
    return slices, remarks


def _by_value(values: Sequence[Any]) -> list[str]:
    texts = [_text(value) for value in values]
    present = {text for text in texts if text != _NONE}
    if len(present) <= _MOST_VALUES:
        return _shown(texts)
    numbers = [value for value, text in zip(values, texts, strict=True) if text != _NONE]
    if all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in numbers):
        of = iter(_thirds(numbers, ""))
        return [text if text == _NONE else next(of) for text in texts]
    # Those without a value have a slice of their own, beside the most frequent values.
    kept = {text for text, _ in Counter(text for text in texts if text != _NONE).most_common(_MOST_VALUES - 1)}
    return _shown([text if text in kept or text == _NONE else _OTHER for text in texts])


def _thirds(numbers: Sequence[float], unit: str) -> list[str]:
    """`up to 12 tokens`, `12 to 30 tokens`, `above 30 tokens`, as nearly equal in number as equal values allow."""
    ordered = sorted(numbers)
    first, second = (ordered[max(0, len(ordered) * k // 3 - 1)] for k in (1, 2))
    end = f" {unit}" if unit else ""
    names = (f"up to {_number(first)}{end}", f"{_number(first)} to {_number(second)}{end}", f"above {_number(second)}{end}")
    return [names[0] if number <= first else names[1] if number <= second else names[2] for number in numbers]


def _number(number: float) -> str:
    """All digits: `2000014`, `0.5`, `3`."""
    return str(int(number)) if float(number).is_integer() and abs(number) < 1e16 else repr(number)


def _text(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\0", " ")


def _shown(texts: Sequence[str]) -> list[str]:
    """Values short enough for a table; those whose beginnings are alike are numbered."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in texts:
        if text not in names:
            name, number = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…", 1
            while name in taken:
                number += 1
                name = f"{text[: _LONGEST - 1]}… ({number})"
            names[text] = name
            taken.add(name)
    return [names[text] for text in texts]


def _order(of: Sequence[str]) -> Any:
    """The order of first appearance for thirds (by rank) and of frequency for values, `(other)` and `(none)` last."""
    counts = Counter(of)
    rank = {"up to": 0, "above": 2}

    def key(value: str) -> tuple[int, int, str]:
        if value in (_OTHER, _NONE):
            return 3, 0, value
        start = next((place for word, place in rank.items() if value.startswith(word + " ")), 1)
        return start if any(v.startswith("up to ") for v in counts) else 0, -counts[value], value

    return key
