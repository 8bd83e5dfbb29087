"""One run at a time for one customer: two that work on the same folders would do everything twice and write over one another.

In: the home folder and customers. Out: those that another run is at work on. One file holds a lock for every customer, on one byte each, which
the system releases however the process ends. A run holds the byte of each task for itself, and shares that of the task's customer with runs of its
other tasks; who removes a customer holds the customer's alone, so that no task can begin of which there is no trace yet.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.home import Home
from pipeline.keys import CustomerKey

# Never closed: POSIX drops all locks that a process has on a file as soon as it closes any descriptor of it.
_files: dict[Path, int] = {}
# Such locks do not tell the threads of one process apart.
_held: set[tuple[Path, int]] = set()
_shared: Counter[tuple[Path, int]] = Counter()
_guard = threading.Lock()


@contextlib.contextmanager
def holding(home: Home, keys: Iterable[CustomerKey], kind: str = "customers") -> Iterator[set[CustomerKey]]:
    """Hold the locks of customers meanwhile; yields those that somebody else holds.

    Args:
        home: where the locks are.
        keys: whose locks.
        kind: `customers` is held by a run, `jobs` by a job of one while it is under way, which may be on another machine and outlive the run.

    Raises:
        StorageError: the lock file cannot be written.
    """
    path = home.root / "locks" / kind
    with contextlib.ExitStack() as stack:
        busy = set()
        for key in keys:
            whole = _locked(path, _place(key.customer), shared=True)
            if not (stack.enter_context(whole) and stack.enter_context(_locked(path, _place(f"{key.customer}/{key.task}")))):
                busy.add(key)
        yield busy


@contextlib.contextmanager
def holding_all_of(home: Home, customer: str) -> Iterator[bool]:
    """Hold all tasks of a customer meanwhile, also those of which there is nothing yet; yields whether no run and no job holds one.

    Raises:
        StorageError: the lock file cannot be written.
    """
    # A job on another machine may outlive the run that asked for it.
    locks = home.root / "locks"
    with _locked(locks / "customers", _place(customer)) as run, _locked(locks / "jobs", _place(customer)) as job:
        yield run and job


@contextlib.contextmanager
def _locked(path: Path, place: int, *, shared: bool = False) -> Iterator[bool]:
    try:
        with _guard:
            got = _acquire(path, place, shared)
    except OSError as error:
        raise StorageError(f"{path}: cannot be locked ({error.strerror}). Check PREFIXFLEET_HOME and its permissions.") from error
    try:
        yield got
    finally:
        with _guard:
            if got and shared:
                _shared[path, place] -= 1
            elif got:
                _held.discard((path, place))
            if got and not _shared[path, place]:
                del _shared[path, place]
                fcntl.lockf(_files[path], fcntl.LOCK_UN, 1, place)


def _place(name: str) -> int:
    """The byte that stands for a customer or a task; 62 bits, since a file's positions have 63."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 2


def _acquire(path: Path, place: int, shared: bool) -> bool:
    if (path, place) in _held or (not shared and _shared[path, place]):
        return False
    if path not in _files:
        path.parent.mkdir(parents=True, exist_ok=True)
        _files[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(_files[path], (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    if shared:
        _shared[path, place] += 1
    else:
        _held.add((path, place))
    return True
