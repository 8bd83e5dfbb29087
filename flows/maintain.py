"""The flow `maintain`: stores brought into order, champions judged on rows that arrived since."""

import datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import jobs
from flows.maintain_work import Upkeep, run_maintain


def _run_name() -> str:
    dry = " · dry run" if flow_run.parameters.get("dry_run") else ""
    return f"{Path(flow_run.parameters['fleet_file']).stem} · {datetime.date.today().isoformat()} · maintain{dry}"


@flow(name="maintain", flow_run_name=_run_name, persist_result=False)
def maintain(fleet_file: Path, dry_run: bool = False) -> Any:
    """Register prefixes left behind, queue champions that have fallen for training, and remove what nobody needs any more.

    Args:
        fleet_file: see `pipeline.config`; its `retention` says what may go, its customers' `retrain` which champions are judged.
        dry_run: only say what would be done.

    Returns:
        A state that holds a `flows.maintain_work.Upkeep`.
    """
    logger = get_run_logger()
    done = run_maintain(fleet_file, logger, dry_run=dry_run)
    for line in [*(f"{'would remove' if dry_run else 'removed'} {one.name}: {one.why}" for one in done.removed), *done.left]:
        logger.info("%s", line)
    _leave_table(done, logger)
    if done.failed:
        return Failed(message=f"{len(done.failed)} things could not be done: {done.failed[0]}", data=done)
    fallen = sum(one.status == "fallen" for one in done.drift)
    return Completed(
        message=f"{len(done.removed)} removed, {len(done.registered)} registered, {fallen} champions fallen", data=done
    )


def _leave_table(done: Upkeep, logger: Any) -> None:
    rows = [
        *({"what": "registered", "name": name, "why": "was left behind"} for name in done.registered),
        *(
            {"what": one.status, "name": one.customer, "why": f"{one.metric} {one.recorded} → {one.now} on {one.rows} new rows"}
            for one in done.drift
        ),
        *({"what": "removed", "name": one.name, "why": one.why} for one in done.removed),
        *({"what": "left", "name": "", "why": why} for why in (*done.left, *done.failed)),
    ]
    try:
        create_table_artifact(
            key=f"maintain-{jobs.readable(done.fleet)}", table=rows, description="dry run" if done.dry_run else ""
        )
    except Exception as error:  # Prefect's own or its server's: the work is done
        logger.warning("the table could not be left as an artifact: %s", error)
