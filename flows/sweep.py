"""The flow `sweep`: one customer, many settings of its prefix, in one flow run."""

import datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows import jobs
from flows.sweep_work import run_sweep
from pipeline.sweep.grid import AXES


def _run_name() -> str:
    return f"{flow_run.parameters['customer']} · {datetime.date.today().isoformat()} · sweep"


@flow(name="sweep", flow_run_name=_run_name, persist_result=False)
def sweep(
    fleet_file: Path,
    customer: str,
    lengths: list[int] | None = None,
    lrs: list[float] | None = None,
    batch_sizes: list[int] | None = None,
    steps: list[int] | None = None,
    inits: list[str] | None = None,
    seeds: list[int] | None = None,
    metric: str | None = None,
) -> dict[str, Any]:
    """Try every combination of the values given for one customer, and say which is best.

    Args:
        fleet_file: see `pipeline.config`.
        customer: ID, or ID/TASK.
        lengths, lrs, batch_sizes, steps, inits, seeds: what to try; without any, some lengths.
        metric: what decides on the dev split; by default that of the customer's gate.

    Returns:
        the content of sweep.json and `folder`, where it lies.
    """
    values = dict(zip(AXES, (lengths, lrs, batch_sizes, steps, inits, seeds), strict=True))
    logger = get_run_logger()
    content, folder = run_sweep(fleet_file, customer, {axis: own for axis, own in values.items() if own}, metric, logger)
    try:
        # Keys hold lower-case letters, digits and dashes.
        key = f"sweep-{jobs.readable(content['customer'])}-{jobs.readable(content['task'])}"
        create_markdown_artifact(
            (folder / "sweep.md").read_text(encoding="utf-8"), key=key, description=f"Page: {folder / 'sweep.html'}"
        )
    except Exception as error:  # Prefect's own or its server's: the work is done
        logger.warning("the table could not be left as an artifact: %s", error)
    return {**content, "folder": str(folder)}
