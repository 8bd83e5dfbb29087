"""The stages as Prefect tasks: thin wrappers, retried where a retry can help. What they do is in `flows.work` and `pipeline`."""

from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows import artifacts, work
from flows.jobs import PlannedJob
from flows.launch import ProcessCrash
from pipeline.base import BaseModelInfo
from pipeline.config import Customer
from pipeline.errors import RegistryError
from pipeline.home import Home
from pipeline.training.job import JobCustomer


def _crashed(task: Any, run: Any, state: Any) -> bool:
    """Whether a child process was killed or crashed, which it may not be the next time; a refused job stays refused."""
    return isinstance(state.result(raise_on_failure=False), ProcessCrash)


def _mlflow_failed(task: Any, run: Any, state: Any) -> bool:
    """Whether it was MLflow that failed; what is wrong with a prefix or its evaluation stays wrong."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, RegistryError) and error.__cause__ is not None


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
    retry_condition_fn=_crashed,
)
def run_job(planned: PlannedJob, stage: str) -> None:
    """Train or evaluate the customers of one job in a child process, whose output goes to this run's log."""
    try:
        work.run_job(planned, stage, get_run_logger(), artifacts.JobProgress(planned.job.name, stage))
    finally:
        if stage == "train":
            artifacts.leave_losses(planned)


@task(
    task_run_name="register {member.customer} {member.task}",
    persist_result=False,
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=_mlflow_failed,
)
def register(member: JobCustomer, home: Home) -> work.Registered:
    """Register one customer's prefix."""
    registered = work.register(member, home)
    get_run_logger().info("%s: version %s%s", member.key, registered.version, f", {registered.alias}" if registered.alias else "")
    return registered
