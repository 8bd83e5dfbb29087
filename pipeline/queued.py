"""Customers whose champion has fallen and who wait for a new training: one small file each, below `PREFIXFLEET_HOME/queued`.

Written by the flow `maintain`, read by `fleet`, which takes whoever is queued and removes the file when the new prefix is registered.
"""

from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.files import read_json, write_json
from pipeline.home import Home
from pipeline.keys import CustomerKey

FORMAT = 1


def queued_file(home: Home, key: CustomerKey) -> Path:
    """Where the reason stands."""
    return key.below(home.root, "queued").with_suffix(".json")


def queue(home: Home, key: CustomerKey, why: dict[str, Any]) -> None:
    """Queue a customer, with the figures that are the reason.

    Raises:
        StorageError: the file cannot be written.
    """
    write_json(queued_file(home, key), {"format": FORMAT, "reason": "drift", **why})


def is_queued(home: Home, key: CustomerKey) -> bool:
    """Whether the customer waits for a new training."""
    return queued_file(home, key).is_file()


def read_queued(home: Home, key: CustomerKey) -> dict[str, Any] | None:
    """The figures, or None if the customer is not queued; a damaged file counts as a reason without figures."""
    try:
        return read_json(queued_file(home, key), FORMAT)
    except StorageError:
        return {} if is_queued(home, key) else None


def unqueue(home: Home, key: CustomerKey) -> None:
    """The customer was trained anew, or need not be.

    Raises:
        StorageError: the file cannot be deleted.
    """
    try:
        queued_file(home, key).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{queued_file(home, key)}: cannot be deleted ({error.strerror}). Check its permissions.") from error
