"""Does the test split repeat what was learned from? Inputs that stand in train, and references that share 13 words in a row with it.

In: the records of both splits. Out: counts and a few examples. Thirteen words are the usual measure (Brown et al. 2020, appendix C): texts of
shorter references cannot be judged so, and data made from templates shares long runs by nature.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from pipeline.data.split import normalised

WORDS = 13
_EXAMPLES = 5
_LONGEST = 300


class Row(Protocol):
    """What is looked at of a record."""

    @property
    def input(self) -> str:
        """The input as people read it."""

    @property
    def references(self) -> list[str]:
        """All good answers."""


def contamination(test: Sequence[Row], train: Sequence[Row]) -> dict[str, Any]:
    """Count what test repeats of train. Texts are compared without case, and with runs of blanks as one.

    Returns:
        `inputs_in_train`: test records whose input stands in train; `references_judged`: those with a reference of 13 words or more;
        `references_overlapping`: those of them with 13 words in a row that stand in a training input or target; `examples`: some of
        either, with `kind`, `input` and `shared`.
    """
    inputs = {normalised(row.input) for row in train}
    runs = [dict.fromkeys(run for text in row.references for run in _runs(text)) for row in test]
    # What is looked for is kept, not what is searched: test splits are small, training splits need not be.
    wanted = {run for own in runs for run in own}
    found = {run for row in train for text in (row.input, *row.references) for run in _runs(text) if run in wanted}
    repeated = [row for row in test if normalised(row.input) in inputs]
    overlapping = [(row, run) for row, own in zip(test, runs, strict=True) if (run := next((r for r in own if r in found), None))]
    return {
        "words": WORDS,
        "inputs_in_train": len(repeated),
        "references_judged": sum(map(bool, runs)),
        "references_overlapping": len(overlapping),
        "examples": [
            *({"kind": "input", "input": row.input[:_LONGEST], "shared": row.input[:_LONGEST]} for row in repeated[:_EXAMPLES]),
            *(
                {"kind": "reference", "input": row.input[:_LONGEST], "shared": " ".join(run)}
                for row, run in overlapping[:_EXAMPLES]
            ),
        ],
    }


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = normalised(text).split()
    return (tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
