"""Schedules that `prefixfleet deploy` makes yield runs, which a real worker carries out, and of which nothing is left behind."""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest
import yaml

from flows import deploy
from pipeline.home import Home

from .test_deploy import client, write

HERE = Path(__file__).parent
__all__ = ["client"]
pytestmark = pytest.mark.usefixtures("on_server")


def scheduled(client: Any, name: str) -> list[Any]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    return list(client.read_flow_runs(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name])), limit=100))


def wait_until(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


def test_every_schedule_yields_runs_at_its_hours_for_its_customers(
    home: Home, tmp_path: Path, example_base: Path, client: Any
) -> None:
    name = f"s{uuid.uuid4().hex[:8]}"
    customers = [{"id": "acme"}, {"id": "bolt", "schedule": "30 5 * * *"}]
    at_three = {"cron": "0 3 * * *", "timezone": "Asia/Kolkata"}
    deploy.deploy(write(tmp_path / "fleet.yaml", example_base, name=name, customers=customers, schedule=at_three), home)
    # With SQLAlchemy 2.1 none ever comes, and nobody is told.
    assert wait_until(lambda: len(scheduled(client, name)) >= 6, 30), scheduled(client, name)
    now = datetime.now(UTC)
    found: dict[tuple[str, ...] | None, list[datetime]] = {}
    for run in scheduled(client, name):
        assert run.state.is_scheduled() and run.work_queue_name == "prefixfleet-scheduled"
        assert run.parameters["fleet_file"] == str(tmp_path / "fleet.yaml")
        who = run.parameters.get("customers")
        found.setdefault(None if who is None else tuple(who), []).append(run.expected_start_time)
    assert set(found) == {None, ("bolt/default",)}
    for who, hour, zone in ((None, (3, 0), ZoneInfo("Asia/Kolkata")), (("bolt/default",), (5, 30), ZoneInfo("UTC"))):
        first, *_ = times = sorted(when.astimezone(zone) for when in found[who])
        assert {(when.hour, when.minute) for when in times} == {hour} and len({when.date() for when in times}) == len(times)
        assert now < first <= now + timedelta(days=1)


@contextlib.contextmanager
def worker(pool: str, url: str, folder: Path) -> Iterator[Path]:
    """A process worker as people start one; yields the folder where it and what it starts keep temporary files."""
    temporary = folder / "tmp"
    temporary.mkdir()
    env = {
        **os.environ,
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(folder / "worker"),
        "TMPDIR": str(temporary),
        "PF_TEST": str(folder),
    }
    env |= {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", pool]
    with (folder / "worker.log").open("wb") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as process:
        try:
            yield temporary
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def family(folder: Path) -> list[str]:
    """The command lines of living processes that a worker started with this folder, and of those that they started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PF_TEST") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["success", "failure", "cancel"])
def test_a_worker_carries_out_what_is_scheduled_and_leaves_nothing_behind(
    home: Home, fleet_file: Path, tmp_path: Path, client: Any, on_server: str, ending: str
) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
    from prefect.client.schemas.schedules import IntervalSchedule
    from prefect.states import Cancelling

    name = f"w{uuid.uuid4().hex[:8]}"
    what = {"success": "", "failure": "train:fail=bolt", "cancel": "train:hang"}[ending]
    env = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]), "FAKE_STAGE": what}
    content = yaml.safe_load(fleet_file.read_text("utf-8"))
    fleet_file.write_text(yaml.safe_dump({**content, "name": name, "deploy": {"work_pool": name, "env": env}}), encoding="utf-8")
    deploy.deploy(fleet_file, home)
    made = client.read_deployment_by_name(f"fleet/{name}").id
    client.update_deployment(made, DeploymentUpdate(entrypoint="fake_flows.fleet"))
    # A few seconds ahead; cron knows minutes only.
    soon = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC) + timedelta(seconds=5))
    client.create_deployment_schedules(made, [DeploymentScheduleCreate(schedule=soon, slug="soon")])

    with worker(name, on_server, tmp_path) as temporary:

        def of_state(*types: str) -> list[Any]:
            return [run for run in scheduled(client, name) if run.state.type.value in types]

        if ending == "cancel":
            assert wait_until(lambda: any("time.sleep(600)" in line for line in family(tmp_path)), 240), worker_log(tmp_path)
            (run,) = of_state("RUNNING")
            client.set_flow_run_state(run.id, Cancelling())
            asked = time.monotonic()
            ended = wait_until(lambda: not any("fake_stage" in one or "sleep(600)" in one for one in family(tmp_path)), 60)
            assert ended and time.monotonic() - asked < 10, (family(tmp_path), worker_log(tmp_path))
        wanted = {"success": "COMPLETED", "failure": "FAILED", "cancel": "CANCELLED"}[ending]
        assert wait_until(lambda: of_state(wanted), 240), (scheduled(client, name), worker_log(tmp_path))
        (run,) = of_state(wanted)
        assert "auto-scheduled" in run.tags and f"prefixfleet:{name}" in run.tags
        # The worker itself may keep what it needs for its next run.
        assert wait_until(lambda: len(family(tmp_path)) == 1, 20), family(tmp_path)
    assert family(tmp_path) == []
    # Folders of one name for every run: of Prefect's worker, and torch's cache of compiled code.
    kept = ("runner_storage", "torchinductor_")
    assert [place.name for place in temporary.iterdir() if not place.name.startswith(kept)] == []
    assert not [place for place in temporary.rglob("*") if place.is_file()]
    assert not [place for place in home.root.rglob(".*") if place.name.endswith((".tmp", ".old"))]


def worker_log(folder: Path) -> str:
    return (folder / "worker.log").read_text(encoding="utf-8", errors="replace")[-5000:]
