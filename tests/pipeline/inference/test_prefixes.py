"""Prefixes in memory: within the budget, the least recently used let go, never one in use."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import BusyError, PrefixError
from pipeline.inference.prefixes import PrefixMemory
from pipeline.inference.request import Loaded, Members

SIZE = 1024


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    found = []
    for i in range(5):
        (tmp_path / f"p{i}").mkdir()
        (tmp_path / f"p{i}" / "prefix.safetensors").write_bytes(bytes(SIZE))
        found.append(tmp_path / f"p{i}")
    return found


def members(folder: Path) -> tuple[Members, dict[str, Any]]:
    half = torch.zeros(1, SIZE // 8, 1)
    return Members((Loaded({"decoder.self.0": (half, half.clone())}),)), {"folder": folder}


def test_the_least_recently_used_is_let_go_and_never_one_in_use(folders: list[Path]) -> None:
    memory = PrefixMemory(members, 3 * SIZE)
    held = memory.lease(folders[0])
    for folder in (*folders[1:3], folders[1], folders[3]):  # of 1 and 2, 2 was used longer ago
        memory.lease(folder).release()
    assert (memory.count, memory.bytes, memory.loads, memory.evictions) == (3, 3 * SIZE, 4, 1)
    memory.lease(folders[1]).release()
    assert memory.loads == 4
    memory.lease(folders[2]).release()
    assert memory.loads == 5
    memory.lease(folders[0]).release()
    assert memory.loads == 5 and held.config["folder"] == folders[0]


def test_when_all_is_in_use_whoever_comes_waits_and_then_is_told(folders: list[Path]) -> None:
    memory = PrefixMemory(members, 2 * SIZE)
    first, _ = memory.lease(folders[0]), memory.lease(folders[1])
    started = time.monotonic()
    with pytest.raises(BusyError, match="in use"):
        memory.lease(folders[2], patience=0.1)
    assert time.monotonic() - started >= 0.1
    threading.Timer(0.1, first.release).start()
    with memory.lease(folders[2], patience=10) as lease:
        assert lease.config["folder"] == folders[2]
    first.release()  # a second time does nothing
    assert memory.lease(folders[2]) is not None


def test_a_prefix_is_read_once_however_many_ask_at_once_and_an_error_is_everybodys_own(folders: list[Path]) -> None:
    calls: list[Path] = []

    def slow(folder: Path) -> tuple[Members, dict[str, Any]]:
        calls.append(folder)
        time.sleep(0.05)
        if folder == folders[1]:
            raise PrefixError("damaged")
        return members(folder)

    memory = PrefixMemory(slow, 2 * SIZE)
    leases: list[Any] = []

    def ask(folder: Path) -> None:
        try:
            leases.append(memory.lease(folder))
        except PrefixError as error:
            leases.append(error)

    threads = [threading.Thread(target=ask, args=(folders[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.count(folders[0]) == 1
    assert sum(isinstance(lease, PrefixError) for lease in leases) == 4
    assert memory.count == 1


def test_what_can_never_fit_is_refused_at_once(folders: list[Path]) -> None:
    with pytest.raises(PrefixError, match=r"1,024 bytes.*1,023"):
        PrefixMemory(members, SIZE - 1).lease(folders[0], patience=60)
    with pytest.raises(PrefixError, match="cannot be read"):
        PrefixMemory(members, SIZE).lease(folders[0] / "nowhere")


def test_the_copies_of_what_is_in_use_count(folders: list[Path]) -> None:
    """As if there were a copy of each, as wide as the widest."""
    memory = PrefixMemory(members, 5 * SIZE, lambda prefixes: SIZE * len(prefixes))
    for folder in folders:
        memory.lease(folder).release()
    assert (memory.count, memory.bytes, memory.evictions) == (4, 4 * SIZE, 1)  # four, and the copy of the one in use
    first = memory.lease(folders[4])
    assert memory.bytes == 5 * SIZE
    second = memory.lease(folders[3])  # in memory already, and its copy takes the place of an idle one
    assert (memory.count, memory.bytes, memory.evictions) == (3, 5 * SIZE, 2)
    with pytest.raises(BusyError):
        memory.lease(folders[0])
    again = memory.lease(folders[4])
    for lease in (first, second, again):
        lease.release()
    assert memory.bytes == memory.count * SIZE
    with pytest.raises(PrefixError, match=f"takes {2 * SIZE:,} bytes in use"):
        PrefixMemory(members, 2 * SIZE - 1, lambda prefixes: SIZE * len(prefixes)).lease(folders[0], patience=60)
