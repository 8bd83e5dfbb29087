"""The registry's commands: what they move and show, and that a forgotten customer is gone from everywhere and not trained again."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from flows import cli, locks
from pipeline.home import Home
from pipeline.keys import CustomerKey

pytestmark = pytest.mark.usefixtures("fake_stages")
STAGES = ("prepare", "train", "evaluate", "register")


@pytest.fixture(autouse=True)
def _signals() -> Any:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def through(fleet_file: Path, *arguments: str) -> None:
    for stage in STAGES:
        assert cli.main([stage, str(fleet_file), *arguments]) == 0


def answer(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*command, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_versions_are_promoted_rolled_back_listed_and_compared(
    home: Home, fleet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    through(fleet_file, "--customer", "bolt")
    fleet_file.write_text(fleet_file.read_text() + "defaults: {training: {lr: 0.05}, prefix: {length: 7}}\n")
    through(fleet_file, "--customer", "bolt")
    bolt = ("--customer", "bolt")
    assert answer(capsys, "rollback", *bolt) == {
        "format": 1, "customer": "bolt", "name": "prefixfleet.bolt", "champion": 1, "before": 2, "previous": 2,
    }  # fmt: skip
    assert answer(capsys, "rollback", *bolt)["champion"] == 2  # there and back
    assert answer(capsys, "promote", *bolt, "--version", "1")["before"] == 2
    shown = answer(capsys, "status", *bolt)["customers"][0]
    assert (shown["champion_version"], shown["previous_version"], shown["challenger_version"]) == (1, 2, None)
    versions = answer(capsys, "history", *bolt)["versions"]
    assert [(v["version"], v["aliases"], v["champion_before"]) for v in versions] == [
        (2, ["previous"], 1),
        (1, ["champion"], None),
    ]
    assert versions[1]["promoted"].endswith("by hand") and versions[0]["promoted"].endswith("by rollback")
    found = answer(capsys, "diff", *bolt, "1", "previous")
    assert (found["old"], found["new"]) == (1, 2) and ["bleu", 40.0, 40.0] in found["scores"]
    assert answer(capsys, "diff", *bolt)["new"] == 2
    for command in (["history", *bolt], ["diff", *bolt], ["status"], ["promote", *bolt, "--version", "2"], ["rollback", *bolt]):
        assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "bolt version 2 is champion now, before it 1; version 1 is what `rollback` goes back to" in out
    assert "prefixfleet.bolt: version 1 against version 2" in out


def test_mistakes_get_a_sentence_and_a_status(home: Home, fleet_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    through(fleet_file, "--customer", "bolt")
    said = {
        ("promote", "--customer", "bolt"): (1, "there is no challenger"),
        ("promote", "--customer", "bolt", "--version", "9"): (1, "there is no version 9"),
        ("rollback", "--customer", "bolt", "--version", "9" * 30): (1, f"there is no version {'9' * 30}"),
        ("generate", "--customer", "bolt", "--alias", "latest", "--input", "x"): (1, "'latest' is no alias"),
        ("rollback", "--customer", "bolt"): (1, "nothing to go back to"),
        ("history", "--customer", "nobody"): (1, "no prefix is registered"),
        ("diff", "--customer", "bolt"): (2, "one version only"),
        ("diff", "--customer", "bolt", "1"): (2, "two versions or none"),
        ("diff", "--customer", "bolt", "1", "best"): (1, "no version holds the alias 'best'"),
        ("diff", "--customer", "bolt", "1", "9" * 5000): (1, "no version holds the alias '999"),
        ("status", "--customer", "bolt/menu"): (1, "bolt/menu: nothing is registered"),
        ("forget", "--customer", "bolt"): (2, "Confirm it with --yes"),
        ("forget", "--customer", "../x", "--yes"): (2, "is not valid"),
        ("forget", "--customer", "bolt/menu", "--yes"): (
            2,
            "takes a customer with all its tasks, so 'bolt/menu' is not valid: name 'bolt'",
        ),
    }
    for command, (status, words) in said.items():
        capsys.readouterr()
        assert cli.main(list(command)) == status and words in capsys.readouterr().err, command
    assert answer(capsys, "forget", "--customer", "bolt", "--lift")["lifted"] is False


def test_forgotten_customer_is_gone_reported_and_not_trained_until_that_is_lifted(
    home: Home, fleet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    through(fleet_file)
    done = answer(capsys, "forget", "--customer", "acme", "--yes")
    assert done["left"] == [] and "acme in reports/fleet.html" in done["removed"]
    # Words of acme's rows stand in its own source alone.
    assert not [f for f in home.root.rglob("*") if f.is_file() and b"acme serves soup" in f.read_bytes()]
    assert not list(home.root.glob("*/acme")) and not list(home.root.glob("jobs/*/acme"))

    assert cli.main(["run", str(fleet_file), "--dry-run"]) == 0
    assert "acme   forgotten\nbolt   nothing to do" in capsys.readouterr().out
    for stage in STAGES:
        rows = {row["key"]: row for row in answer(capsys, stage, str(fleet_file))["customers"]}
        assert {key: row["status"] for key, row in rows.items()} == {
            "acme": "forgotten",
            "bolt": "unchanged",
            "crisp": "unchanged",
        }
    assert not list(home.root.glob("*/acme")) and "acme" not in (home.root / "reports" / "fleet.html").read_text()
    assert cli.main(["status", "--customer", "acme/menu", "--customer", "nobody", "--customer", "bolt"]) == 1
    said = capsys.readouterr().err
    assert "customer acme: was forgotten on" in said and "nobody: nothing is registered" in said and "acme: nothing" not in said
    # Asked for by name, it is a failure that says how to lift it.
    assert cli.main(["prepare", str(fleet_file), "--customer", "acme"]) == 1
    assert "acme failed: customer acme: was forgotten on" in capsys.readouterr().out
    for command in ("compare", "sweep"):
        assert cli.main([command, str(fleet_file), "--customer", "acme"]) == 2
        assert "was forgotten on" in capsys.readouterr().err

    assert answer(capsys, "forget", "--customer", "acme", "--lift")["lifted"] is True
    through(fleet_file)
    assert answer(capsys, "status", "--customer", "acme")["customers"][0]["version"] == 1


def test_prefect_s_own_database_keeps_no_deleted_rows_in_free_pages(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Prefect itself deletes is tested in test_fleet.py.
    for name in ("flows.forget.prefect_api", "prefect.client.orchestration.get_client"):
        monkeypatch.setattr(name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("flows.forget.forget_in_prefect", lambda *_: [])
    monkeypatch.setattr("pipeline.leftovers._BUSY_SECONDS", 0.05)
    home.prefect.mkdir()
    file = home.prefect / "prefect.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.executescript("PRAGMA secure_delete = OFF; CREATE TABLE flow_run (parameters TEXT)")
        database.execute("INSERT INTO flow_run VALUES (?)", ("about acme " * 1000,))
        database.execute("DELETE FROM flow_run")
        assert b"about acme" in file.read_bytes()
        database.execute("BEGIN EXCLUSIVE")  # a run is at work
        assert cli.main(["forget", "--customer", "acme", "--yes"]) == 1
        assert "prefect.db: free pages may hold traces of deleted rows (database is locked)" in capsys.readouterr().err
        database.execute("ROLLBACK")
        monkeypatch.setenv("PREFECT_API_URL", "http://prefect.invalid/api")
        assert cli.main(["forget", "--customer", "acme", "--yes"]) == 0 and b"about acme" in file.read_bytes()
        monkeypatch.delenv("PREFECT_API_URL")
        assert cli.main(["forget", "--customer", "acme", "--yes"]) == 0 and b"about acme" not in file.read_bytes()


def test_customer_that_a_run_is_at_work_on_is_not_forgotten_under_it(
    home: Home, fleet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", str(fleet_file)]) == 0
    with locks.holding(home, [CustomerKey("bolt")]):
        assert cli.main(["forget", "--customer", "bolt", "--yes"]) == 1
    with locks.holding(home, [CustomerKey("bolt", "begun")]) as busy:  # a task of which there is no folder yet
        assert not busy and cli.main(["forget", "--customer", "bolt", "--yes"]) == 1
    with (
        locks.holding_all_of(home, "bolt") as alone,
        locks.holding(home, [CustomerKey("bolt", "begun"), CustomerKey("acme")]) as busy,
    ):
        assert alone and busy == {CustomerKey("bolt", "begun")}
    home.sweep(CustomerKey("bolt")).mkdir(parents=True)
    with locks.holding(Home(home.sweep(CustomerKey("bolt"))), [CustomerKey("bolt")]):
        assert cli.main(["forget", "--customer", "bolt", "--yes"]) == 1
    assert capsys.readouterr().err.count("a run is at work on bolt") == 3 and (home.root / "prepared" / "bolt").is_dir()
