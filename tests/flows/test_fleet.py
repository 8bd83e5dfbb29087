"""The flows against a real in-process Prefect API and a real MLflow store, with stages that take milliseconds."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows import events, launch
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
        logs = client.read_logs()
    assert flow_run.name.startswith("fleet · ") and flow_run.name.endswith(" · all customers")
    assert "train works on acme" in {log.message for log in logs if log.flow_run_id == flow_run.id}


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


def test_child_that_is_killed_again_is_reported_with_signal_and_last_lines(
    home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STAGE", "evaluate:kill")
    started = children(monkeypatch)
    state, outcome = run(fleet_file)
    assert state.is_failed() and started == ["pipeline.training", "pipeline.evaluation", "pipeline.evaluation"]
    assert all("SIGKILL" in str(row.error) and "about to allocate too much" in str(row.error) for row in outcome.rows)
    # What was finished is kept: the next run only evaluates.
    monkeypatch.setenv("FAKE_STAGE", "")
    started.clear()
    state, _ = run(fleet_file)
    assert state.is_completed() and started == ["pipeline.evaluation"]


def test_registration_that_fails_once_is_tried_again(home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import tasks, work

    real, failures = work.register, [RegistryError("the server is away")]

    def flaky(member: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(member)

    monkeypatch.setattr(work, "register", flaky)
    monkeypatch.setattr(tasks.register, "retry_delay_seconds", [0, 0])
    state, outcome = run(fleet_file, ["crisp"])
    assert state.is_completed() and outcome.rows[0].alias == "champion" and not failures


def test_interrupted_registration_is_due_again(home: Home, fleet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fleet_file, ["crisp"])
    for receipt in home.root.glob("evaluations/crisp/default/*/registered.json"):
        receipt.unlink()
    started = children(monkeypatch)
    _, outcome = run(fleet_file, ["crisp"])
    assert started == [] and (outcome.rows[0].status, outcome.rows[0].version) == ("done", 1)


def test_customer_flow_runs_one_customer(home: Home, fleet_file: Path) -> None:
    from flows.customer import customer

    state = customer(fleet_file, "bolt", return_state=True)
    outcome = state.result()
    assert [row.key for row in outcome.rows] == ["bolt"] and outcome.rows[0].alias == "champion"


def test_nothing_is_pickled_into_prefect_s_storage(
    home: Home, fleet_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import os

    run(fleet_file, ["acme"])
    storage = Path(os.environ["PREFECT_HOME"]) / "storage"
    assert not storage.exists() or not any(storage.rglob("*"))
