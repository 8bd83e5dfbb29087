"""Every record is in one value of each slice, and values that differ stay apart."""

from typing import Any

from pipeline.data import Record
from pipeline.evaluation.slices import slices_of


def counts(values: list[Any]) -> dict[str, int]:
    """Value -> how many records, of a field that is missing where `values` has None."""
    records = [Record([1], [1], "x", ["y"], {} if value is None else {"field": value}) for value in values]
    slices, _ = slices_of(records, ["field"])
    assert sorted(i for rows in slices["field"].values() for i in rows) == list(range(len(values)))
    return {value: len(rows) for value, rows in slices["field"].items()}


def test_numbers_become_thirds_with_the_missing_ones_apart_and_all_their_digits() -> None:
    assert counts([2_000_000 + i for i in range(15)] + [None, ""]) == {
        "up to 2000004": 5,
        "2000004 to 2000009": 5,
        "above 2000009": 5,
        "(none)": 2,
    }
    assert list(counts([i / 8 for i in range(30)])) == ["up to 1.125", "1.125 to 2.375", "above 2.375"]


def test_few_numbers_stay_values_and_a_missing_one_changes_nothing() -> None:
    assert counts([1, 2, 1, None]) == {"1": 2, "2": 1, "(none)": 1}
    assert counts([*range(12), None]) == {**{str(i): 1 for i in range(12)}, "(none)": 1}


def test_long_values_that_begin_alike_stay_apart() -> None:
    long = "a" * 100
    assert counts([long + "x", long + "y", long + "x"]) == {"a" * 79 + "…": 2, "a" * 79 + "… (2)": 1}


def test_of_many_texts_the_most_frequent_remain_beside_the_others_and_those_without() -> None:
    found = counts([f"kind {i}" for i in range(14)] + [f"kind {i}" for i in range(11)] + [None])
    assert found == {**{f"kind {i}": 2 for i in range(11)}, "(none)": 1, "(other)": 3}
