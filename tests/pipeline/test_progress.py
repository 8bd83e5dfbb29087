"""What a stage says of its progress."""

import json
import time
from collections.abc import Callable

import pytest

from pipeline.progress import MARK, Progress, described, time_left


def test_a_fleet_is_told_in_one_line_with_so_many_losses_as_fit() -> None:
    info = {
        "customers": {"resident": 2, "queued": 1, "done": 0, "failed": 3},
        "tokens_per_second": 12345.6,
        "losses": {"acme": 2.125, "bistro/menu": 0.5, "c": 1.0},
        "other": 3,
    }
    told = described(info, most=2)
    assert told == "2 resident, 1 queued, 0 done, 3 failed  12,346 tokens/s  loss acme 2.12, bistro/menu 0.50, … 1 more  other 3"
    assert described({"losses": {}}) == ""


def test_time_left_goes_by_what_was_done_since_the_start() -> None:
    assert time_left(60.0, 30, 15) == "about 0:30 left"
    assert time_left(60.0, 1, 70) == "about 1:10:00 left"
    assert time_left(60.0, 0, 15) == time_left(60.0, 15, 0) == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def go_on(seconds: float) -> None:
        nonlocal now
        now += seconds

    return go_on


def test_plain_lines_come_every_five_seconds_and_steps_of_an_earlier_run_say_nothing_of_the_time_left(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFIXFLEET_PROGRESS", raising=False)
    with Progress("train", 100, "steps") as progress:
        progress.reach(50, skipped=50)
        for _ in range(6):
            clock(2.0)
            progress.update(5, losses={"acme": 1.5})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 0/100 steps"
    assert lines[1] == "train: 65/100 steps  about 0:14 left  loss acme 1.50"
    assert len(lines) == 3


def test_json_events_hold_the_numbers_themselves(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXFLEET_PROGRESS", "json")
    with Progress("train", 10, "steps") as progress:
        clock(1.0)
        progress.update(3, customers={"resident": 1}, losses={"acme": 1.5})
    last = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix(MARK))
    assert last == {
        "stage": "train",
        "done": 3,
        "total": 10,
        "unit": "steps",
        "customers": {"resident": 1},
        "losses": {"acme": 1.5},
    }
