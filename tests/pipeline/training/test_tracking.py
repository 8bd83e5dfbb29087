"""Metrics in MLflow: what is there after a run, after a kill, and that a store which is away or silent holds nobody up."""

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.training.checkpoint import read_checkpoint
from pipeline.training.job import Job
from pipeline.training.run import Paused, run_job

MakeJob = Callable[..., tuple[Job, Path]]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    from pipeline.home import Home
    from pipeline.registry import ensure_store

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        ensure_store(Home(folder / "home"))
    return folder / "mlflow.db"


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    return uri


def runs(uri: str) -> dict[str, list[str]]:
    """Name of a run -> states of all that have it."""
    client = MlflowClient(uri)
    found: dict[str, list[str]] = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            found.setdefault(run.info.run_name or "", []).append(run.info.status)
    return found


def test_an_interrupted_job_goes_on_with_the_runs_that_it_began(make_job: MakeJob, store: str) -> None:
    job, _ = make_job(customers=3, mixing={"slots": 2, "checkpoint_every_seconds": 0.0})
    for looks in (8, 14):
        counted = iter(range(10_000))
        with pytest.raises(Paused):
            run_job(job, lambda counted=counted, looks=looks: next(counted) >= looks)  # type: ignore[misc]
        assert runs(store)[f"job {job.name}"] == ["RUNNING"]
    assert run_job(job) == 0
    assert runs(store) == {name: ["FINISHED"] for name in ("c0", "c1", "c2", f"job {job.name}")}
    client = MlflowClient(store)
    prefix = json.loads((Path(job.customers[0].prefix_dir) / "prefix.json").read_text())
    run = client.get_run(prefix["run_id"])
    assert run.data.tags["prefixfleet.customer"] == "c0" and run.data.params["training.max_steps"] == "12"
    losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    written = [json.loads(line) for line in (job.customers[0].key.below(Path(job.folder)) / "metrics.jsonl").open()]
    assert losses == {entry["step"]: entry["loss"] for entry in written if "loss" in entry}
    whole = next(r for r in client.search_runs([run.info.experiment_id]) if (r.info.run_name or "").startswith("job "))
    assert {"loss", "tokens_per_second", "padding_share", "memory_bytes", "resident", "queued", "done", "failed"} <= set(
        whole.data.metrics
    )


def test_steps_taken_again_after_a_kill_are_logged_once(make_job: MakeJob, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training import run, tracking

    monkeypatch.setattr(tracking, "EVERY_SECONDS", 0.0)  # so that all is sent that is logged
    job, _ = make_job(mixing={"checkpoint_every_seconds": 1e9})
    counted = iter(range(10_000))
    with pytest.raises(Paused):
        run_job(job, lambda: next(counted) >= 4)
    tick = read_checkpoint(Path(job.folder)).tick  # type: ignore[union-attr]  # Paused means that there is one

    class Killed(BaseException):
        """As a SIGKILL: nothing of the job's own runs any more."""

    def killed(training: Any, report: Any) -> None:
        if training.tick == tick + 5:
            training.tracker.close(30.0)
            raise Killed
        tell(training, report)

    tell = run._Training._tell
    monkeypatch.setattr(run._Training, "_tell", killed)
    monkeypatch.setattr(run.Run, "close", lambda *_: None)
    with pytest.raises(Killed):
        run_job(job)
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    client = MlflowClient(store)
    sent = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    assert len(sent) == 2 and all(run.data.metrics for run in sent)
    assert {max(m.step for m in client.get_metric_history(run.info.run_id, "loss")) for run in sent} >= {tick + 4}
    assert run_job(job) == 0
    for found in sent:
        for key in client.get_run(found.info.run_id).data.metrics:
            steps = [metric.step for metric in client.get_metric_history(found.info.run_id, key)]
            assert len(steps) == len(set(steps)), (found.info.run_name, key, steps)
        assert {metric.step for metric in client.get_metric_history(found.info.run_id, "loss")} == set(range(1, 13))


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("away", [True, False], ids=["away", "silent"])
def test_a_store_that_is_away_or_silent_holds_nobody_up(
    make_job: MakeJob, silent: str, away: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipeline.training import run

    monkeypatch.setattr(run, "_FLUSH_SECONDS", 2.0)
    job, _ = make_job(customers=4)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1" if away else silent)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0" if away else "5")
    started = time.monotonic()
    assert run_job(job) == 0
    assert time.monotonic() - started < 30
    if away:
        assert capfd.readouterr().err.count("MLflow takes no metrics") == 1, "said once, not for every customer"
    lines = (job.customers[3].key.below(Path(job.folder)) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 12 + 4


def test_a_run_that_was_noted_for_other_settings_is_not_gone_on_with(make_job: MakeJob, store: str) -> None:
    job, _ = make_job(mixing={"checkpoint_every_seconds": 0.0})
    counted = iter(range(10_000))
    with pytest.raises(Paused):
        run_job(job, lambda: next(counted) >= 8)
    other = replace(job.customers[0], train_digest="1" * 64)
    assert run_job(replace(job, customers=[other])) == 0
    assert sorted(runs(store)["c0"]) == ["FINISHED", "RUNNING"]
