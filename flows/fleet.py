"""The flow `fleet`: every customer of a fleet file from data to registered prefix, in one flow run with tasks per customer and jobs for many."""

import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, unmapped
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import artifacts, dispatch, jobs, tasks, work
from pipeline.config import Fleet
from pipeline.errors import ConfigError
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry import ensure_store
from pipeline.training.job import JobCustomer


def _run_name() -> str:
    """Until it is known what is due: then `work.Work.name` is the run's name."""
    wanted = flow_run.parameters.get("customers")
    who = ", ".join(wanted[:5]) + (" …" if len(wanted) > 5 else "") if wanted else "all customers"
    return f"{Path(flow_run.parameters['fleet_file']).stem} · {datetime.date.today().isoformat()} · {who}"


# The tag that Prefect's scheduler gives the runs that it makes.
_SCHEDULED = "auto-scheduled"
# More threads would only wait for one another: preparing is serial, registering writes to one store.
THREADS: Any = ThreadPoolTaskRunner(max_workers=4)


@flow(
    name="fleet",
    flow_run_name=_run_name,
    task_runner=THREADS,
    persist_result=False,  # what is finished lies in folders named by digests, which is what a run that goes on looks at
    on_cancellation=[dispatch.cancel_jobs_of],
)
def fleet(fleet_file: Path, customers: list[str] | None = None, force: bool = False) -> Any:
    """Bring a fleet up to date: prepare, train, evaluate and register whoever is due, and leave the others alone.

    A customer that fails goes no further and is reported; the others finish, and the run ends as failed.

    Args:
        fleet_file: see `pipeline.config`.
        customers: only these; by default all, without those whose own hour has not come. Names that are not in the file are reported as failed.
        force: train those named again although nothing has changed.

    Returns:
        A state that holds a `flows.work.Outcome`.
    """
    return bring_up_to_date(fleet_file, customers, force)


def bring_up_to_date(
    fleet_file: Path, customers: list[str] | None, force: bool = False, change: Callable[[Fleet], Fleet] | None = None
) -> State[work.Outcome]:
    """The body of both flows; must run inside one.

    Args:
        fleet_file, customers, force: see `fleet`.
        change: made to the fleet after it is read.
    """
    home = Home.current()
    ensure_store(home)
    # A deployment's customers may be of an older file: one that is gone is no reason to leave the others.
    todo = work.open_work(fleet_file, customers, home, change, strict=False)
    todo.scheduled = _SCHEDULED in flow_run.tags
    if force and not customers:
        raise ConfigError("force trains customers again although nothing has changed; name them.")
    _check_pools(todo)
    with work.alone(todo, again=str(flow_run.id) if force else None):
        _rename(todo.name())
        _work_through(todo)
        outcome = work.outcome(todo)
    artifacts.leave_table(outcome)
    failed = [row.key for row in outcome.failed]
    if failed:
        return Failed(message=f"{len(failed)} of {len(outcome.rows)} customers failed: {', '.join(failed[:20])}", data=outcome)
    return Completed(message=f"all {len(outcome.rows)} customers are up to date", data=outcome)


def _check_pools(todo: work.Work) -> None:
    pools = sorted({customer.launch.work_pool for customer in todo.customers if customer.launch.work_pool is not None})
    if pools and not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            f"launch.work_pool: {pools[0]}: jobs on a work pool need a Prefect server. Set PREFECT_API_URL to its address, or remove work_pool to "
            "run them here."
        )


def _rename(name: str) -> None:
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=name)
    except Exception as error:  # Prefect's own or its server's: a name is no reason to stop
        get_run_logger().warning("the run could not be renamed: %s", error)


def _work_through(todo: work.Work) -> None:
    with todo.timed("prepare"):
        due = todo.is_due("prepare")
        futures = tasks.prepare.map(due, unmapped(todo.base), unmapped(todo.home))
        _settle(todo, "prepare", [c.key for c in due], futures, todo.prepared)

    planned = todo.plan()
    for job in planned:
        jobs.keep(job)
    registering: dict[CustomerKey, PrefectFuture[Any]] = {}

    def register(members: Sequence[JobCustomer]) -> None:
        new = [member for member in members if member.key not in registering]
        if new:
            registering.update(zip([m.key for m in new], tasks.register.map(new, unmapped(todo.home)), strict=True))

    # Customers do not wait for other jobs to become champions.
    dispatch.work_through(todo, planned, lambda job: register(todo.ready_to_register(job.job.customers)))
    with todo.timed("register"):
        register(todo.ready_to_register())
        _settle(todo, "register", list(registering), list(registering.values()), todo.registered)
        work.log_evaluations(todo)


def _settle(
    todo: work.Work,
    stage: str,
    keys: Sequence[CustomerKey],
    futures: Sequence[PrefectFuture[Any]],
    keep: Callable[[CustomerKey, Any], None],
) -> None:
    """Wait for the tasks of all customers, keep each one's result, and note who failed."""
    if not keys:
        return
    of = dict(zip(futures, keys, strict=True))
    count = work.Counter(stage, len(keys))
    for future in as_completed(list(futures)):
        result = future.result(raise_on_failure=False)
        if isinstance(result, BaseException):
            todo.fail(of[future], stage, result)
        else:
            try:
                keep(of[future], result)
            except Exception as error:  # of whatever kind: the other customers are not to suffer
                todo.fail(of[future], stage, error)
        count.step()
