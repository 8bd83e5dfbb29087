"""The flow `customer`: one customer on demand. The fleet flow never calls it: a flow run a customer would cost half a second each."""

import datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.fleet import THREADS, bring_up_to_date


def _run_name() -> str:
    return f"{flow_run.parameters['customer_id']} · {datetime.date.today().isoformat()} · on demand"


@flow(name="customer", flow_run_name=_run_name, task_runner=THREADS, persist_result=False)
def customer(fleet_file: Path, customer_id: str) -> Any:
    """Bring one customer up to date.

    Args:
        fleet_file: the fleet file that the customer is in.
        customer_id: `acme` (all its tasks) or `acme/menu`.

    Returns:
        A state that holds a `flows.work.Outcome`.
    """
    return bring_up_to_date(fleet_file, [customer_id])
