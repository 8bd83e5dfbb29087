"""What is to be removed, before it is: a plan that can be shown, and carried out piece by piece under the locks of those whom it concerns."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.home import Home
from pipeline.keys import CustomerKey


@dataclass(frozen=True)
class Removal:
    """One thing that nobody needs any more.

    Attributes:
        kind: `run`, `version`, `checkpoint`, `prefix`, `evaluation`, `data` or `temporary`.
        name: what it is, in words.
        why: the reason.
        keys: whose it is; whoever is at work on one of them may need it, so it is left then.
        home: in which these are locked.
        remove: does it; returns what is left and why, or None.
        size: in bytes, where it is known.
    """

    kind: str
    name: str
    why: str
    keys: frozenset[CustomerKey]
    home: Home
    remove: Callable[[], str | None] = field(repr=False, compare=False)
    size: int | None = None
