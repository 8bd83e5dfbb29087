"""The stages as Prefect tasks: thin wrappers, retried where a retry can help. What they do is in `flows.work` and `pipeline`."""

from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows import work
from flows.jobs import PlannedJob
from flows.launch import ProcessCrash
from pipeline.base import BaseModelInfo
from pipeline.config import Customer
from pipeline.errors import RegistryError
from pipeline.home import Home
from pipeline.training.job import JobCustomer


def _is(kind: type[Exception]) -> Any:
    """A retry condition: only errors of `kind` may be gone the next time."""

    def condition(task: Any, run: Any, state: Any) -> bool:
        return isinstance(state.result(raise_on_failure=False), kind)

    return condition


@task(task_run_name="prepare {customer.id} {customer.task}", persist_result=False, cache_policy=NO_CACHE)
def prepare(customer: Customer, base: BaseModelInfo, home: Home) -> work.Prepared:
    """Prepare one customer's data."""
    prepared = work.prepare(customer, base, home)
    counts = prepared.card["counts"]
    get_run_logger().info("%s: %s rows used, %s quarantined", customer.key, counts["used"], counts["quarantined"])
    return prepared


@task(
    task_run_name="{stage} {planned.job.name}",
    persist_result=False,
    cache_policy=NO_CACHE,
    retries=1,
    retry_condition_fn=_is(ProcessCrash),
)
def run_job(planned: PlannedJob, stage: str) -> None:
    """Train or evaluate the customers of one job in a child process, whose output goes to this run's log."""
    work.run_job(planned, stage, get_run_logger())


@task(
    task_run_name="register {member.customer} {member.task}",
    persist_result=False,
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=_is(RegistryError),
)
def register(member: JobCustomer) -> work.Registered:
    """Register one customer's prefix."""
    registered = work.register(member)
    get_run_logger().info("%s: version %s%s", member.key, registered.version, f", {registered.alias}" if registered.alias else "")
    return registered
