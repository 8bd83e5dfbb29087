"""What a person sees."""

import io
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import display
from flows.work import Outcome, Row
from pipeline.keys import CustomerKey
from pipeline.registry import ModelStatus

IDS = ["acme", "a-customer-with-a-rather-long-name", "x" * 63, "chain-of-restaurants/menu"]


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def printed(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


def row(key: str, **changes: Any) -> Row:
    known: dict[str, Any] = {
        "rows_used": 12345,
        "quarantined": 678,
        "metric": "rougeL",
        "base_score": 12.3,
        "score": {"score": 45.6, "low": 43.2, "high": 47.8},
        "version": 12,
        "alias": "champion",
        "seconds": 123.4,
    }
    return Row(key, **{**known, **changes})


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("ids", [IDS, IDS[:1]], ids=["long", "short"])
def test_ids_scores_and_aliases_are_whole_at_any_width(width: int, ids: list[str]) -> None:
    on = console(width)
    display.fleet_table([row(key) for key in ids], on)
    text = printed(on)
    assert "…" not in text
    for word in (*ids, "12,345", "678", "rougeL", "12.3", "45.6", "(43.2 to 47.8)", "123.4"):
        assert word in text
    assert text.count("champion") == len(ids) and text.count("(43.2 to 47.8)") == len(ids)


@pytest.mark.parametrize("width", [80, 200])
def test_table_of_customers_with_usual_names_fits_the_terminal(width: int) -> None:
    on = console(width)
    display.fleet_table([row("harbour-pilots"), row("bistro", score=None)], on)
    assert max(len(line.rstrip()) for line in printed(on).splitlines()) <= width


@pytest.mark.parametrize("width", [80, 200])
def test_status_shows_ids_and_scores_whole(width: int) -> None:
    scores, base = {"bleu": 45.61, "rougeL": 50.0, "exact_match": 3.0}, {"bleu": 12.31, "rougeL": 20.0, "exact_match": 0.0}
    models = [
        ModelStatus(CustomerKey.parse(key), "n", 12, 11, scores, base, "promote", datetime.now(UTC), "f" * 64, None)
        for key in IDS
    ]
    on = console(width)
    display.status_table(models, on)
    assert "…" not in printed(on)
    for word in (*IDS, "bleu 45.6 (12.3)", "exact_match 3.0 (0.0)", "promote"):
        assert word in printed(on)


def test_inputs_that_stand_in_two_splits_are_told() -> None:
    on = console(200)
    display.fleet_table([row("acme", overlap={"train/test": 1200}), row("bolt")], on)
    assert "acme has inputs that stand in two splits: 1,200 in train and test" in printed(on) and "bolt has" not in printed(on)


FLEET = {
    "stage": "train", "done": 120, "total": 1000, "unit": "steps", "customers": {"resident": 3, "queued": 5, "done": 2, "failed": 1},
    "tokens_per_second": 8123.4, "losses": {f"c{i}": 2.0 + i / 10 for i in range(6)},
}  # fmt: skip


def test_the_whole_fleet_is_shown_under_the_bar_of_a_terminal_and_in_plain_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "3 resident, 5 queued, 2 done, 1 failed  8,123 tokens/s  loss c0 2.00, c1 2.10, c2 2.20, c3 2.30, … 2 more"
    with display.Display() as plain:
        plain.event({**FLEET, "done": 0})
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        plain.event(FLEET)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"train: 120/1000 steps  about 7:20 left  {told}"
    monkeypatch.undo()
    with display.Display() as drawn:
        drawn.console = Console(file=io.StringIO(), width=80, force_terminal=True)
        bars = display._Bars(*display._COLUMNS, console=drawn.console)
        drawn._progress = bars
        drawn.event(FLEET)
        drawn.console.print(*bars.get_renderables())
        assert "120/1000" in printed(drawn.console) and "3 resident, 5 queued, 2 done, 1 failed  8,123 tokens/s" in printed(
            drawn.console
        )


def test_failure_that_is_told_twice_is_shown_once() -> None:
    shown = display.Display(bars=False)
    shown.console = console(200)
    failed = {"stage": "train", "customer": "acme", "status": "failed", "text": "the loss is NaN"}
    for event in (failed, failed, {**failed, "customer": "bolt"}, {**failed, "text": "something else"}):
        shown.event(event)
    assert printed(shown.console).splitlines() == [
        "train acme: failed: the loss is NaN",
        "train bolt: failed: the loss is NaN",
        "train acme: failed: something else",
    ]


@pytest.mark.parametrize("text", ["--help me", "-1 degrees", "an 'ordinary' one", "plain"])
def test_next_command_is_parsed_as_it_is_meant(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.data
    from flows.cli import _parser
    from pipeline.data.records import Record

    monkeypatch.setattr(pipeline.data, "read_split", lambda folder, split: [Record([1], [2], text, ["x"], {})])
    command = display.next_command(Outcome("fleet", [row("acme")], {}, None, tmp_path))
    if "'" in text:
        assert command is None
    else:
        assert command is not None and _parser().parse_args(shlex.split(command)[1:]).input == text
