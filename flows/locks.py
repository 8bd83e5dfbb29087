"""One run at a time for one customer: two that work on the same folders would do everything twice and write over one another.

In: the home folder and customers. Out: those that another run is at work on. One file holds a lock for every customer, on one byte each, which
the system releases however the process ends.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.home import Home
from pipeline.keys import CustomerKey

# Never closed: POSIX drops all locks that a process has on a file as soon as it closes any descriptor of it.
_files: dict[Path, int] = {}
# Such locks do not tell the threads of one process apart.
_held: set[tuple[Path, int]] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def holding(home: Home, keys: Iterable[CustomerKey]) -> Iterator[set[CustomerKey]]:
    """Hold the locks of customers meanwhile; yields those that somebody else holds.

    Raises:
        StorageError: the lock file cannot be written.
    """
    path = home.root / "locks" / "customers"
    mine: list[int] = []
    busy = set()
    try:
        try:
            with _guard:
                for key in keys:
                    place = _place(key)
                    if _acquire(path, place):
                        mine.append(place)
                    else:
                        busy.add(key)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be locked ({error.strerror}). Check PREFIXFLEET_HOME and its permissions."
            ) from error
        yield busy
    finally:
        with _guard:
            for place in mine:
                _held.discard((path, place))
                fcntl.lockf(_files[path], fcntl.LOCK_UN, 1, place)


def _place(key: CustomerKey) -> int:
    """The byte that stands for a customer; 62 bits, since a file's positions have 63."""
    return int.from_bytes(hashlib.sha256(f"{key.customer}/{key.task}".encode()).digest()[:8], "big") >> 2


def _acquire(path: Path, place: int) -> bool:
    if (path, place) in _held:
        return False
    if path not in _files:
        path.parent.mkdir(parents=True, exist_ok=True)
        _files[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(_files[path], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    _held.add((path, place))
    return True
