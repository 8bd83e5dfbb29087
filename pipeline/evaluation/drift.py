"""Has a champion fallen? Its recorded score against that on rows which arrived since, two independent samples of records, each with its interval.

In: scores with 95 % intervals, as `scores` makes them. Out: the drop with its own. Knows nothing of how the scores were made.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Drop:
    """How much worse the score is now, in the metric's unit, positive where it is worse, and its 95 % interval."""

    drop: float
    low: float
    high: float


def drop_between(recorded: Mapping[str, float], now: Mapping[str, float], better: Literal["higher", "lower"]) -> Drop:
    """The drop from `recorded` to `now`, each `score`, `low` and `high`.

    The interval of a difference of two independent figures, recovered from their own intervals, which need not be symmetric (the method MOVER:
    Zou & Donner 2008, Statistics in Medicine 27, equation 2).
    """
    first, second = (recorded, now) if better == "higher" else (now, recorded)
    drop = first["score"] - second["score"]
    below = math.hypot(first["score"] - first["low"], second["high"] - second["score"])
    above = math.hypot(first["high"] - first["score"], second["score"] - second["low"])
    return Drop(round(drop, 6), round(drop - below, 6), round(drop + above, 6))
