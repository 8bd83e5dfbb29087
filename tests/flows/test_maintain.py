"""The flow `maintain` against a real MLflow store, with stages that take milliseconds: what goes, what stays, who is queued."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli, launch, locks, work
from flows.maintain_work import Upkeep, run_maintain
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.queued import is_queued, read_queued
from pipeline.registry import history, promote
from pipeline.registry.store import connect
from pipeline.training.job import read_job
from pipeline.training.results import write_result

from .conftest import without_prefect, write_rows
from .fake_stage import write_evaluation, write_prefix

pytestmark = pytest.mark.usefixtures("prefect_session", "stages")
ACME = CustomerKey("acme")
DAY = 86_400.0


class Stages:
    """Stands in for the children, in this process. Whoever is judged gets so many points; those who fail do so when they are judged."""

    points: float = 40.0
    fails: frozenset[str] = frozenset()

    def __call__(self, module: str, path: Path, _launch: Any, on_event: Any, log: Any) -> None:
        job, training = read_job(path), module == "pipeline.training"
        for customer in job.customers:
            reason = "the loss is NaN" if not training and customer.customer in self.fails else None
            if training:
                write_prefix(job, customer)
            elif reason is None:
                write_evaluation(customer, self.points)
            write_result(job, customer, "train" if training else "eval", 0.0, reason)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    made = Stages()
    monkeypatch.setattr(launch, "run_module", made)
    return made


def run(fleet_file: Path, lr: float | None = None) -> work.Outcome:
    if lr is not None:
        change(fleet_file, defaults={"training": {"lr": lr}})
    result = without_prefect(fleet_file)
    assert not result.failed, result
    return result


def change(fleet_file: Path, **content: Any) -> None:
    fleet_file.write_text(yaml.safe_dump({**yaml.safe_load(fleet_file.read_text("utf-8")), **content}), encoding="utf-8")


def maintain(fleet_file: Path, dry_run: bool = False) -> Upkeep:
    return run_maintain(fleet_file, logging.getLogger("test"), dry_run=dry_run)


def later(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Let `maintain` believe that so many days have passed."""
    real = time.time
    monkeypatch.setattr("flows.maintain_work.time.time", lambda: real() + days * DAY)


def files(home: Home) -> set[str]:
    """All files but those that looking alone changes."""
    changing = ("mlflow", "prefect", "locks", "cache")
    return {
        str(f.relative_to(home.root)) for f in home.root.rglob("*") if not f.relative_to(home.root).parts[0].startswith(changing)
    }


@pytest.fixture
def one(fleet_file: Path) -> Path:
    """A fleet of acme alone."""
    change(fleet_file, customers=[{"id": "acme", "data": "acme.jsonl"}])
    return fleet_file


def test_versions_beyond_the_rule_go_with_runs_and_files_and_those_in_use_stay(
    home: Home, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(one, retention={"versions": 1, "days": 30, "checkpoints_days": 7})
    for lr in (0.01, 0.02, 0.03, 0.04):
        run(one, lr)
    promote(ACME, 2)  # by hand: 4 is previous now
    client = connect()
    client.set_registered_model_alias(ACME.model_name, "canary", "1")
    # An ensemble names its members in a tag.
    client.set_model_version_tag(ACME.model_name, "4", "prefixfleet.ensemble", "probabilities of version 3, version 4")
    assert maintain(one).removed == [], "nothing is old"

    later(monkeypatch, 31)
    before, there = files(home), [v.version for v in history(ACME)]
    planned = maintain(one, dry_run=True)
    assert (files(home), [v.version for v in history(ACME)]) == (before, there), "a dry run changes nothing"
    # 4 is the newest, 2 is champion, 1 has an alias of somebody's, 3 is a member.
    assert [r.name for r in planned.removed if r.kind == "version"] == []
    client.delete_registered_model_alias(ACME.model_name, "canary")
    run_of_1 = client.get_model_version(ACME.model_name, "1").run_id
    done = maintain(one)
    assert [r.name for r in done.removed if r.kind == "version"] == ["acme version 1"] and not done.failed and not done.left
    assert [v.version for v in history(ACME)] == [4, 3, 2]
    with pytest.raises(Exception, match=run_of_1):
        client.get_run(run_of_1)
    assert not list((home.root / "mlartifacts").rglob(f"*{run_of_1}*"))
    kinds = {r.kind for r in done.removed}
    assert kinds == {"version", "checkpoint", "prefix", "evaluation"}
    champion = {p.name for p in home.root.glob("prefixes/acme/default/*")}
    tags = {v.version: v.fingerprint[:16] for v in history(ACME)}
    assert champion == {tags[2], tags[4]}, "the champion and what rollback goes back to, which is the newest"
    assert run(one).rows[0].status == "unchanged", "what the settings ask for now is there yet"
    again = maintain(one)
    assert again.removed == [] and again.left == []


def test_runs_of_which_no_version_was_made_go_and_those_of_a_waiting_prefix_stay(
    home: Home, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.registry.store import experiment_id

    run(one)
    client, experiment = connect(), experiment_id(home=home)
    tags = {"prefixfleet.customer": "acme", "prefixfleet.task": "default"}

    def made(name: str, **more: str) -> str:
        number = client.create_run(experiment, run_name=name, tags={**tags, **more}).info.run_id
        client.set_terminated(number)
        return str(number)

    lost, hidden = made("lost"), made("hidden")

    def of_job(name: str, home: str) -> str:
        told = {"prefixfleet.job": name, "prefixfleet.home": home}
        return str(client.create_run(experiment, run_name=f"job {name}", tags=told).info.run_id)

    # Killed, so that MLflow calls it running.
    job, of_another_fleet = of_job("fleet-0123456789", home.identity()), of_job("fleet-eu-0123456789", home.identity())
    elsewhere = {of_job("fleet-0123456789", "other"), made("elsewhere", **{"prefixfleet.home": "other"})}
    client.delete_run(hidden)
    foreign = client.create_run(experiment, run_name="theirs", tags={"prefixfleet.customer": "somebody-else"}).info.run_id
    plain = client.create_run(experiment, run_name="plain").info.run_id
    of_version = history(ACME)[0].run_id
    (prefix,) = home.root.glob("prefixes/acme/default/*/prefix.json")
    waiting = made("waiting")
    prefix.write_text(json.dumps({**json.loads(prefix.read_text()), "run_id": waiting}))

    assert maintain(one).removed == []
    later(monkeypatch, 31)
    with monkeypatch.context() as over_http:  # where MLflow only hides what it deletes
        for module in ("erase", "retention"):
            over_http.setattr(f"pipeline.registry.{module}.database_of", lambda *_: None)
        done = maintain(one)
        assert [r for r in done.removed if r.kind == "run"] == []
        assert all("it is hidden" in line and "mlflow gc" in line for line in done.left) and len(done.left) == 2
        assert not [line for line in maintain(one).left if "hidden" in line], "it is said once"
    done = maintain(one)
    gone = {r.name.rpartition("(")[2].rstrip(")") for r in done.removed if r.kind == "run"}
    assert gone == {lost, hidden, job}
    left = {r.info.run_id for r in client.search_runs([experiment], run_view_type=3)}
    assert left == {foreign, plain, of_version, waiting, of_another_fleet, *elsewhere}


def test_files_of_customers_who_are_gone_go_but_not_those_of_another_fleet_in_the_same_home(
    home: Home, fleet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fleet_file)
    other = tmp_path / "other.yaml"
    content = yaml.safe_load(fleet_file.read_text("utf-8"))
    other.write_text(yaml.safe_dump({**content, "customers": content["customers"][2:]}), encoding="utf-8")
    assert maintain(other).removed == maintain(fleet_file).removed == []
    change(fleet_file, customers=content["customers"][:1])  # bolt is gone; crisp is in the other fleet
    abandoned = home.root / "prepared" / "acme" / ".default.x1y2.tmp"
    abandoned.mkdir()
    later(monkeypatch, 29)
    assert [r.kind for r in maintain(fleet_file).removed] == ["temporary"] and not abandoned.exists()
    later(monkeypatch, 31)
    done = maintain(fleet_file)
    assert {r.name for r in done.removed if r.kind == "data"} == {
        f"{room}/bolt/default{suffix}"
        for room, suffix in (("prepared", ""), ("prefixes", ""), ("evaluations", ""), ("registered", ".json"))
    }
    assert not list(home.root.glob("p*/bolt/default")) and len(list(home.root.glob("p*/crisp/default"))) == 2
    assert history(CustomerKey("bolt")), "what is registered serves on"
    assert run(fleet_file).rows[0].status == "unchanged"


def test_nothing_of_a_customer_on_whom_a_run_is_at_work_is_removed(
    home: Home, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(one)
    later(monkeypatch, 31)
    before = {p for p in files(home) if p.startswith(("prefixes", "evaluations", "jobs"))}
    held = (
        "from flows import locks; from pipeline.home import Home; from pipeline.keys import CustomerKey\n"
        "for kind in ('customers', 'jobs'):\n"
        "    with locks.holding(Home.current(), [CustomerKey('acme')], kind): print(kind, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    ) as elsewhere:
        assert elsewhere.stdout is not None and elsewhere.stdin is not None
        for kind in (b"customers\n", b"jobs\n"):
            assert elsewhere.stdout.readline() == kind
            done = maintain(one)
            elsewhere.stdin.write(b"\n")
            elsewhere.stdin.flush()
            assert done.removed == [] and len(done.left) == 1 and all("a run is at work" in line for line in done.left)
    assert {p for p in files(home) if p.startswith(("prefixes", "evaluations", "jobs"))} == before
    assert {r.kind for r in maintain(one).removed} == {"checkpoint"}


def test_a_prefix_left_behind_while_mlflow_was_away_is_registered(home: Home, one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.fleet import fleet
    from pipeline.errors import RegistryError

    def away(*_: Any) -> None:
        raise RegistryError("MLflow does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(work, "register", away)
        fleet(one, None, return_state=True)
    assert maintain(one, dry_run=True).registered == {"acme": None}
    assert maintain(one).registered == {"acme": 1} and history(ACME)[0].aliases == ("champion",)
    assert maintain(one).registered == {}


def test_what_was_left_behind_is_not_registered_over_what_a_run_has_registered_meanwhile(
    home: Home, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(work, "register", lambda *_: 1 / 0)
        assert without_prefect(one).failed
    survey = work.survey

    def then_somebody_runs(todo: work.Work) -> None:
        survey(todo)
        assert todo.due[ACME] == ("register",)
        monkeypatch.setattr(work, "survey", survey)
        write_rows(one.parent / "acme.jsonl", "acme", 60)
        run(one)

    monkeypatch.setattr(work, "survey", then_somebody_runs)
    assert maintain(one).registered == {}
    assert [(v.version, v.aliases) for v in history(ACME)] == [(1, ("champion",))]


@pytest.fixture
def grown(home: Home, one: Path) -> Iterator[Path]:
    """Acme has a champion of 40 points, and 60 rows have arrived since."""
    change(one, defaults={"retrain": {"when": "drift", "min_rows": 20}})
    run(one)
    with (one.parent / "acme.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"input": f"name : new {i} | food : tea", "target": f"new {i} has tea."}) + "\n" for i in range(60)
        )
    yield one


def test_a_champion_that_does_worse_on_new_rows_is_queued_with_its_figures(
    home: Home, grown: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(home)
    (told,) = maintain(grown, dry_run=True).drift
    assert (told.status, told.rows) == ("to judge", 60) and files(home) == before

    stages.points = 30.0
    (drift,) = maintain(grown).drift
    assert (drift.status, drift.recorded, drift.now) == ("fallen", 40.0, 30.0) and drift.drop is not None
    # Two intervals of ± 1: that of the difference is ± √2.
    assert (drift.drop.low, drift.drop.high) == pytest.approx((10 - 2**0.5, 10 + 2**0.5), abs=1e-5)
    why = read_queued(home, ACME)
    assert why is not None and (why["reason"], why["metric"], why["rows"], why["now"]["score"]) == ("drift", "bleu", 60, 30.0)
    judged = [json.loads(p.read_text())["run_id"] for p in home.root.glob("drift/acme/default/prefixes/**/prefix.json")]
    assert judged == [None], "the run of the training is not told the scores on other rows"

    with monkeypatch.context() as patch:
        patch.setattr("flows.launch.run_module", lambda *_: pytest.fail("the same rows are not judged twice"))
        assert maintain(grown).drift[0].status == "fallen"
    stages.points = 40.0
    (row,) = run(grown).rows
    assert (row.status, row.why, row.version, row.rows_used) == ("done", "drift", 2, 90) and not is_queued(home, ACME)


def test_new_rows_alone_train_nobody_who_waits_for_drift_and_everything_else_does(home: Home, grown: Path) -> None:
    assert [row.status for row in run(grown).rows] == ["unchanged"], "60 rows have arrived, and nothing has fallen"
    change(grown, defaults={"retrain": "never"})
    assert [row.status for row in run(grown).rows] == ["unchanged"]
    change(grown, defaults={"retrain": "drift", "training": {"lr": 0.02}})
    (row,) = run(grown).rows
    assert (row.status, row.version, row.rows_used) == ("done", 2, 90), "new settings are a reason, and take the new rows along"
    with (grown.parent / "acme.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"input": "name : last | food : tea", "target": "last has tea."}) + "\n")
    change(grown, defaults={"retrain": "data", "training": {"lr": 0.02}})
    assert [row.why for row in run(grown).rows] == ["new data"]


def test_a_champion_that_holds_is_not_queued_and_few_rows_decide_nothing(
    home: Home, grown: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stages.points = 39.0  # within the intervals
    change(grown, customers=[{"id": name, "data": f"{name}.jsonl"} for name in ("acme", "bolt")], launch={"work_pool": "gpu"})
    held = []

    def judge(*args: Any) -> None:
        with locks.holding(home, [ACME, CustomerKey("bolt")]) as busy:
            held.append(set(busy))
        stages(*args)

    monkeypatch.setattr(launch, "run_module", judge)
    with caplog.at_level(logging.WARNING, "test"):
        (drift,) = maintain(grown).drift
    assert "champions runs on this machine and not on gpu" in caplog.text
    assert drift.status == "holds" and not is_queued(home, ACME)
    assert held == [{ACME}], "a run finds everybody free who is not judged"
    for settings in ({"when": "drift", "min_rows": 61}, {"when": "never", "min_rows": 20}):
        change(grown, defaults={"retrain": settings})
        assert maintain(grown).drift == []


def test_a_check_that_fails_is_one_customers_and_the_exit_status_says_so(
    home: Home, grown: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        monkeypatch.setenv("PREFECT_API_URL", str(client.api_url))  # or each command would start an API of its own
    stages.fails = frozenset({"acme"})
    assert cli.main(["maintain", str(grown), "--json"]) == 1
    said = capsys.readouterr()
    assert (
        json.loads(said.out)["drift"][0]["status"] == "failed"
        and "acme: its champion could not be judged: the loss is NaN" in said.err
    )
    stages.fails, stages.points = frozenset(), 30.0
    assert cli.main(["maintain", str(grown)]) == 0
    assert "fallen, queued" in capsys.readouterr().out
