"""`prefect.yaml`, for those who deploy by hand: what it names is there, and takes what it gives."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BY_HAND = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))


def test_every_flow_that_a_fleet_needs_is_deployed_by_hand_once() -> None:
    found = [one["entrypoint"] for one in BY_HAND["deployments"]]
    assert sorted(found) == [f"flows.{name}.{name}" for name in ("customer", "fleet", "maintain", "sweep")]


@pytest.mark.parametrize("deployment", BY_HAND["deployments"], ids=lambda one: one["entrypoint"])
def test_what_is_deployed_by_hand_is_a_flow_that_takes_its_parameters(deployment: dict[str, Any]) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.flows import load_flow_from_entrypoint

    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    given = deployment["parameters"]
    # What has no default and is not given is asked for in the UI: the customer, and nothing else.
    assert set(given) <= set(flow.parameters.properties)
    assert set(flow.parameters.required or ()) - set(given) <= {"customer", "customer_id"}
    asked = {name: "acme" for name in set(flow.parameters.required or ()) - set(given)}
    assert flow.validate_parameters({**asked, **given})["fleet_file"] == Path(given["fleet_file"])
    assert (ROOT / given["fleet_file"]).is_file()
    for schedule in deployment.get("schedules", ()):
        when = {name: schedule[name] for name in ("cron", "timezone")}
        assert DeploymentScheduleCreate(schedule=when, slug=schedule["slug"], active=schedule["active"]).slug  # type: ignore[arg-type]
