"""Several fleets in one home: who of whom is gone, by notes and by the fleet files themselves. No MLflow, no Prefect."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from flows import fleets, jobs
from pipeline.config import load_fleet
from pipeline.home import Home, identity_above
from pipeline.keys import CustomerKey
from pipeline.leftovers import remove_leftovers
from pipeline.stale import InUse, stale_files

ACME, BOLT, CRISP = map(CustomerKey, ("acme", "bolt", "crisp"))
DAY = 86_400.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    for key in (ACME, BOLT, CRISP):
        home.prepared(key).mkdir(parents=True)
    return home


def write(file: Path, like: Path, *names: str) -> Path:
    file.write_text(
        yaml.safe_dump(
            {**yaml.safe_load(like.read_text("utf-8")), "customers": [{"id": name, "data": f"{name}.jsonl"} for name in names]}
        ),
        encoding="utf-8",
    )
    return file


def noted(home: Home, file: Path) -> None:
    fleets.note(home, load_fleet(file), file, forgotten=())


def looked(home: Home, file: Path, days_later: float = 0.0) -> fleets.Neighbours:
    return fleets.neighbours(home, load_fleet(file), file, 30, time.time() + days_later * DAY)


def test_a_customer_who_moved_to_a_fleet_whose_note_is_older_is_not_gone(home: Home, fleet_file: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", fleet_file, "acme", "bolt")
    other = write(tmp_path / "other.yaml", fleet_file, "crisp")
    noted(home, own)
    noted(home, other)
    write(own, fleet_file, "acme")
    assert looked(home, own).gone == {BOLT}
    write(other, fleet_file, "crisp", "bolt")  # not run since
    assert looked(home, own).gone == set()
    other.write_text("customers: [", encoding="utf-8")  # somebody is at it: the note counts
    assert looked(home, own).gone == {BOLT}
    write(other, fleet_file, "acme")
    assert looked(home, own).shared == {ACME}


def test_who_left_stays_gone_however_often_the_fleet_runs_until_nothing_is_left(home: Home, fleet_file: Path) -> None:
    noted(home, fleet_file)
    write(fleet_file, fleet_file, "acme", "crisp")
    noted(home, fleet_file)
    noted(home, fleet_file)
    assert looked(home, fleet_file).gone == {BOLT}
    home.prepared(BOLT).rmdir()
    noted(home, fleet_file)
    assert looked(home, fleet_file).gone == set()


def test_the_note_of_a_fleet_file_that_is_not_there_ends_after_the_days_of_the_rule(
    home: Home, fleet_file: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.yaml", fleet_file, "bolt", "crisp")
    noted(home, other)
    renamed = other.rename(tmp_path / "renamed.yaml")
    write(renamed, fleet_file, "crisp")
    noted(home, renamed)
    write(fleet_file, fleet_file, "acme")
    assert looked(home, fleet_file, 29) == fleets.Neighbours(set(), set(), [])
    found = looked(home, fleet_file, 31)
    assert found.gone == {BOLT} and len(found.ended) == 1, "crisp is in the renamed file"


def test_forgetting_takes_a_customer_out_of_the_notes(home: Home, fleet_file: Path) -> None:
    noted(home, fleet_file)
    assert any("fleets" in line for line in remove_leftovers(home, "bolt"))
    (note,) = home.root.glob("fleets/*.json")
    assert json.loads(note.read_text("utf-8"))["customers"] == ["acme", "crisp"]
    fleets.note(home, load_fleet(fleet_file), fleet_file, forgotten=[BOLT])
    assert "bolt" not in note.read_text("utf-8")


def test_a_job_that_waits_is_that_of_those_whom_its_files_name(home: Home) -> None:
    for name, member in (("ours-0123456789", "acme"), ("theirs-0123456789", "zed")):
        folder = home.job(name)
        folder.mkdir(parents=True)
        (folder / "part.json").write_text(json.dumps({"format": 1, "members": [[member, "abc"]]}))
        half = home.job(f"{name}-01234567")  # of a job that was cut in two
        half.mkdir()
        (half / "job.yaml").write_text(yaml.safe_dump({"customers": [{"customer": member, "task": "default"}]}))
    home.job("nobody-0123456789").mkdir()
    later = time.time() + 8 * DAY
    found = {r.name: r.keys for r in stale_files(home, InUse({ACME: set()}, ()), 30, 7, later)}
    assert found == {"job ours-0123456789": {ACME}, "job ours-0123456789-01234567": {ACME}}


def test_prefixes_of_a_customer_whom_another_fleet_has_too_are_not_superseded(home: Home) -> None:
    place = home.prefix(ACME, "0" * 64)
    place.mkdir(parents=True)
    later = time.time() + 31 * DAY
    assert [r.kind for r in stale_files(home, InUse({ACME: {"1" * 64}}, ()), 30, 7, later)] == ["prefix"]
    assert list(stale_files(home, InUse({ACME: {"1" * 64}}, (), {ACME}), 30, 7, later)) == []


def test_a_fleet_knows_its_jobs_by_name_and_takes_no_other_fleets_for_its_own() -> None:
    ours = ("shop-0123456789", "shop-0123456789-3", "shop-0123456789-01234567", "shop-0123456789-3-01234567-89abcdef")
    assert all(jobs.is_of("Shop", name) for name in ours)
    assert not any(jobs.is_of("shop", name) for name in ("shop-eu-0123456789", "shop", "shop-0123", "workshop-0123456789"))


def test_a_home_has_one_identity_that_those_below_it_find(home: Home, tmp_path: Path) -> None:
    assert identity_above(home.job("any")) is None
    assert home.identity() == home.identity() == identity_above(home.sweep(ACME) / "jobs" / "any")
    assert home.identity() != Home(tmp_path / "second").identity() and os.listdir(tmp_path / "second") == ["identity"]
