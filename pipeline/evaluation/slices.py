"""Parts of a test split: by any field of its records, or by the length of the input.

In: records and names. Out: for each name, its values and the records that have each. Every record is in exactly one value of each slice.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.data import Record

INPUT_LENGTH = "input_length"
_OTHER, _NONE = "(other)", "(none)"
_MOST_VALUES = 12


def slices_of(records: Sequence[Record], names: Sequence[str]) -> tuple[dict[str, dict[str, list[int]]], list[str]]:
    """Cut the records by each name.

    A field with more than 12 values is cut into thirds where they are numbers; otherwise the 11 most frequent values and `(other)` remain.
    Records without the field are `(none)`.

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
    if len({_shown(value) for value in values}) <= _MOST_VALUES:
        return [_shown(value) for value in values]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        return _thirds(numbers, "")
    shown = [_shown(value) for value in values]
    kept = {value for value, _ in Counter(shown).most_common(_MOST_VALUES - 1)}
    return [value if value in kept else _OTHER for value in shown]


def _thirds(numbers: Sequence[float], unit: str) -> list[str]:
    """`short: up to 12 tokens`, `middle`, `long`, as nearly equal in number as equal values allow."""
    ordered = sorted(numbers)
    first, second = (ordered[max(0, len(ordered) * k // 3 - 1)] for k in (1, 2))
    end = f" {unit}" if unit else ""
    names = (f"up to {first:g}{end}", f"{first:g} to {second:g}{end}", f"above {second:g}{end}")
    return [names[0] if number <= first else names[1] if number <= second else names[2] for number in numbers]


def _shown(value: Any) -> str:
    if value is None or value == "":
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\0", " ")[:80]


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
