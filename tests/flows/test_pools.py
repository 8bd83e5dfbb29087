"""Jobs on a work pool, with a real Prefect server and a real process worker. Slow: both take long to start."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.home import Home

from .test_dispatch import write_fleet

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
POOL = "gpu"
PREFECT = [sys.executable, "-m", "prefect"]


def eventually(true: Callable[[], Any], seconds: float, what: str) -> float:
    """Wait until `true()`; returns the seconds that took."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, f"{what} took more than {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - started


@contextlib.contextmanager
def process(arguments: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process meanwhile, and end it with everything that it started."""
    with log.open("wb") as out:
        started = subprocess.Popen(arguments, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        yield started
    finally:
        family = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(30)
        for left in family:
            with contextlib.suppress(psutil.Error):
                left.kill()
        started.kill()
        started.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server; yields the environment that names it."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))},
        "PREFECT_HOME": str(folder), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT), "PREFIXFLEET_HOME": str(folder / "home"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }  # fmt: skip

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"{env['PREFECT_API_URL']}/health", timeout=2).status == 200)
        return False

    with process([*PREFECT, "server", "start", "--port", port, "--no-ui"], env, folder / "server.log"):
        eventually(answers, 120, "the server's start")
        yield env


def worker(env: dict[str, str], log: Path) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    return process([*PREFECT, "worker", "start", "--pool", POOL, "--type", "process"], env, log)


def deploy(env: dict[str, str], stage: str) -> None:
    """The deployments `job/gpu` and `fleet/gpu`; `stage` is what their fake stages do."""
    code = f"""
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
with get_client(sync_client=True) as client:
    client.create_work_pool(WorkPoolCreate(name={POOL!r}, type="process"), overwrite=True)
    for name in ("job", "fleet"):
        client.create_deployment(
            flow_id=client.create_flow_from_name(name), name={POOL!r}, work_pool_name={POOL!r}, path={str(ROOT)!r},
            entrypoint=f"tests/flows/fake_flows.py:{{name}}", job_variables={{"env": {{"FAKE_STAGE": {stage!r}}}}},
        )
"""
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=ROOT, timeout=120)


def ask(env: dict[str, str], code: str) -> Any:
    """What `code` prints as JSON; `client` is there."""
    whole = f"import json\nfrom prefect.client.orchestration import get_client\nwith get_client(sync_client=True) as client:\n    {code}"
    return json.loads(subprocess.run([sys.executable, "-c", whole], env=env, check=True, capture_output=True, timeout=120).stdout)


RUNS = "print(json.dumps([[r.name, r.state_name, str(r.id), r.tags] for r in client.read_flow_runs()]))"


def hanging(home: Home) -> list[psutil.Process]:
    """The fake stages of this home, whichever process started them."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "fake_stage.py" in " ".join(one.cmdline()) and str(home.root) in " ".join(one.cmdline()):
                found.append(one)
    return found


def test_jobs_run_on_the_pool_and_cancelling_the_fleet_ends_every_child_within_ten_seconds(
    served: dict[str, str], home: Home, tmp_path: Path, example_base: Path
) -> None:
    env = {**served, "PREFIXFLEET_HOME": str(home.root)}
    settings = f"launch: {{work_pool: {POOL}, customers_per_job: 2}}\nwork_pools: {{{POOL}: {{concurrency_limit: 3}}}}\n"
    file = write_fleet(tmp_path, example_base, ["a", "b", "c", "d"], settings)
    with worker(env, tmp_path / "worker.log"):
        deploy(env, "evaluate:fail=c")
        command = [sys.executable, str(Path(__file__).with_name("fake_cli.py")), "run", str(file), "--json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, cwd=tmp_path)
        rows = {row["key"]: row for row in json.loads(done.stdout)["customers"]}
        assert {key: row["status"] for key, row in rows.items()} == {"a": "done", "b": "done", "c": "failed", "d": "done"}, (
            done.stderr
        )
        runs = [run for run in ask(env, RUNS) if "prefixfleet-job" in run[3]]
        assert len(runs) == 4 and {state for _, state, _, _ in runs} == {"Completed"}
        assert any(" · train · 2 customers" in name for name, *_ in runs)

        for name in "abcd":
            (tmp_path / f"{name}.jsonl").unlink()
            with (tmp_path / f"{name}.jsonl").open("w", encoding="utf-8") as rows_file:
                rows_file.writelines(json.dumps({"input": f"{name} {i}", "target": str(i)}) + "\n" for i in range(30))
        deploy(env, "train:hang")
        started = f"r = client.read_deployment_by_name('fleet/{POOL}'); r = client.create_flow_run_from_deployment(r.id, parameters={{'fleet_file': {str(file)!r}}}, job_variables={{'env': {{'PREFIXFLEET_HOME': {str(home.root)!r}}}}}); print(json.dumps(str(r.id)))"  # noqa: E501
        fleet_run = ask(env, started)
        eventually(
            lambda: sum(len(one.children()) for one in hanging(home)) >= 2, 120, "the start of both jobs and of their children"
        )
        family = {one for stage in hanging(home) for one in (stage, *stage.children(recursive=True))}
        assert len(family) >= 4, "two stages, each with a child that has left its session"
        body = json.dumps({"state": {"type": "CANCELLING"}}).encode()
        address = f"{env['PREFECT_API_URL']}/flow_runs/{fleet_run}/set_state"
        urllib.request.urlopen(urllib.request.Request(address, body, {"Content-Type": "application/json"}), timeout=30).read()
        took = eventually(
            lambda: not any(one.is_running() for one in family) and not hanging(home), 60, "the end of the children"
        )
        print(f"children ended {took:.1f} s after the cancel of the fleet")
        eventually(
            lambda: {state for _, state, _, tags in ask(env, RUNS) if "prefixfleet-job" in tags} == {"Completed", "Cancelled"},
            60,
            "cancel",
        )
        assert took < 10


def test_a_worker_and_a_fleet_that_are_killed_in_the_middle_lose_nothing_and_repeat_nothing(
    served: dict[str, str], home: Home, tmp_path: Path, example_base: Path
) -> None:
    log, names = tmp_path / "done.log", [f"k{number}" for number in range(8)]
    log.touch()
    env = {**served, "PREFIXFLEET_HOME": str(home.root), "FAKE_LOG": str(log), "FAKE_STAGE": "train:slow,evaluate:slow"}
    env["FAKE_SILENT"] = "30"
    settings = f"launch: {{work_pool: {POOL}, customers_per_job: 4}}\nwork_pools: {{{POOL}: {{concurrency_limit: 2}}}}\n"
    file = write_fleet(tmp_path, example_base, names, settings)
    deploy(env, env["FAKE_STAGE"])
    command = [sys.executable, str(Path(__file__).with_name("fake_cli.py")), "run", str(file), "--json"]

    def through() -> list[str]:
        return log.read_text(encoding="utf-8").splitlines()

    with worker(env, tmp_path / "worker1.log") as first, process(command, env, tmp_path / "fleet1.log") as fleet:
        eventually(lambda: len(through()) >= 2, 180, "the first customers")
        for one in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid), psutil.Process(fleet.pid)]:
            with contextlib.suppress(psutil.Error):
                one.kill()
        fleet.wait(60)
    eventually(lambda: not hanging(home), 30, "the end of the killed jobs' children")
    assert 2 <= len(through()) < 16
    with worker(env, tmp_path / "worker2.log"):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    rows = json.loads(done.stdout)["customers"]
    assert [(row["key"], row["version"], row["alias"]) for row in rows] == [(name, 1, "champion") for name in names], done.stderr
    assert sorted(through()) == sorted(f"{stage} {name}" for stage in ("train", "evaluate") for name in names)
