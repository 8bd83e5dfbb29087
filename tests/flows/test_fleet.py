"""The flows against a real in-process Prefect API and a real MLflow store, with stages that take milliseconds."""

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import events, launch, locks
from flows.work import Outcome
from pipeline.errors import RegistryError
from pipeline.home import Home
from pipeline.keys import CustomerKey

pytestmark = pytest.mark.usefixtures("prefect_session", "fake_stages")


def run(fleet_file: Path, customers: list[str] | None = None) -> tuple[Any, Outcome]:
    from flows.fleet import fleet

    state = fleet(fleet_file, customers, return_state=True)
    result = state.result(raise_on_failure=False)
    assert isinstance(result, Outcome), result
    return state, result


def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules of the children that are started from now on."""
    started: list[str] = []
    real = launch.run_module

    def spy(module: str, *rest: Any) -> None:
        started.append(module)
        real(module, *rest)

    monkeypatch.setattr(launch, "run_module", spy)
    return started


def test_every_customer_is_prepared_trained_evaluated_and_registered_in_one_run(home: Home, fleet_file: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.logging.handlers import APILogWorker

    from pipeline.registry import lookup

    seen: list[dict[str, Any]] = []
    with events.listening(seen.append):
        state, outcome = run(fleet_file)
    assert state.is_completed()
    assert [(row.key, row.status, row.version, row.alias, row.rows_used) for row in outcome.rows] == [
        (name, "done", 1, "champion", 30) for name in ("acme", "bolt", "crisp")
    ]
    assert outcome.rows[0].score == {"score": 40.0, "low": 39.0, "high": 41.0} and outcome.rows[0].base_score == 5.0
    assert outcome.report is not None and "crisp" in outcome.report.read_text(encoding="utf-8")
    for stage in ("prepare", "train", "evaluate", "register"):
        last = [event for event in seen if event["stage"] == stage and "total" in event][-1]
        assert (last["done"], last["total"]) == (3, 3)
    assert lookup(CustomerKey("bolt"), home=home).version == 1

    APILogWorker.drain_all(timeout=10)
    with get_client(sync_client=True) as client:
        flow_run = max(client.read_flow_runs(), key=lambda r: r.created)
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
    assert flow_run.name.startswith("fleet · ") and flow_run.name.endswith(" · 3 of 3 due")
    assert "train works on acme" in {log.message for log in logs if log.flow_run_id == flow_run.id}


def test_the_table_of_a_run_is_a_prefect_artifact_and_the_report_is_html_json_and_markdown(home: Home, fleet_file: Path) -> None:
    from prefect.client.orchestration import get_client

    _, outcome = run(fleet_file)
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
    newest = max((a for a in artifacts if a.key == "fleet-fleet"), key=lambda a: a.created)
    rows = json.loads(newest.data)
    assert [(row["customer"], row["result"], row["base"], row["prefix"]) for row in rows] == [
        (name, "promote", 5.0, 40.0) for name in ("acme", "bolt", "crisp")
    ]
    assert outcome.report is not None
    content = json.loads(outcome.report.with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["key"] for row in content["customers"]] == ["acme", "bolt", "crisp"]
    assert "| acme | promote |" in outcome.report.with_suffix(".md").read_text(encoding="utf-8")


def test_a_new_prefix_is_evaluated_beside_the_champion_of_that_moment(home: Home, fleet_file: Path) -> None:
    from pipeline.registry import lookup
    from pipeline.training.job import read_job

    def champions_given() -> list[str | None]:
        newest = max(home.root.glob("jobs/*/job.yaml"), key=lambda path: path.stat().st_mtime)
        return [customer.champion_dir for customer in read_job(newest).customers]

    run(fleet_file)
    assert champions_given() == [None] * 3
    text = fleet_file.read_text(encoding="utf-8")
    fleet_file.write_text(text + "defaults: {training: {lr: 0.05}}\n", encoding="utf-8")
    run(fleet_file)
    assert champions_given() == [str(lookup(CustomerKey(name), version=1).prefix_dir) for name in ("acme", "bolt", "crisp")]


def test_a_champion_that_cannot_be_had_fails_that_customer_alone(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.registry

    run(fleet_file)
    real = pipeline.registry.lookup

    def lookup(key: CustomerKey, *rest: Any, **more: Any) -> Any:
        if key.customer == "bolt":
            raise RegistryError("the store has lost it")
        return real(key, *rest, **more)

    monkeypatch.setattr(pipeline.registry, "lookup", lookup)
    text = fleet_file.read_text(encoding="utf-8")
    fleet_file.write_text(text + "defaults: {training: {lr: 0.05}}\n", encoding="utf-8")
    _, outcome = run(fleet_file)
    assert [row.status for row in outcome.rows] == ["done", "failed", "done"]
    assert "its champion cannot be had: the store has lost it" in str(outcome.rows[1].error)


def test_second_run_with_nothing_changed_starts_no_child(home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fleet_file)
    started = children(monkeypatch)
    state, outcome = run(fleet_file)
    assert started == [] and state.is_completed()
    assert [(row.status, row.version, row.alias) for row in outcome.rows] == [("unchanged", 1, "champion")] * 3


def test_changed_data_of_one_customer_trains_that_one_alone(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fleet_file)
    with (fleet_file.parent / "bolt.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"input": "name : new", "target": "New."}) + "\n")
    started = children(monkeypatch)
    _, outcome = run(fleet_file)
    assert started == ["pipeline.training", "pipeline.evaluation"]
    assert [(row.key, row.status, row.version) for row in outcome.rows] == [
        ("acme", "unchanged", 1),
        ("bolt", "done", 2),
        ("crisp", "unchanged", 1),
    ]


def test_changed_gate_evaluates_and_registers_without_training(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fleet_file)
    text = fleet_file.read_text(encoding="utf-8")
    fleet_file.write_text(text + "defaults: {evaluation: {gate: {min_score: 1.0}}}\n", encoding="utf-8")
    started = children(monkeypatch)
    _, outcome = run(fleet_file)
    assert started == ["pipeline.evaluation"]
    assert [(row.status, row.version) for row in outcome.rows] == [("done", 1)] * 3


def test_customer_with_bad_data_is_reported_and_the_others_finish(home: Home, fleet_file: Path) -> None:
    (fleet_file.parent / "bolt.jsonl").write_text("nonsense\n", encoding="utf-8")
    state, outcome = run(fleet_file)
    assert state.is_failed() and "1 of 3 customers failed: bolt" in state.message
    assert [row.status for row in outcome.rows] == ["done", "failed", "done"]
    assert outcome.rows[1].error is not None and "bolt.jsonl" in outcome.rows[1].error
    assert outcome.rows[2].alias == "champion"


def test_customer_whose_training_fails_is_reported_and_the_others_finish(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STAGE", "train:fail=acme")
    _, outcome = run(fleet_file)
    assert [(row.status, row.error) for row in outcome.rows] == [("failed", "the loss is NaN"), ("done", None), ("done", None)]


def test_child_killed_once_is_started_again(home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STAGE", "train:kill-once")
    started = children(monkeypatch)
    state, _ = run(fleet_file)
    assert state.is_completed() and started == ["pipeline.training", "pipeline.training", "pipeline.evaluation"]


def test_child_that_stopped_at_a_checkpoint_is_started_again_and_that_is_no_failure(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STAGE", "train:pause-once")
    started = children(monkeypatch)
    state, outcome = run(fleet_file)
    assert state.is_completed() and started == ["pipeline.training", "pipeline.training", "pipeline.evaluation"]
    assert not outcome.failed


def test_child_that_is_killed_again_is_reported_with_signal_and_last_lines(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STAGE", "evaluate:kill")
    started = children(monkeypatch)
    state, outcome = run(fleet_file)
    # Started twice, then in halves, down to each customer, who has two tries too.
    assert state.is_failed() and started == ["pipeline.training", *["pipeline.evaluation"] * 9]
    assert all("SIGKILL" in str(row.error) and "about to allocate too much" in str(row.error) for row in outcome.rows)
    # What was finished is kept: the next run only evaluates.
    monkeypatch.setenv("FAKE_STAGE", "")
    started.clear()
    state, _ = run(fleet_file)
    assert state.is_completed() and started == ["pipeline.evaluation"]


def test_registration_that_fails_once_is_tried_again(home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import tasks, work

    real, failures = work.register, [RegistryError("the server is away")]

    def flaky(member: Any, home: Home) -> Any:
        if failures:
            raise failures.pop() from ConnectionError("refused")
        return real(member, home)

    monkeypatch.setattr(work, "register", flaky)
    monkeypatch.setattr(tasks.register, "retry_delay_seconds", [0, 0])
    state, outcome = run(fleet_file, ["crisp"])
    assert state.is_completed() and outcome.rows[0].alias == "champion" and not failures


def test_registration_of_what_must_not_be_registered_is_tried_once_and_the_others_finish(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import work

    real, tried = work.register, []

    def picky(member: Any, home: Home) -> Any:
        tried.append(member.customer)
        if member.customer == "acme":
            raise RegistryError("damaged weights")
        if member.customer == "bolt":
            raise KeyError("nobody expected this")
        return real(member, home)

    monkeypatch.setattr(work, "register", picky)
    _, outcome = run(fleet_file)
    assert sorted(tried) == ["acme", "bolt", "crisp"]
    assert [(row.status, row.error) for row in outcome.rows] == [
        ("failed", "damaged weights"),
        ("failed", "KeyError: 'nobody expected this'"),
        ("done", None),
    ]


def test_interrupted_registration_is_due_again(home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fleet_file, ["crisp"])
    (home.root / "registered" / "crisp" / "default.json").unlink()
    started = children(monkeypatch)
    _, outcome = run(fleet_file, ["crisp"])
    assert started == [] and (outcome.rows[0].status, outcome.rows[0].version) == ("done", 1)


def with_defaults(fleet_file: Path, defaults: str) -> None:
    lines = [line for line in fleet_file.read_text(encoding="utf-8").splitlines() if not line.startswith("defaults:")]
    fleet_file.write_text("\n".join([*lines, f"defaults: {defaults}", ""]), encoding="utf-8")


def what_happened(fleet_file: Path) -> tuple[str, int | None, str | None]:
    _, outcome = run(fleet_file, ["bolt"])
    (row,) = outcome.rows
    return row.status, row.version, row.alias


def test_setting_that_is_reverted_makes_its_version_champion_again(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.registry import lookup

    with_defaults(fleet_file, "{training: {lr: 0.01}}")
    assert what_happened(fleet_file) == ("done", 1, "champion")
    with_defaults(fleet_file, "{training: {lr: 0.05}}")
    assert what_happened(fleet_file) == ("done", 2, "champion")
    with_defaults(fleet_file, "{training: {lr: 0.01}}")
    started = children(monkeypatch)
    assert what_happened(fleet_file) == ("done", 1, "champion")
    assert lookup(CustomerKey("bolt"), home=home).version == 1
    assert what_happened(fleet_file) == ("unchanged", 1, "champion") and started == []


def test_gate_that_is_reverted_gives_the_alias_back(home: Home, fleet_file: Path) -> None:
    from pipeline.registry import status

    for least, alias in ((1.0, "champion"), (99.0, None), (1.0, "champion")):
        with_defaults(fleet_file, f"{{evaluation: {{gate: {{min_score: {least}}}}}}}")
        assert what_happened(fleet_file) == ("done", 1, alias)
        assert status([CustomerKey("bolt")])[0].champion_version == (1 if alias else None)
        assert what_happened(fleet_file) == ("unchanged", 1, alias)


def test_alias_that_a_person_has_moved_since_is_left_where_it_is(home: Home, fleet_file: Path) -> None:
    from mlflow import MlflowClient

    assert what_happened(fleet_file) == ("done", 1, "champion")
    MlflowClient().delete_registered_model_alias("prefixfleet.bolt", "champion")
    assert what_happened(fleet_file) == ("unchanged", 1, None)


def test_version_that_was_deleted_in_mlflow_is_registered_again(home: Home, fleet_file: Path) -> None:
    from mlflow import MlflowClient

    assert what_happened(fleet_file) == ("done", 1, "champion")
    MlflowClient().delete_model_version("prefixfleet.bolt", "1")
    assert what_happened(fleet_file)[0::2] == ("done", "champion")


def test_damaged_evaluation_of_one_customer_fails_that_one_alone(home: Home, fleet_file: Path) -> None:
    run(fleet_file)
    (metrics,) = home.root.glob("evaluations/bolt/default/*/metrics.json")
    for damage, said in (("nonsense", "cannot be read"), ('{"format": 1}', "is damaged")):
        metrics.write_text(damage, encoding="utf-8")
        _, outcome = run(fleet_file)
        assert [row.status for row in outcome.rows] == ["unchanged", "failed", "unchanged"]
        assert str(metrics.parent) in str(outcome.rows[1].error) and said in str(outcome.rows[1].error)


def test_customer_at_work_in_another_process_fails_here_and_the_others_finish(home: Home, fleet_file: Path) -> None:
    with held_by_another_process(home, "bolt"):
        state, outcome = run(fleet_file)
    assert state.is_failed() and [row.status for row in outcome.rows] == ["done", "failed", "done"]
    assert "another run is at work on this customer" in str(outcome.rows[1].error)
    assert what_happened(fleet_file) == ("done", 1, "champion")
    # Who has nothing to do needs nobody's leave.
    with held_by_another_process(home, "bolt"):
        assert what_happened(fleet_file) == ("unchanged", 1, "champion")


@contextlib.contextmanager
def held_by_another_process(home: Home, customer: str) -> Iterator["subprocess.Popen[str]"]:
    code = f"""
import sys
from pathlib import Path
from flows.locks import holding
from pipeline.home import Home
from pipeline.keys import CustomerKey
with holding(Home(Path({str(home.root)!r})), [CustomerKey({customer!r})]) as busy:
    print(len(busy), flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "0\n"
        yield other
    finally:
        other.kill()
        other.communicate()


def test_lock_of_a_killed_process_is_free_and_threads_of_one_process_exclude_one_another(tmp_path: Path) -> None:
    home, acme, bolt = Home(tmp_path), CustomerKey("acme"), CustomerKey("bolt")
    with held_by_another_process(home, "acme") as other:
        with locks.holding(home, [acme, bolt]) as busy:
            assert busy == {acme}
            with locks.holding(home, [acme, bolt]) as busy:
                assert busy == {acme, bolt}
            # The inner one has not let go of what the outer one holds.
            with locks.holding(home, [bolt]) as busy:
                assert busy == {bolt}
        other.kill()
        other.wait()
        with locks.holding(home, [acme, bolt]) as busy:
            assert busy == set()


def test_import_of_a_flow_from_python_turns_telemetry_off_and_leaves_prefect_s_settings_alone() -> None:
    names = ["DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"]
    code = f"""
import os
import flows.fleet
from prefect.settings import get_current_settings
print([os.environ.get(name) for name in {names}], get_current_settings().server.analytics_enabled, 'PREFECT_HOME' in os.environ)
"""
    env = {name: value for name, value in os.environ.items() if name not in (*names, "PREFECT_HOME")}
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**env, "PYTHONPATH": root})
    assert done.stdout == "['true', 'false', 'true', '1'] False False\n", done.stderr


def test_customer_flow_runs_one_customer(home: Home, fleet_file: Path) -> None:
    from flows.customer import customer

    state = customer(fleet_file, "bolt", return_state=True)
    outcome = state.result()
    assert [row.key for row in outcome.rows] == ["bolt"] and outcome.rows[0].alias == "champion"


def test_nothing_is_pickled_into_prefect_s_storage(
    home: Home, fleet_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    storage = Path(os.environ["PREFECT_HOME"]) / "storage"
    before = set(storage.rglob("*"))
    run(fleet_file, ["acme"])
    assert set(storage.rglob("*")) == before


def test_the_flow_reports_who_was_forgotten_and_completes(home: Home, fleet_file: Path) -> None:
    from flows.forget import forget

    forget("crisp", home)
    state, outcome = run(fleet_file)
    assert state.is_completed() and [row.status for row in outcome.rows] == ["done", "done", "forgotten"]
    assert not list(home.root.glob("*/crisp"))


def test_prefect_forgets_deployments_schedules_runs_and_rows_of_tables() -> None:
    from prefect import flow
    from prefect.artifacts import create_table_artifact
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    from flows.forget import forget_in_prefect

    mark = uuid.uuid4().hex[:8]
    acme, bolt = f"a{mark}", f"b{mark}"

    @flow(name="customer", persist_result=False)
    def customer(fleet_file: str, customer_id: str) -> None:
        if customer_id == bolt:
            rows = [
                {"customer": acme, "why": "secret"},
                {"customer": f"{acme}/menu", "why": "secret"},
                {"customer": bolt, "why": "good"},
            ]
            create_table_artifact(key=f"fleet-{mark}", table=rows)
        else:
            create_table_artifact(key=f"own-{mark}", table=[{"metric": "secret"}])

    for name in (acme, bolt, f"{acme}/menu"):
        customer("fleet.yaml", name)
    with get_client(sync_client=True) as client:
        kind = client.read_flow_by_name("customer").id

        def deploy(name: str, parameters: dict[str, Any], schedules: list[dict[str, Any]]) -> None:
            cron = CronSchedule(cron="0 3 * * *")
            made = [DeploymentScheduleCreate(schedule=cron, parameters=given, slug=f"s{i}") for i, given in enumerate(schedules)]
            tags = ["prefixfleet"] if name != "own" else []  # that one was made by hand
            where = "flows.customer.customer"
            client.create_deployment(
                flow_id=kind, name=f"{mark}-{name}", parameters=parameters, schedules=made, tags=tags, entrypoint=where
            )

        deploy("own", {"customer_id": f"{acme}/menu"}, [])
        deploy("some", {"customers": [acme, bolt]}, [])
        deploy("alone", {"customers": [acme]}, [])
        deploy("fleet", {}, [{"customers": [acme]}, {"customers": [bolt, f"{acme}/menu"]}, {"customer_id": acme}])
        deploy("all", {"customers": None}, [])
        said = list(forget_in_prefect(client, acme))
        left = {d.name.removeprefix(f"{mark}-"): d for d in client.read_deployments() if d.name.startswith(mark)}
        assert set(left) == {"some", "fleet", "all"} and left["some"].parameters == {"customers": [bolt]}
        assert [schedule.parameters for schedule in left["fleet"].schedules] == [{"customers": [bolt]}]
        assert left["all"].parameters == {"customers": None}
        runs = [run.parameters["customer_id"] for run in client.read_flow_runs() if mark in str(run.parameters)]
        assert runs == [bolt]
        (table,) = [a for a in client.read_artifacts() if str(a.key).endswith(mark)]
        assert json.loads(table.data) == [{"customer": bolt, "why": "good"}]
        assert f"2 Prefect flow runs about {acme} alone" in said and list(forget_in_prefect(client, acme)) == []


@pytest.mark.parametrize("name", ["bill", "customer"])
def test_prefect_keeps_what_others_have_about_somebody_of_the_same_name(name: str) -> None:
    from prefect import flow
    from prefect.artifacts import create_table_artifact
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    from flows.forget import forget_in_prefect

    mark = uuid.uuid4().hex[:8]
    acme = f"a{mark}"

    @flow(name=name, persist_result=False)
    def bill(customer: str) -> None:
        create_table_artifact(key=f"bill-{mark}", table=[{"customer": customer, "sum": 3}])

    bill(acme)
    with get_client(sync_client=True) as client:
        schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *"), parameters={"customer": acme}, slug="theirs")
        client.create_deployment(
            flow_id=client.read_flow_by_name(name).id, name=mark, parameters={"customer": acme}, schedules=[schedule],
            entrypoint="billing/flows.py:bill",
        )  # fmt: skip
        assert list(forget_in_prefect(client, acme)) == []
        deployment = client.read_deployment_by_name(f"{name}/{mark}")
        assert deployment.parameters == {"customer": acme} == deployment.schedules[0].parameters
        assert [run.parameters for run in client.read_flow_runs() if mark in str(run.parameters)] == [{"customer": acme}]
        (table,) = [one for one in client.read_artifacts() if one.key == f"bill-{mark}"]
        assert json.loads(table.data) == [{"customer": acme, "sum": 3}]


def test_a_sweep_is_a_flow_run_that_leaves_its_table(home: Home, fleet_file: Path, sweep_stages: list[tuple[str, Any]]) -> None:
    from prefect.client.orchestration import get_client

    from flows.sweep import sweep

    state = sweep(fleet_file, "acme", lengths=[2, 10], return_state=True)
    content = state.result(raise_on_failure=False)
    assert state.is_completed() and content["best"]["settings"]["length"] == 10
    with get_client(sync_client=True) as client:
        newest = max((a for a in client.read_artifacts() if a.key == "sweep-acme-default"), key=lambda a: a.created)
    assert newest.data == (Path(content["folder"]) / "sweep.md").read_text(encoding="utf-8")
