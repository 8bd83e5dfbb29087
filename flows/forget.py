"""`prefixfleet forget`: everything that was made from one customer's data, wherever it lies: in MLflow, on this machine, in Prefect.

In: a customer's id. Out: a `Forgotten` that says what is gone and what is not. MLflow comes first, for its tombstone keeps others from beginning
anew. Of a Prefect server that others use too, only what is of our flows is removed. Each part finds what is left by itself, so a process that is
killed is simply run again. Imports Prefect only where there is a Prefect.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flows import locks
from flows.events import emit
from flows.prefect_api import pages, prefect_api
from pipeline.errors import ConfigError, PrefixFleetError
from pipeline.home import Home
from pipeline.keys import DEFAULT_TASK, CustomerKey, validate_id
from pipeline.leftovers import give_up_free_pages, remove_leftovers, tasks_on_disk
from pipeline.registry.forget import Forgotten, forget_in_mlflow

TAG = "prefixfleet"
# Others may have flows of these names too: see `_ours`.
_FLOWS = ("fleet", "customer", "sweep", "maintain", "job")
_OUR_PARAMETERS = {"fleet_file", "job_file"}


def forget(customer: str, home: Home, backend_store_uri: str | None = None) -> Forgotten:
    """Remove all traces of a customer, all its tasks.

    Args:
        customer: an id, without a task.
        home: whose files, embedded MLflow and embedded Prefect.
        backend_store_uri: the database behind the MLflow server, if this process can reach it.

    Raises:
        ConfigError: no valid id.
        PrefixFleetError: a run is at work on the customer, or MLflow or Prefect do not answer. What is removed stays removed: run it again.
    """
    validate_id(customer)
    keys = {CustomerKey(customer, DEFAULT_TASK), *tasks_on_disk(home, customer)}
    with contextlib.ExitStack() as stack:
        # A sweep and a drift check hold their customer in a home of their own.
        own = [place for key in sorted(keys) for place in (home.sweep(key), home.drift(key))]
        homes = [home, *(Home(place) for place in own if place.is_dir())]
        if not all([stack.enter_context(locks.holding_all_of(one, customer)) for one in homes]):
            raise PrefixFleetError(
                f"customer {customer}: a run is at work on {customer}. Stop it or wait for it, and run the "
                "same command again. Nothing was removed."
            )

        def count(done: int, total: int) -> None:
            emit({"stage": "forget", "done": done, "total": total, "unit": "entries of MLflow"})

        done = forget_in_mlflow(customer, backend_store_uri, home, count)
        done.removed += remove_leftovers(home, customer)
        # Where there never was a Prefect, none is started.
        database = home.prefect / "prefect.db"
        if os.environ.get("PREFECT_API_URL") or database.exists():
            with prefect_api(home):
                from prefect.client.orchestration import get_client

                with get_client(sync_client=True) as client:
                    done.removed += forget_in_prefect(client, customer)
            if not os.environ.get("PREFECT_API_URL"):  # our own Prefect, which has ended
                done.left += filter(None, [give_up_free_pages(database)])
    return done


def forget_in_prefect(client: Any, customer: str) -> Iterator[str]:
    """Remove our deployments and schedules that train the customer, our flow runs that were about it alone, and its rows in the tables of others
    of ours.

    Args:
        client: of Prefect, synchronous.
        customer: an id.

    Returns:
        what was removed, in words.
    """
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    named = FlowFilter(name=FlowFilterName(any_=list(_FLOWS)))
    deployments = [one for one in pages(client.read_deployments, flow_filter=named) if _ours(one)]
    yield from _deployments(client, deployments, customer)
    runs = [run for run in pages(client.read_flow_runs, flow_filter=named) if _ours(run)]
    own = [run.id for run in runs if _without(run.parameters or {}, customer) is None]
    yield from _artifacts(client, customer, {run.id for run in runs}, set(own))
    # With a flow run go its task runs and its log.
    for run in own:
        client.delete_flow_run(run)
    if own:
        yield f"{len(own)} Prefect flow runs about {customer} alone"


def _ours(one: Any) -> bool:
    """Whether a deployment or flow run of a flow that is called as one of ours is of ours: others may have a flow `customer` too."""
    by_hand = str(getattr(one, "entrypoint", None) or "").replace("/", ".").startswith(tuple(f"flows.{flow}." for flow in _FLOWS))
    return TAG in one.tags or by_hand or not _OUR_PARAMETERS.isdisjoint(one.parameters or {})


def _deployments(client: Any, deployments: Iterable[Any], customer: str) -> Iterator[str]:
    from prefect.client.schemas.actions import DeploymentUpdate

    for deployment in deployments:
        left = _without(deployment.parameters or {}, customer)
        if left is None:
            client.delete_deployment(deployment.id)
            yield f"Prefect deployment {deployment.name}"
            continue
        if left != deployment.parameters:
            client.update_deployment(deployment.id, DeploymentUpdate(parameters=left))
            yield f"{customer} in Prefect deployment {deployment.name}"
        for schedule in deployment.schedules or []:
            others = _without(schedule.parameters or {}, customer)
            if others is None:
                client.delete_deployment_schedule(deployment.id, schedule.id)
                yield f"a schedule of Prefect deployment {deployment.name}"
            elif others != (schedule.parameters or {}):
                # Customers with the same hour share a schedule.
                client.update_deployment_schedule(deployment.id, schedule.id, parameters=others)
                yield f"{customer} in a schedule of Prefect deployment {deployment.name}"


def _artifacts(client: Any, customer: str, ours: set[Any], own: set[Any]) -> Iterator[str]:
    """Those of the flow runs `own`, and the customer's rows in the tables of `ours`."""
    from prefect.client.schemas.actions import ArtifactUpdate

    changed = 0
    for artifact in pages(client.read_artifacts, sort=None):
        if artifact.flow_run_id in own:
            client.delete_artifact(artifact.id)
            changed += 1
            continue
        if artifact.flow_run_id not in ours or artifact.type != "table" or not isinstance(artifact.data, str):
            continue
        rows = json.loads(artifact.data)
        if not isinstance(rows, list):
            continue
        others = [row for row in rows if not (isinstance(row, dict) and _is(str(row.get("customer", "")), customer))]
        if len(others) < len(rows):
            client.update_artifact(artifact.id, ArtifactUpdate(data=json.dumps(others)))
            changed += 1
    if changed:
        yield f"{customer} in {changed} Prefect artifacts"


def _without(parameters: Mapping[str, Any], customer: str) -> dict[str, Any] | None:
    """Parameters of our flows without a customer; None if they are about nobody else."""
    if any(_is(str(parameters.get(name) or ""), customer) for name in ("customer_id", "customer")):
        return None
    named = parameters.get("customers")
    if not isinstance(named, list):
        return dict(parameters)
    others = [name for name in named if not _is(str(name), customer)]
    return None if named and not others else {**parameters, "customers": others}


def _is(name: str, customer: str) -> bool:
    try:
        return CustomerKey.parse(name).customer == customer
    except ConfigError:
        return False
