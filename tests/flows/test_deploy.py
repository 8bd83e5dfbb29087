"""`prefixfleet deploy` against a real Prefect server: what it makes, that it makes it once, and that it touches nothing of others."""

import http.server
import json
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml

from flows import cli, deploy
from pipeline.errors import ConfigError
from pipeline.home import Home

pytestmark = pytest.mark.usefixtures("on_server")


@pytest.fixture
def client() -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


def write(path: Path, base: Path, **content: Any) -> Path:
    """A fleet file of acme, bolt and crisp under a name of its own, so that tests share the server."""
    customers = content.pop("customers", ["acme", "bolt", "crisp"])
    listed = [{"id": one, "data": f"{one}.jsonl"} if isinstance(one, str) else {"data": "x.jsonl", **one} for one in customers]
    content.setdefault("name", f"f{uuid.uuid4().hex[:8]}")
    path.write_text(yaml.safe_dump({"base_model": {"path": str(base)}, "customers": listed, **content}), encoding="utf-8")
    return path


def state(client: Any, name: str) -> dict[str, Any]:
    """All that the server holds of a fleet, with the times of the last change."""
    tag = f"prefixfleet:{name}"
    found = {d.id: d for d in client.read_deployments() if tag in d.tags}
    return {
        "deployments": sorted((str(i), str(d.updated), d.name, d.parameters) for i, d in found.items()),
        "schedules": sorted((str(s.id), str(s.updated), s.slug) for d in found.values() for s in d.schedules),
        "pools": sorted((p.name, str(p.updated), p.concurrency_limit) for p in client.read_work_pools()),
        "queues": sorted((q.name, str(q.id), q.priority) for q in client.read_work_queues()),
        "automations": sorted((a.name, str(a.id)) for a in client.read_automations()),
    }


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


def told(changes: list[deploy.Change]) -> list[tuple[str, str, str]]:
    return [(change.action, change.kind, change.name) for change in changes]


def test_deploying_makes_everything_once_and_a_second_time_changes_nothing(
    home: Home, tmp_path: Path, example_base: Path, client: Any
) -> None:
    pool = f"gpu-{uuid.uuid4().hex[:6]}"
    file = write(
        tmp_path / "fleet.yaml",
        example_base,
        name="nightly",
        schedule={"cron": "0 3 * * *", "timezone": "Europe/Berlin"},
        customers=[
            "acme",
            {"id": "bolt", "schedule": "0 5 * * *"},
            {"id": "crisp", "schedule": "0 5 * * *"},
            {"id": "crisp", "task": "menu", "schedule": "30 1 * * 1"},
        ],
        launch={"work_pool": pool},
        work_pools={pool: {"concurrency_limit": 3}},
        deploy={"maintain": "0 6 * * 0", "env": {"HF_HUB_OFFLINE": "1"}},
    )
    before = state(client, "nightly")
    planned = deploy.deploy(file, home, dry_run=True)
    assert state(client, "nightly") == before, "a dry run changes nothing"
    done = deploy.deploy(file, home)
    assert told(done) == told(planned)
    assert {(kind, name) for _, kind, name in told(done) if kind == "deployment"} == {
        ("deployment", name)
        for name in (*(f"{flow}/nightly" for flow in ("fleet", "customer", "sweep", "maintain")), f"job/{pool}")
    }
    fleet = client.read_deployment_by_name("fleet/nightly")
    assert fleet.parameters == {"fleet_file": str(file)} and fleet.entrypoint == "flows.fleet.fleet"
    told_to = {"PREFIXFLEET_HOME": str(home.root), "HF_HUB_OFFLINE": "1", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    assert fleet.job_variables["env"] == told_to
    # A run whose worker is gone is called crashed: several heartbeats fit into the silence that it takes.
    (dead,) = client.read_automations_by_name("prefixfleet:nightly dead runs")
    assert dead.trigger.within.total_seconds() > 3 * 30 and dead.actions[0].state.value == "CRASHED"
    assert fleet.global_concurrency_limit.limit == 1, "two runs of one fleet do not overlap"
    when = {(s.schedule.cron, s.schedule.timezone): s.parameters for s in fleet.schedules}
    assert when == {
        ("0 3 * * *", "Europe/Berlin"): {},
        ("0 5 * * *", "UTC"): {"customers": ["bolt/default", "crisp/default"]},
        ("30 1 * * 1", "UTC"): {"customers": ["crisp/menu"]},
    }
    (own,) = client.read_deployment_by_name("maintain/nightly").schedules
    assert own.schedule.cron == "0 6 * * 0"
    assert client.read_work_pool(pool).concurrency_limit == 3
    assert client.read_deployment_by_name("customer/nightly").work_queue_name == "prefixfleet-on-demand"

    after = state(client, "nightly")
    assert deploy.deploy(file, home) == [] and state(client, "nightly") == after


def test_workers_are_told_of_mlflow_servers_and_of_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.launch import told_to_workers

    for name, address in (("MLFLOW_TRACKING_URI", "http://mlflow:5000"), ("MLFLOW_REGISTRY_URI", "https://me:secret@registry")):
        monkeypatch.setenv(name, address)
    assert told_to_workers(Path("/data")) == {"PREFIXFLEET_HOME": "/data", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}


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


def test_what_is_no_longer_in_the_file_goes_and_what_others_made_stays(
    home: Home, tmp_path: Path, example_base: Path, client: Any
) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    pool = f"gpu-{uuid.uuid4().hex[:6]}"
    more: dict[str, Any] = {"launch": {"work_pool": pool}, "work_pools": {pool: {"concurrency_limit": 3}}}
    first = write(tmp_path / "one.yaml", example_base, name=f"one{pool}", **more)
    second = write(
        tmp_path / "two.yaml",
        example_base,
        name=f"two{pool}",
        schedule="0 3 * * *",
        customers=["acme", {"id": "bolt", "schedule": "0 5 * * *"}, {"id": "crisp", "schedule": "0 5 * * *"}],
        **more,
    )
    deploy.deploy(first, home)
    deploy.deploy(second, home)
    mine = client.read_deployment_by_name(f"fleet/two{pool}")
    by_hand = DeploymentScheduleCreate(schedule=CronSchedule(cron="1 1 1 1 *"), slug="christmas")
    client.create_deployment_schedules(mine.id, [by_hand])
    flow = client.create_flow_from_name("fleet")
    client.create_deployment(flow, f"hand{pool}", tags=["operators"])
    paused = next(s for s in mine.schedules if s.slug == "fleet")
    client.update_deployment_schedule(mine.id, paused.id, active=False)
    other = state(client, f"one{pool}")["deployments"]

    content = yaml.safe_load(second.read_text(encoding="utf-8"))
    content |= {
        "customers": content["customers"][:2],
        "launch": {},
        "work_pools": {pool: {"concurrency_limit": 5}},
        "schedule": "0 4 * * *",
    }
    second.write_text(yaml.safe_dump(content), encoding="utf-8")
    changes = deploy.deploy(second, home)
    assert ("update", "work pool", pool) in told(changes) and ("update", "deployment", f"job/{pool}") in told(changes)
    schedules = {s.slug: s for s in client.read_deployment_by_name(f"fleet/two{pool}").schedules}
    assert schedules["fleet"].schedule.cron == "0 4 * * *" and not schedules["fleet"].active, "who paused it knows why"
    (hour,) = [s for slug, s in schedules.items() if str(slug).startswith("hour-")]
    assert hour.parameters == {"customers": ["bolt/default"]} and "christmas" in schedules
    job = client.read_deployment_by_name(f"job/{pool}")
    assert job.tags == ["prefixfleet", f"prefixfleet:one{pool}"], "the other fleet has it yet"
    assert client.read_deployment_by_name(f"fleet/hand{pool}").tags == ["operators"]
    now = state(client, f"one{pool}")["deployments"]
    assert [one for one in now if one[2] != pool] == [one for one in other if one[2] != pool]

    content = yaml.safe_load(first.read_text(encoding="utf-8"))
    first.write_text(yaml.safe_dump(content | {"launch": {}}), encoding="utf-8")
    assert ("remove", "deployment", f"job/{pool}") in told(deploy.deploy(first, home)), "the last one out"


def test_a_forgotten_customer_gets_no_schedule(home: Home, tmp_path: Path, example_base: Path, client: Any) -> None:
    from pipeline.registry.forget import forget_in_mlflow

    name = f"f{uuid.uuid4().hex[:8]}"
    customers = [{"id": one, "schedule": "0 5 * * *"} for one in ("acme", "bolt")]
    file = write(tmp_path / "fleet.yaml", example_base, name=name, customers=customers)
    deploy.deploy(file, home)
    forget_in_mlflow("bolt", home=home)
    (change,) = deploy.deploy(file, home)
    assert (change.action, change.kind) == ("update", "schedule") and "- bolt/default" in " ".join(change.what)
    (schedule,) = client.read_deployment_by_name(f"fleet/{name}").schedules
    assert schedule.parameters == {"customers": ["acme/default"]}


def test_odd_names_of_fleets_do_not_meet(home: Home, tmp_path: Path, example_base: Path, client: Any) -> None:
    names = ["Ünïcode / <b>&%?#..{{ flow.name }}\n", "n code b flow name", "x" * 300]
    for number, name in enumerate(names):
        deploy.deploy(write(tmp_path / f"{number}.yaml", example_base, name=name), home)
    files = {d.parameters["fleet_file"] for d in client.read_deployments() if d.entrypoint == "flows.fleet.fleet"}
    assert {str(tmp_path / f"{number}.yaml") for number in range(len(names))} <= files
    assert all(deploy.deploy(tmp_path / f"{number}.yaml", home, dry_run=True) == [] for number in range(len(names)))


def test_a_name_that_is_taken_is_refused_and_nothing_is_changed(
    home: Home, tmp_path: Path, example_base: Path, client: Any
) -> None:
    name = f"f{uuid.uuid4().hex[:8]}"
    deploy.deploy(write(tmp_path / "one.yaml", example_base, name=name), home)
    before = state(client, name)
    with pytest.raises(ConfigError, match=r"one\.yaml.*set `name:`"):
        deploy.deploy(write(tmp_path / "two.yaml", example_base, name=name, schedule="0 3 * * *"), home)
    flow = client.create_flow_from_name("sweep")
    client.create_deployment(flow, f"{name}x")
    with pytest.raises(ConfigError, match="somebody else made it"):
        deploy.deploy(write(tmp_path / "three.yaml", example_base, name=f"{name}x"), home)
    assert state(client, name) == before and state(client, f"{name}x")["deployments"] == []


def test_a_pool_that_nobody_describes_and_a_block_that_is_not_there_are_errors_with_a_remedy(
    home: Home, tmp_path: Path, example_base: Path
) -> None:
    file = write(tmp_path / "fleet.yaml", example_base, launch={"work_pool": "nowhere"})
    with pytest.raises(ConfigError, match=r"no work pool 'nowhere'.*work_pools"):
        deploy.deploy(file, home)
    with pytest.raises(ConfigError, match="work pool type 'abacus'"):
        deploy.deploy(write(file, example_base, work_pools={"odd": {"type": "abacus"}}), home)
    with pytest.raises(ConfigError, match=r"deploy\.notify: the server has no block slack-webhook/nobody"):
        deploy.deploy(write(file, example_base, deploy={"notify": "slack-webhook/nobody"}), home)


def test_a_block_is_told_of_failed_runs_of_its_fleet_and_its_address_to_nobody(
    home: Home, tmp_path: Path, example_base: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.blocks.webhook import Webhook
    from prefect.states import Failed

    told_of: list[bytes] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told_of.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        name = f"f{uuid.uuid4().hex[:8]}"
        Webhook(url=f"http://127.0.0.1:{receiver.server_port}/?token=hidden").save(name)
        files = {
            own: write(tmp_path / f"{own}.yaml", example_base, name=own, deploy={"notify": f"webhook/{name}"})
            for own in (name, f"{name}x")
        }
        assert all(cli.main(["deploy", str(file)]) == 0 for file in files.values())
        assert cli.main(["deploy", str(files[name]), "--json"]) == 0
        said = capsys.readouterr()
        assert "hidden" not in said.out + said.err and '"changes": []' in said.out
        made = client.read_deployment_by_name(f"customer/{name}").id
        run = client.create_flow_run_from_deployment(made, parameters={"customer_id": "acme"}, name="acme · retrain")
        deadline = time.monotonic() + 30
        # The server learns of a new automation within a second or two.
        while not told_of and time.monotonic() < deadline:
            client.set_flow_run_state(run.id, Failed(message='the "loss" is\nNaN'), force=True)
            time.sleep(1)
        assert json.loads(told_of[0]) == {"text": 'acme · retrain: Failed. the "loss" is\nNaN'}
        content = yaml.safe_load(files[name].read_text(encoding="utf-8"))
        files[name].write_text(yaml.safe_dump({**content, "deploy": {"notify": None}}), encoding="utf-8")
        assert told(deploy.deploy(files[name], home)) == [("remove", "automation", f"prefixfleet:{name} failed runs")]
        assert len(client.read_automations_by_name(f"prefixfleet:{name}x failed runs")) == 1
        receiver.shutdown()


def test_the_command_shows_the_difference_and_needs_a_server(
    home: Home, tmp_path: Path, example_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "fleet.yaml", example_base, name=f"f{uuid.uuid4().hex[:8]}", schedule="0 3 * * *")
    assert cli.main(["deploy", str(file), "--dry-run", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["dry_run"] and ("create", "schedule") in [(one["action"], one["kind"]) for one in content["changes"]]
    assert cli.main(["deploy", str(file)]) == 0
    assert "+ schedule" in capsys.readouterr().out
    assert cli.main(["deploy", str(file)]) == 0
    assert "nothing" in capsys.readouterr().out
    monkeypatch.delenv("PREFECT_API_URL")
    assert cli.main(["deploy", str(file)]) == cli.USAGE
    assert "PREFECT_API_URL" in capsys.readouterr().err
