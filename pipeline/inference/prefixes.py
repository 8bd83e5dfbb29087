"""Which prefixes are in memory: loaded on first use, kept within a budget, the least recently used let go first.

In: folders of prefixes. Out: leases; what is leased stays. Thread-safe. Knows nothing of the registry, requests or HTTP.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import BusyError, PrefixError
from pipeline.inference.request import Members


@dataclass(eq=False)
class Lease:
    """A prefix that stays in memory until `release`.

    Attributes:
        members: what stands before rows.
        config: content of prefix.json.
    """

    members: Members
    config: dict[str, Any]
    _release: Callable[[], None]

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        release, self._release = self._release, _nothing
        release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _nothing() -> None:
    pass


@dataclass(eq=False)
class _Entry:
    bytes: int
    users: int = 0
    content: tuple[Members, dict[str, Any]] | None = None  # None while it is loaded


@dataclass
class PrefixMemory:
    """Prefixes in memory.

    Args:
        load: reads a folder, as `PrefixEngine.load` does.
        budget: bytes that all prefixes may take together.

    Attributes:
        loads, evictions: how often a prefix was read, and let go to make room.
    """

    load: Callable[[Path], tuple[Members, dict[str, Any]]]
    budget: int
    loads: int = 0
    evictions: int = 0
    _entries: OrderedDict[Path, _Entry] = field(default_factory=OrderedDict)  # the least recently used first
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def bytes(self) -> int:
        """What the prefixes in memory take."""
        with self._changed:
            return self._bytes()

    @property
    def count(self) -> int:
        """How many there are."""
        with self._changed:
            return len(self._entries)

    def lease(self, folder: Path, patience: float = 0.0) -> Lease:
        """The prefix in `folder`, loaded if it is not in memory.

        Args:
            folder: must not change while it is in memory.
            patience: seconds to wait for memory while all that is there is in use.

        Raises:
            BusyError: all memory for prefixes is in use.
            PrefixError: it is larger than the budget, damaged, or does not fit the base.
            BaseModelError: it was trained on another base.
        """
        deadline = time.monotonic() + patience
        with self._changed:
            while True:
                entry = self._entries.get(folder)
                if entry is not None and entry.content is None:
                    self._changed.wait()  # another thread is reading it, which does not take long
                    continue
                if entry is not None:
                    entry.users += 1
                    self._entries.move_to_end(folder)
                    return self._leased(entry)
                needed = _size(folder)
                if needed > self.budget:
                    raise PrefixError(
                        f"{folder}: the prefix takes {needed:,} bytes and all prefixes together may take {self.budget:,}. "
                        "Give the service more memory for prefixes."
                    )
                if self._make_room(needed):
                    entry = self._entries[folder] = _Entry(needed, users=1)
                    break
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise BusyError(
                        f"all {self.budget:,} bytes for prefixes are in use by answers under way. Try again, or give the service more "
                        "memory for prefixes."
                    )
        try:
            content = self.load(folder)
        except BaseException:
            with self._changed:
                del self._entries[folder]
                self._changed.notify_all()
            raise
        with self._changed:
            entry.content, entry.bytes = content, content[0].bytes
            self.loads += 1
            self._changed.notify_all()
            return self._leased(entry)

    def _leased(self, entry: _Entry) -> Lease:
        assert entry.content is not None

        def release() -> None:
            with self._changed:
                entry.users -= 1
                self._changed.notify_all()

        return Lease(*entry.content, release)

    def _make_room(self, needed: int) -> bool:
        """Let go what nobody uses, the least recently used first, if that makes room."""
        idle = [(folder, entry) for folder, entry in self._entries.items() if not entry.users]
        if self._bytes() - sum(entry.bytes for _, entry in idle) + needed > self.budget:
            return False
        for folder, _ in idle:
            if self._bytes() + needed <= self.budget:
                break
            del self._entries[folder]
            self.evictions += 1
        return True

    def _bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries.values())


def _size(folder: Path) -> int:
    """What its tensors will take at most."""
    try:
        return (folder / "prefix.safetensors").stat().st_size
    except OSError as error:
        raise PrefixError(
            f"{folder / 'prefix.safetensors'}: cannot be read ({error.strerror}). Train or download it again."
        ) from error
