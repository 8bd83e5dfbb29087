"""Which prefixes are in memory: loaded on first use, kept within a budget, the least recently used let go first.

In: folders of prefixes. Out: leases; what is leased stays. Thread-safe. Knows nothing of the registry, requests or HTTP.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import BusyError, PrefixError
from pipeline.inference.request import Loaded, Members


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


def _no_copies(prefixes: Sequence[Loaded]) -> int:
    return 0


@dataclass
class PrefixMemory:
    """Prefixes in memory.

    Args:
        load: reads a folder, as `PrefixEngine.load` does.
        budget: bytes that all prefixes may take together, with the copies that running rows read.
        copies: bytes of the copies of the prefixes that are in use, such as `Decoder.bank_bytes`.

    Attributes:
        loads, evictions: how often a prefix was read, and let go to make room.
    """

    load: Callable[[Path], tuple[Members, dict[str, Any]]]
    budget: int
    copies: Callable[[Sequence[Loaded]], int] = _no_copies
    loads: int = 0
    evictions: int = 0
    _entries: OrderedDict[Path, _Entry] = field(default_factory=OrderedDict)  # the least recently used first
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def bytes(self) -> int:
        """What the prefixes in memory take, with the copies of those in use."""
        with self._changed:
            return self._held() + self._copies([entry for entry in self._entries.values() if entry.users])

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
                if entry is None:
                    needed = _size(folder)
                    self._check_size(folder, needed)
                    if self._make_room(needed, None):
                        entry = self._entries[folder] = _Entry(needed, users=1)
                        self._load(folder, entry)
                        continue
                elif entry.content is None:
                    self._changed.wait()  # another thread is reading it, which does not take long
                    continue
                else:
                    self._check_size(folder, entry.bytes + self._copies([entry]))
                    if self._make_room(0, entry):
                        entry.users += 1
                        self._entries.move_to_end(folder)
                        return self._leased(entry)
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise BusyError(
                        f"all {self.budget:,} bytes for prefixes are in use by answers under way. Try again, or give the service more "
                        "memory for prefixes."
                    )

    def _load(self, folder: Path, entry: _Entry) -> None:
        """Read a prefix, without holding the lock meanwhile; then it is in memory, and nobody uses it."""
        self._changed.release()
        content = None
        try:
            content = self.load(folder)
        finally:
            self._changed.acquire()
            if content is None:
                del self._entries[folder]
            else:
                entry.content, entry.bytes, entry.users = content, content[0].bytes, 0
                self.loads += 1
            self._changed.notify_all()

    def _check_size(self, folder: Path, needed: int) -> None:
        if needed > self.budget:
            raise PrefixError(
                f"{folder}: the prefix takes {needed:,} bytes in use and all prefixes together may take {self.budget:,}. "
                "Give the service more memory for prefixes."
            )

    def _leased(self, entry: _Entry) -> Lease:
        assert entry.content is not None

        def release() -> None:
            with self._changed:
                entry.users -= 1
                self._changed.notify_all()

        return Lease(*entry.content, release)

    def _make_room(self, needed: int, joining: _Entry | None) -> bool:
        """Let go what nobody uses, the least recently used first, if that makes room for `needed` bytes and one more prefix in use."""
        idle = [(folder, entry) for folder, entry in self._entries.items() if not entry.users and entry is not joining]
        using = [entry for entry in self._entries.values() if entry.users]
        if joining is not None and not joining.users:
            using.append(joining)
        needed += self._copies(using)
        if self._held() - sum(entry.bytes for _, entry in idle) + needed > self.budget:
            return False
        for folder, _ in idle:
            if self._held() + needed <= self.budget:
                break
            del self._entries[folder]
            self.evictions += 1
        return True

    def _held(self) -> int:
        return sum(entry.bytes for entry in self._entries.values())

    def _copies(self, using: Sequence[_Entry]) -> int:
        prefixes = [prefix for entry in using if entry.content is not None for prefix in entry.content[0].prefixes]
        return self.copies(prefixes) if prefixes else 0


def _size(folder: Path) -> int:
    """What its tensors will take at most."""
    try:
        return (folder / "prefix.safetensors").stat().st_size
    except OSError as error:
        raise PrefixError(
            f"{folder / 'prefix.safetensors'}: cannot be read ({error.strerror}). Train or download it again."
        ) from error
