"""Jobs that crash, and why customers are due: the fleet flow with stages in this process."""

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from flows import jobs, launch, locks, notes, work
from flows.work import Outcome
from pipeline.errors import ConfigError, PrefixFleetError
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.queued import queue, read_queued
from pipeline.training.job import read_job
from pipeline.training.results import write_result

from .conftest import without_prefect, write_rows
from .fake_stage import write_evaluation, write_prefix

pytestmark = pytest.mark.usefixtures("prefect_session")


class Stages:
    """Stands in for the children: what was launched, and whose presence makes a process crash."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, list[str]]] = []
        self.crashes: set[tuple[str, str]] = set()

    def __call__(self, module: str, path: Path, _launch: Any, on_event: Any, log: Any) -> None:
        stage, job = module.removeprefix("pipeline."), read_job(path)
        self.launched.append((stage, [str(customer.key) for customer in job.customers]))
        for customer in job.customers:
            if (stage, customer.customer) in self.crashes:
                raise launch.ProcessCrash(f"{module} was killed by SIGSEGV")
            if stage == "training":
                write_prefix(job, customer)
            else:
                write_evaluation(customer)
            write_result(job, customer, "train" if stage == "training" else "eval", 0.0)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    made = Stages()
    monkeypatch.setattr(launch, "run_module", made)
    return made


@pytest.fixture
def registers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of jobs alone: MLflow takes longer than all else."""
    monkeypatch.setattr(work, "register", lambda member, home: work.Registered(1, "champion", 0.0))


def write_fleet(folder: Path, base: Path, names: list[str], more: str = "", each: str = "") -> Path:
    for name in names:
        if not (folder / f"{name}.jsonl").exists():
            write_rows(folder / f"{name}.jsonl", name, 12)
    lines = "".join(f"  - {{id: {name}, data: {name}.jsonl{each}}}\n" for name in names)
    file = folder / "fleet.yaml"
    file.write_text(f"base_model: {{path: {base}}}\n{more}customers:\n{lines}", encoding="utf-8")
    return file


def run(file: Path, customers: list[str] | None = None, **more: Any) -> Outcome:
    from flows.fleet import fleet

    result = fleet(file, customers, **more, return_state=True).result(raise_on_failure=False)
    assert isinstance(result, Outcome), result
    return result


EIGHT = list("abcdefgh")


@pytest.mark.usefixtures("registers_at_once")
def test_a_job_that_crashes_is_tried_again_and_then_halved_until_the_customer_that_causes_it_is_alone(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    stages.crashes = {("training", "c"), ("evaluation", "g")}
    outcome = run(write_fleet(tmp_path, example_base, EIGHT))
    failed = {row.key: str(row.error) for row in outcome.failed}
    assert set(failed) == {"c", "g"} and all("SIGSEGV" in error for error in failed.values())
    assert [row.version for row in outcome.rows if row.key not in failed] == [1] * 6
    training = ["".join(who) for stage, who in stages.launched if stage == "training"]
    # a and b are through when c crashes. The whole twice, then halves once each, and who is alone twice.
    assert training == ["abcdefgh", "cdefgh", "cde", "fgh", "c", "c", "de"]
    evaluation = ["".join(who) for stage, who in stages.launched if stage == "evaluation"]
    assert evaluation == ["abdefgh", "gh", "g", "g", "h"]
    # What is finished is kept, and who failed is tried again.
    stages.crashes, stages.launched = set(), []
    assert not run(tmp_path / "fleet.yaml").failed
    assert sorted(stages.launched) == [("evaluation", ["c", "g"]), ("training", ["c"])]


@pytest.mark.usefixtures("registers_at_once")
def test_those_due_are_cut_into_jobs_and_stay_in_theirs_until_they_are_through(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    file = write_fleet(tmp_path, example_base, EIGHT, "launch: {customers_per_job: 3}\n")
    stages.crashes = {("training", name) for name in EIGHT if name != "a"}
    run(file)
    folders = {
        name: where for where in home.root.glob("jobs/*/part.json") for name, _ in json.loads(where.read_text())["members"]
    }
    assert len(set(folders.values())) == 3
    stages.crashes, stages.launched = set(), []
    assert not run(file).failed
    trained = [who for stage, who in stages.launched if stage == "training"]
    assert sorted(len(who) for who in trained) == [2, 2, 3], "a was through before"
    assert all(len({folders[name] for name in who}) == 1 for who in trained), "each is where its checkpoint is"


def whys(file: Path, home: Home) -> dict[str, str]:
    todo = work.open_work(file, None, home)
    work.survey(todo)
    return {str(key): why for key, why in todo.why.items()}


def test_the_reason_for_which_a_customer_is_due_is_said(home: Home, tmp_path: Path, example_base: Path, stages: Stages) -> None:
    from prefect.client.orchestration import get_client

    file = write_fleet(tmp_path, example_base, ["a", "b"])
    assert whys(file, home) == {"a": "new", "b": "new"}
    assert [row.why for row in without_prefect(file).rows] == ["new", "new"]
    assert whys(file, home) == {} and [row.why for row in without_prefect(file).rows] == ["", ""]

    write_rows(tmp_path / "a.jsonl", "a", 20)
    assert whys(file, home) == {"a": "new data"}
    stages.crashes = {("evaluation", "a")}
    without_prefect(file, ["a"])
    assert whys(file, home) == {"a": "unfinished"}
    stages.crashes = set()
    without_prefect(file)

    write_fleet(tmp_path, example_base, ["a", "b"], "defaults: {training: {lr: 0.01}}\n")
    assert whys(file, home) == {"a": "new settings", "b": "new settings"}
    write_fleet(tmp_path, example_base, ["a", "b"], "defaults: {evaluation: {gate: {min_score: 1.0}}}\n")
    assert whys(file, home) == {"a": "new settings", "b": "new settings"}
    write_fleet(tmp_path, example_base, ["a", "b"])

    write_rows(tmp_path / "b.jsonl", "b", 20)
    lines = file.read_text(encoding="utf-8")
    file.write_text(lines + "defaults: {retrain: drift}\n", encoding="utf-8")
    assert whys(file, home) == {}
    queue(home, CustomerKey("b"), {"score": 3.0})
    assert whys(file, home) == {"b": "drift"}
    run(file)
    assert read_queued(home, CustomerKey("b")) is None and whys(file, home) == {}
    with get_client(sync_client=True) as client:
        newest = max(client.read_flow_runs(), key=lambda flow_run: flow_run.created)
    assert newest.name.startswith("fleet · ") and newest.name.endswith(" · 1 of 2 due")


def test_another_base_is_the_reason_where_the_base_has_changed(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    import shutil

    shutil.copytree(example_base, tmp_path / "base")
    file = write_fleet(tmp_path, tmp_path / "base", ["a"])
    without_prefect(file)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert whys(file, home) == {"a": "new base"}


def test_a_customer_is_trained_again_only_if_it_is_asked_for_and_then_once(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    from prefect.client.orchestration import get_client

    file = write_fleet(tmp_path, example_base, ["a", "b"])
    without_prefect(file)
    stages.launched = []
    assert [row.status for row in run(file, ["a"]).rows] == ["unchanged"] and stages.launched == []
    (row,) = run(file, ["a"], force=True).rows
    assert (row.status, row.why, row.version) == ("done", "asked for", 2) and stages.launched[0] == ("training", ["a"])
    with get_client(sync_client=True) as client:
        newest = max(client.read_flow_runs(), key=lambda flow_run: flow_run.created)
    assert newest.name.startswith("a · ") and newest.name.endswith(" · retrain (asked for)")
    stages.launched = []
    assert [row.status for row in without_prefect(file).rows] == ["unchanged", "unchanged"] and stages.launched == []
    with pytest.raises(ConfigError, match="name them"):
        from flows.fleet import fleet

        fleet(file, None, force=True)


def test_a_customer_with_an_hour_of_its_own_waits_for_it_and_a_missed_hour_is_caught_up(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    write_fleet(tmp_path, example_base, ["a", "b"])
    file = tmp_path / "fleet.yaml"
    file.write_text(file.read_text().replace("a.jsonl", "a.jsonl, schedule: 0 3 1 1 *"), encoding="utf-8")
    assert [row.status for row in without_prefect(file).rows] == ["done", "done"], "who was never looked at does not wait"
    write_rows(tmp_path / "a.jsonl", "a", 14)
    write_rows(tmp_path / "b.jsonl", "b", 14)
    rows = without_prefect(file).rows
    assert [(row.status, row.version) for row in rows] == [("waiting", None), ("done", 2)]
    assert rows[0].why.startswith("new data, at ") and "-01-01 03:00 UTC" in rows[0].why
    assert [row.status for row in without_prefect(file, ["a"]).rows] == ["done"], "asked for by name"
    write_rows(tmp_path / "a.jsonl", "a", 15)
    (customer,) = [one for one in work.open_work(file, None, home).customers if one.id == "a"]
    (home.root / "looked" / "a" / "default.json").unlink()
    notes.looked(home, customer, datetime.now(UTC) - timedelta(days=400))
    assert [row.status for row in without_prefect(file).rows] == ["done", "unchanged"], (
        "an hour has passed in which nobody looked"
    )


def test_the_customer_flow_takes_settings_for_one_run_and_refuses_what_no_fleet_file_could_say(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.customer import customer

    file = write_fleet(tmp_path, example_base, ["a", "b"])
    without_prefect(file)
    state = customer(file, "a", prefix={"length": 4}, training={"max_steps": 3}, return_state=True)  # type: ignore[arg-type]
    (row,) = state.result().rows
    assert (row.why, row.version) == ("new settings", 2)
    settings = read_job(max(home.root.glob("jobs/*/job.yaml"), key=lambda path: path.stat().st_mtime)).customers[0]
    assert (settings.prefix.length, settings.training.max_steps, settings.training.batch_size) == (4, 3, 10)
    schema = customer.parameters.model_dump()
    assert {"customer_id", "prefix", "training", "evaluation", "force"} <= set(schema["properties"])
    assert "length" in schema["definitions"]["PrefixSettings"]["properties"]
    for wrong in ({"customer_id": "../a"}, {"prefix": {"lenght": 3}}, {"training": {"lr": -1}}):
        with pytest.raises(ParameterTypeError):
            customer(file, **{"customer_id": "a", **wrong})  # type: ignore[arg-type]


def test_jobs_on_a_work_pool_need_a_server(home: Home, tmp_path: Path, example_base: Path, stages: Stages) -> None:
    from flows.fleet import fleet

    file = write_fleet(tmp_path, example_base, ["a"], "launch: {work_pool: gpu}\n")
    with pytest.raises(ConfigError, match="PREFECT_API_URL"):
        fleet(file)


def test_a_file_whose_time_was_set_back_after_a_change_is_seen_to_have_changed(
    home: Home, tmp_path: Path, example_base: Path
) -> None:
    import os

    from pipeline.data import prepared_card

    file = write_fleet(tmp_path, example_base, ["a"])
    todo = work.open_work(file, None, home)
    (customer,) = todo.customers
    data, folder = tmp_path / "a.jsonl", home.prepared(customer.key)
    work.prepare(customer, todo.base, home)
    before = data.stat()
    assert prepared_card(customer, todo.base, folder) is not None
    data.write_text(data.read_text().replace("soup", "stew"), encoding="utf-8")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data.stat().st_size == before.st_size and data.stat().st_mtime_ns == before.st_mtime_ns
    assert prepared_card(customer, todo.base, folder) is None


@pytest.mark.usefixtures("registers_at_once")
def test_two_fleet_files_of_one_name_have_jobs_and_pages_of_their_own(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("eu", "us"):
        (tmp_path / place).mkdir()
    eu, us = (write_fleet(tmp_path / place, example_base, [name]) for place, name in (("eu", "a"), ("us", "b")))
    waiting, pages = [us], []

    def meanwhile(module: str, path: Path, *rest: Any) -> None:
        if waiting:  # the child of eu takes seconds to start; us is run then
            pages.append(run(waiting.pop()).report)
        stages(module, path, *rest)

    monkeypatch.setattr(launch, "run_module", meanwhile)
    outcome = run(eu)
    assert not outcome.failed and [who for _, who in stages.launched] == [["b"], ["b"], ["a"], ["a"]]
    pages += [outcome.report, run(us).report]
    assert pages[0] == pages[2] != pages[1]
    assert [[one["key"] for one in json.loads(page.with_suffix(".json").read_text())["customers"]] for page in pages[:2]] == [
        ["b"],
        ["a"],
    ]
    # Names that differ in case alone are two as well.
    shop = write_fleet(tmp_path / "eu", example_base, ["a"], "name: Fleet\n")
    assert run(shop).report not in pages


@pytest.mark.usefixtures("registers_at_once")
def test_a_schedule_older_than_the_fleet_file_is_carried_out_for_those_who_are_left(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    from prefect import tags

    from flows.forget import forget

    file = write_fleet(tmp_path, example_base, ["a", "b"])
    forget("b", home)
    with tags("auto-scheduled"):  # as Prefect's scheduler
        rows = run(file, ["a/default", "b/default", "gone/default"]).rows
    assert [(row.key, row.status) for row in rows] == [("a", "done"), ("b", "forgotten"), ("gone/default", "failed")]
    assert "prefixfleet deploy" in str(rows[2].error)
    assert [row.status for row in run(file, ["b"]).rows] == ["failed"], "somebody asked for the forgotten by name"
    with pytest.raises(ConfigError, match="'gone' is not in the fleet file"):
        run_raising(file, ["gone"])


def run_raising(file: Path, customers: list[str]) -> None:
    from flows.fleet import fleet

    fleet(file, customers)


def test_asking_again_counts_only_where_the_training_begins(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    from flows.forget import forget

    file = write_fleet(tmp_path, example_base, ["a", "b"])
    forget("a", home)
    code = "from flows import locks; from pipeline.home import Home; from pipeline.keys import CustomerKey as K\n"
    code += "with locks.holding(Home.current(), [K('b')]): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        rows = run(file, ["a", "b"], force=True).rows
        other.communicate(b"\n")
    assert [row.status for row in rows] == ["failed", "failed"] and "another run is at work" in str(rows[1].error)
    assert not (home.root / "again").exists() and not list(home.root.glob("*/a")) and stages.launched == []


def test_nobody_is_forgotten_under_a_job_and_who_was_forgotten_leaves_it(
    home: Home, tmp_path: Path, example_base: Path, stages: Stages
) -> None:
    """A job on a work pool may outlive the run that asked for it."""
    from flows.forget import forget

    todo = work.open_work(write_fleet(tmp_path, example_base, ["a", "b"]), None, home)
    for customer in todo.customers:
        todo.due[customer.key] = jobs.STAGES
        todo.prepared(customer.key, work.prepare(customer, todo.base, home))
    (job,) = todo.plan()
    with locks.holding(home, [CustomerKey("a")], "jobs"), pytest.raises(PrefixFleetError, match="a run is at work on a"):
        forget("a", home)
    forget("a", home)
    work.run_job(job, "train", logging.getLogger("job"))
    assert stages.launched == [("training", ["b"])] and not list(home.root.glob("**/a/**/*"))


@pytest.mark.parametrize(("stopped", "cancelled_too"), [(RuntimeError, 0), (KeyboardInterrupt, 1)])
def test_jobs_on_a_pool_get_the_fleet_file_s_environment_and_end_with_their_run_and_what_it_found_under_way_only_if_it_is_cancelled(
    home: Home,
    tmp_path: Path,
    example_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: type[BaseException],
    cancelled_too: int,
) -> None:
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import Running

    from flows import dispatch

    more = "launch: {work_pool: gpu}\nwork_pools: {gpu: {}}\ndeploy: {env: {HF_HUB_OFFLINE: '1', PREFIXFLEET_HOME: /mnt/home}}\n"
    todo = work.open_work(write_fleet(tmp_path, example_base, ["a"], more), None, home)
    (customer,) = todo.customers
    todo.due[customer.key] = jobs.STAGES
    todo.prepared(customer.key, work.prepare(customer, todo.base, home))
    asked: list[dict[str, Any]] = []

    def run_deployment(name: str, **given: Any) -> SimpleNamespace:
        asked.append(given)
        return SimpleNamespace(id=uuid4())

    def sleep(_: float) -> None:
        raise stopped

    living: list[FlowRun] = []
    server = SimpleNamespace(read_flow_runs=lambda **_: list(living))
    cancelled: list[Any] = []
    monkeypatch.setattr(dispatch, "run_deployment", run_deployment)
    monkeypatch.setattr(dispatch, "cancel", cancelled.append)
    monkeypatch.setattr(dispatch, "get_run_logger", lambda: logging.getLogger("dispatch"))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        patch.setattr(dispatch, "get_client", lambda sync_client: contextlib.nullcontext(server))
        with pytest.raises(stopped):
            dispatch.work_through(todo, todo.plan(), lambda _: None)
        living.append(FlowRun(flow_id=uuid4(), name="of a run that was killed", state=Running()))
        with pytest.raises(stopped):
            dispatch.work_through(todo, todo.plan(), lambda _: None)
    assert len(asked) == 1, "what is under way is not asked for again"
    environment = asked[0]["job_variables"]["env"]
    assert (environment["HF_HUB_OFFLINE"], environment["PREFIXFLEET_HOME"]) == ("1", "/mnt/home")
    assert [len(runs) for runs in cancelled] == [1, cancelled_too]


def test_the_jobs_of_a_cancelled_run_are_all_found_however_many_have_ended() -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Completed, Running

    from flows import dispatch

    @flow(name="job-of-a-run", persist_result=False)
    def job() -> None: ...

    run = uuid4()
    with get_client(sync_client=True) as client:
        tags = [dispatch.TAG, dispatch.OF_RUN.format(run)]
        living = [client.create_flow_run(job, state=Running(), tags=tags).id for _ in range(3)]
        for _ in range(3):
            client.create_flow_run(job, state=Completed(), tags=tags)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flows.prefect_api._PAGE", 2)
            assert {one.id for one in dispatch._living_jobs(client, run)} == set(living)


@pytest.mark.slow
def test_a_flow_killed_at_any_point_goes_on_without_repeating_what_is_finished(
    ready_home: Home, tmp_path: Path, example_base: Path
) -> None:
    file, log = write_fleet(tmp_path, example_base, EIGHT, "launch: {customers_per_job: 3}\n"), tmp_path / "done.log"
    log.touch()
    command = [sys.executable, str(Path(__file__).with_name("fake_cli.py")), "run", str(file), "--json"]
    env = {**os.environ, "FAKE_STAGE": "train:slow,evaluate:slow", "FAKE_LOG": str(log)}
    seed = random.randrange(2**32)
    for least in sorted(random.Random(seed).sample(range(16), 3)):
        flow = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while flow.poll() is None and len(log.read_text().splitlines()) < least:
            time.sleep(0.02)
        time.sleep(random.Random(seed + least).random())
        flow.send_signal(signal.SIGKILL)
        flow.wait()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    rows = json.loads(done.stdout)["customers"]
    assert [(row["version"], row["alias"]) for row in rows] == [(1, "champion")] * 8, (seed, done.stderr)
    finished = log.read_text().splitlines()
    assert len(finished) == len(set(finished)) and len(finished) >= 13, (seed, finished)
