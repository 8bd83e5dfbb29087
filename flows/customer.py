"""The flow `customer`: one customer on demand. The fleet flow never calls it: a flow run a customer would cost half a second each.

Its parameters are the models of the fleet file, so that Prefect's UI makes a form of them and checks what is typed.
"""

import datetime
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from flows import dispatch
from flows.fleet import THREADS, bring_up_to_date
from pipeline.config import EvaluationSettings, Fleet, PrefixSettings, TrainingSettings, with_settings
from pipeline.keys import ID_PATTERN


def _run_name() -> str:
    """Until it is known what is due: then `work.Work.name` is the run's name."""
    return f"{flow_run.parameters['customer_id']} · {datetime.date.today().isoformat()} · on demand"


@flow(
    name="customer",
    flow_run_name=_run_name,
    task_runner=THREADS,
    persist_result=False,
    on_cancellation=[dispatch.cancel_jobs_of],
)
def customer(
    fleet_file: Path,
    customer_id: Annotated[
        str, Field(pattern=f"^{ID_PATTERN}(/{ID_PATTERN})?$", description="acme, or acme/menu for one of its tasks")
    ],
    prefix: PrefixSettings | None = None,
    training: TrainingSettings | None = None,
    evaluation: EvaluationSettings | None = None,
    force: bool = False,
) -> Any:
    """Bring one customer up to date.

    Settings given here are laid over those of the fleet file, key by key, for this run alone: the next run that goes by the file goes back to what
    that says.

    Args:
        fleet_file: the fleet file that the customer is in.
        customer_id: `acme` (all its tasks) or `acme/menu`.
        prefix, training, evaluation: sections of the fleet file; only what differs need be given.
        force: train again although nothing has changed.

    Returns:
        A state that holds a `flows.work.Outcome`.
    """
    given = {"prefix": prefix, "training": training, "evaluation": evaluation}
    own = {name: section.model_dump(exclude_unset=True) for name, section in given.items() if section is not None}

    def change(fleet: Fleet) -> Fleet:
        wanted = {one.key for one in fleet.select([customer_id])}
        changed = tuple(with_settings(one, own) if one.key in wanted else one for one in fleet.customers)
        return fleet.model_copy(update={"customers": changed})

    return bring_up_to_date(fleet_file, [customer_id], force, change if own else None)
