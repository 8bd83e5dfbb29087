"""Which split an input belongs to, decided by its content alone.

So the same input is in the same split whatever the order of the rows or the neighbours, and no input stands in two splits.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

SHARE = 0.1


def normalised(text: str) -> str:
    """`text` for comparison: NFKC, case folded, runs of white space as one space. Inputs that differ only in these are the same
    input."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def assign_splits(inputs: Iterable[str], cut: list[str]) -> dict[str, str]:
    """Assign every distinct normalised input to `train` or one of the splits to `cut` (`test`, `dev`).

    The rule: u = the first 8 bytes of SHA-256 of the input, over 2^64, is uniform in [0, 1). The first split of `cut` gets
    u < 0.1, the second 0.1 <= u < 0.2, train the rest. A split that would stay empty gets the input with the next greater u, and
    train keeps the input with the greatest u, whatever it is. So with at least `len(cut) + 1` distinct inputs no split is empty,
    and row order plays no part.

    Args:
        inputs: normalised inputs, in any order, repeated or not.
        cut: the splits that are to be cut, none to two.

    Returns:
        Input to split. With fewer than `len(cut) + 1` distinct inputs some split gets none: the caller reports that.
    """
    ordered = sorted((_uniform(text), text) for text in set(inputs))
    assigned, start = {}, 0
    for number, split in enumerate(cut, 1):
        end = sum(u < SHARE * number for u, _ in ordered)
        # One input at least; and one left over for every split still to come and for train.
        end = min(max(end, start + 1), len(ordered) - (len(cut) - number + 1))
        assigned.update({text: split for _, text in ordered[start:end]})
        start = max(start, end)
    assigned.update({text: "train" for _, text in ordered[start:]})
    return assigned


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
