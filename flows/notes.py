"""Notes on disk about customers that outlive a run: when one with an hour of its own was last looked at, and who was asked to be trained again
although nothing had changed.

In: the home folder and a customer. Out: small JSON files, `looked/` and `again/` `<customer>/<task>.json`. Knows nothing of what is due.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config import Customer
from pipeline.errors import PrefixFleetError
from pipeline.files import read_json, write_json
from pipeline.home import Home
from pipeline.keys import CustomerKey


def _note(home: Home, kind: str, key: CustomerKey) -> Path:
    return key.below(home.root, kind).with_suffix(".json")


def _read(home: Home, kind: str, key: CustomerKey) -> dict[str, Any] | None:
    try:
        return read_json(_note(home, kind, key), 1)
    except PrefixFleetError:  # none, or damaged: as good as none
        return None


def hour_to_come(home: Home, customer: Customer, now: datetime) -> datetime | None:
    """When a customer with an hour of its own is to be looked at, if that is later than `now` (aware).

    An hour that passed while nobody looked counts, and so does never having been looked at.
    """
    if customer.schedule is None:
        return None
    note = _read(home, "looked", customer.key)
    try:
        last = None if note is None else datetime.fromisoformat(note["at"])
    except (KeyError, TypeError, ValueError):
        last = None
    if last is None or last > now:  # of a clock that was wrong
        return None
    due = customer.schedule.next_after(last)
    return due if due > now else None


def looked(home: Home, customer: Customer, at: datetime) -> None:
    """Note that a run that began at `at` (aware) has looked at a customer and left nothing undone.

    Raises:
        StorageError: the note cannot be written.
    """
    # While no hour has passed since the last note, that says the same.
    if customer.schedule is not None and hour_to_come(home, customer, at) is None:
        write_json(_note(home, "looked", customer.key), {"format": 1, "at": at.astimezone(UTC).isoformat()})


def times_again(home: Home, key: CustomerKey) -> int:
    """How often a customer was asked to be trained again although nothing had changed: part of what its prefix is a function of."""
    note = _read(home, "again", key)
    return int(note["times"]) if note is not None and isinstance(note.get("times"), int) else 0


def ask_again(home: Home, key: CustomerKey, run: str) -> None:
    """Have a customer trained again, once for each `run`, however often that is started.

    Raises:
        StorageError: the note cannot be written.
    """
    note = _read(home, "again", key)
    if note is None or note.get("run") != run:
        write_json(_note(home, "again", key), {"format": 1, "times": times_again(home, key) + 1, "run": run})
