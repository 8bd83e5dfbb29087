"""What is scheduled on a real server is carried out by a real worker, and nothing of it is left behind. That schedules yield runs: `test_deploy`."""

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

import psutil
import pytest
import yaml

from flows import deploy
from pipeline.home import Home

from .test_deploy import client, scheduled, wait_until

HERE = Path(__file__).parent
__all__ = ["client"]
pytestmark = pytest.mark.usefixtures("on_server")


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
