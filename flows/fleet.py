"""The flow `fleet`: every customer of a fleet file from data to registered prefix, in one flow run with tasks per customer."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, unmapped
from prefect.artifacts import create_table_artifact
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import jobs, tasks, work
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry import ensure_store


def _run_name() -> str:
    wanted = flow_run.parameters.get("customers")
    who = ", ".join(wanted[:5]) + (" …" if len(wanted) > 5 else "") if wanted else "all customers"
    return f"{Path(flow_run.parameters['fleet_file']).stem} · {datetime.date.today().isoformat()} · {who}"


# More threads would only wait for one another: preparing is serial, registering writes to one store.
THREADS: Any = ThreadPoolTaskRunner(max_workers=4)


@flow(name="fleet", flow_run_name=_run_name, task_runner=THREADS, persist_result=False)
def fleet(fleet_file: Path, customers: list[str] | None = None) -> Any:
    """Bring a fleet up to date: prepare, train, evaluate and register whoever is due, and leave the others alone.

    A customer that fails goes no further and is reported; the others finish, and the run ends as failed.

    Args:
        fleet_file: see `pipeline.config`.
        customers: only these; by default all.

    Returns:
        A state that holds a `flows.work.Outcome`.
    """
    return bring_up_to_date(fleet_file, customers)


def bring_up_to_date(fleet_file: Path, customers: list[str] | None) -> State[work.Outcome]:
    """The body of both flows; must run inside one."""
    home = Home.current()
    ensure_store(home)
    todo = work.open_work(fleet_file, customers, home)
    with work.alone(todo):
        _work_through(todo)
        outcome = work.outcome(todo)
    _leave_table(outcome)
    failed = [row.key for row in outcome.failed]
    if failed:
        return Failed(message=f"{len(failed)} of {len(outcome.rows)} customers failed: {', '.join(failed[:20])}", data=outcome)
    return Completed(message=f"all {len(outcome.rows)} customers are up to date", data=outcome)


def _leave_table(outcome: work.Outcome) -> None:
    """The table of the run as a Prefect artifact; each run of a fleet adds one under the same key."""
    rows = [
        {
            "customer": row.key,
            "result": "failed" if row.error else row.decision or row.status,
            "metric": row.metric,
            "signature": row.signature,
            "base": row.base_score,
            "champion": row.champion_score,
            "prefix": None if row.score is None else row.score["score"],
            "low": None if row.score is None else row.score["low"],
            "high": None if row.score is None else row.score["high"],
            "version": row.version,
            "alias": row.alias,
            "why": row.error or "; ".join(row.reasons),
        }
        for row in outcome.rows
    ]
    try:
        # Keys hold lower-case letters, digits and dashes.
        create_table_artifact(key=f"fleet-{jobs.readable(outcome.fleet)}", table=rows, description=f"Report: {outcome.report}")
    except Exception as error:  # Prefect's own or its server's: the work is done and registered
        get_run_logger().warning("the table could not be left as an artifact: %s", error)


def _work_through(todo: work.Work) -> None:
    with todo.timed("prepare"):
        due = todo.is_due("prepare")
        futures = tasks.prepare.map(due, unmapped(todo.base), unmapped(todo.home))
        _settle(todo, "prepare", [c.key for c in due], futures, todo.prepared)

    for job in todo.plan():
        for stage in ("train", "evaluate"):
            with todo.timed(stage):
                _run_job(todo, job, stage)

    with todo.timed("register"):
        members = todo.ready_to_register()
        registering = tasks.register.map(members, unmapped(todo.home))
        _settle(todo, "register", [m.key for m in members], registering, todo.registered)
        work.log_evaluations(todo)


def _run_job(todo: work.Work, job: jobs.PlannedJob, stage: str) -> None:
    members = jobs.due_in(job, stage)
    if members:
        ended = tasks.run_job(job, stage, return_state=True).result(raise_on_failure=False)
        todo.finished(job, members, stage, ended if isinstance(ended, BaseException) else None)


def _settle(
    todo: work.Work,
    stage: str,
    keys: Sequence[CustomerKey],
    futures: Sequence[PrefectFuture[Any]],
    keep: Callable[[CustomerKey, Any], None],
) -> None:
    """Wait for the tasks of all customers, keep each one's result, and note who failed."""
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
