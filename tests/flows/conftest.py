"""A small fleet on the embedded base, stages that take milliseconds, and one real in-process Prefect API for the session."""

import contextlib
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import jobs, launch, work
from flows.prefect_api import prefect_api, set_environment
from pipeline.home import Home
from pipeline.registry import ensure_store, store

HERE = Path(__file__).parent


def write_rows(path: Path, name: str, count: int = 30) -> None:
    rows = [
        {"input": f"name : {name} {i} | food : soup", "target": f"{name} {i} serves soup number {i * 7}."} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def fleet_file(tmp_path: Path, example_base: Path) -> Path:
    """Customers acme, bolt and crisp."""
    customers = ["acme", "bolt", "crisp"]
    for name in customers:
        write_rows(tmp_path / f"{name}.jsonl", name)
    lines = "".join(f"  - {{id: {name}, data: {name}.jsonl}}\n" for name in customers)
    path = tmp_path / "fleet.yaml"
    path.write_text(f"base_model: {{path: {example_base}}}\ncustomers:\n{lines}", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def fresh_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an empty embedded MLflow store, whose tables take seconds to make."""
    root = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(store, "_uri_set_here", None)
        ensure_store(Home(root))
    return root


@pytest.fixture
def home(tmp_path: Path, fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """`PREFIXFLEET_HOME` of one test, with a store ready for use."""
    root = tmp_path / "home"
    root.mkdir()
    for name in ("mlflow.db", "mlflow.version"):
        if (fresh_home / name).exists():
            (root / name).write_bytes((fresh_home / name).read_bytes())
    monkeypatch.setenv("PREFIXFLEET_HOME", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "_uri_set_here", None)
    return Home(root)


def without_prefect(fleet_file: Path, customers: list[str] | None = None) -> work.Outcome:
    """Bring a fleet up to date by the functions of the stages alone: for tests of what is in files and registry, of which flows know nothing."""
    todo = work.open_work(fleet_file, customers)
    with work.alone(todo):
        for stage in jobs.STAGES:
            todo.due = {key: due[due.index(stage) :] if stage in due else due for key, due in todo.due.items()}
            work.run_stage(todo, stage, logging.getLogger("stages"))
        return work.outcome(todo)


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children are `fake_stage.py`."""
    fake = str(HERE / "fake_stage.py")
    monkeypatch.setattr(launch, "command", lambda module, job_file, _launch: [sys.executable, fake, module, str(job_file)])


@pytest.fixture(scope="session")
def prefect_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The API that `prefixfleet run` uses, started once; yields the home that its database is in."""
    home = Home(tmp_path_factory.mktemp("prefect"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        before = dict(os.environ)
        set_environment(home)
        with prefect_api(home):
            yield home
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def ready_home(home: Home, prefect_session: Home) -> Home:
    """`home` with a Prefect database too, which takes seconds to make: for tests that start `prefixfleet run` as a process."""
    home.prefect.mkdir()
    with (
        contextlib.closing(sqlite3.connect(prefect_session.prefect / "prefect.db")) as source,
        contextlib.closing(sqlite3.connect(home.prefect / "prefect.db")) as copy,
    ):
        source.backup(copy)
    return home


@pytest.fixture
def sweep_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """The children, in this process: training writes folders (not for lengths above 99), judging is the real one with an engine that answers
    better the longer a prefix is. Yields what was done: module, and the customers' tasks or the number of rows."""
    from pipeline.sweep.report import write_sweep
    from pipeline.sweep.score import score_sweep
    from pipeline.training.job import read_job
    from pipeline.training.results import write_result

    from ..pipeline.evaluation.conftest import FakeEngine
    from .fake_stage import write_prefix

    done: list[tuple[str, Any]] = []

    def stage(module: str, path: Path, _launch: Any, on_event: Any, log: Any) -> None:
        if module == "pipeline.training":
            job = read_job(path)
            done.append((module, [customer.task for customer in job.customers]))
            for customer in job.customers:
                too_long = customer.prefix.length > 99
                if not too_long:
                    write_prefix(job, customer)
                write_result(job, customer, "train", 0.0, "too long" if too_long else None)
            return
        task = json.loads(path.read_text(encoding="utf-8"))
        job, engine = read_job(Path(task["job"])), FakeEngine()
        for customer in job.customers:
            length = customer.prefix.length
            engine.answers[customer.prefix_dir] = lambda prompt, length=length: (
                "acme 3 serves soup number 21." if length > 5 else "soup"
            )
        write_sweep(score_sweep(job, task, engine.load), path.parent)
        done.append((module, sum(rows for rows, _, _ in engine.calls)))

    monkeypatch.setattr(launch, "run_module", stage)
    yield done


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server on loopback with all its services, but quick to make runs of schedules; yields the address of its API."""
    home = tmp_path_factory.mktemp("prefect-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "PREFECT_HOME": str(home),
        "PREFECT_UI_ENABLED": "0",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # It ends with the tests, however they end.
        "PREFIXFLEET_EXIT_WITH_PARENT": "1",
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | own
    app = [
        "--factory",
        "prefect.server.api.server:create_app",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    log = home / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.api_server", *app], env=env, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
        try:
            url = f"http://127.0.0.1:{port}/api"
            deadline = time.monotonic() + 90
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture
def on_server(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This process, and those it starts, use `prefect_server`; yields its address."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    with temporary_settings({PREFECT_API_URL: prefect_server, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield prefect_server
