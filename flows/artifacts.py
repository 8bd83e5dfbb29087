"""What a run leaves in Prefect's UI: the table of the fleet, the progress of a long job, its losses as a picture. None of it is needed by anybody, so
none of it ever fails a run.

Keys of artifacts hold lower-case letters, digits and dashes.
"""

import base64
import contextlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact

from flows import events, jobs
from flows.work import Outcome, Row
from pipeline.errors import PrefixFleetError
from pipeline.files import read_json
from pipeline.keys import CustomerKey
from pipeline.progress import described

_PROGRESS_SECONDS = 10.0  # before the first, and between two
_MOST_ROWS = 1000
_MOST_CURVES = 20


@contextlib.contextmanager
def _best_effort(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Prefect's own or its server's: the work is done
        get_run_logger().warning("%s could not be left as an artifact: %s", what, error)


def leave_table(outcome: Outcome) -> None:
    """The table of a run. Each run of a fleet adds one under the same key. Of a very large fleet only those to whom something happened are in it."""
    rows = outcome.rows
    if len(rows) > _MOST_ROWS:
        rows = [row for row in rows if row.status not in ("unchanged", "waiting")][:_MOST_ROWS]
    left = f" {len(outcome.rows) - len(rows):,} more are in the report." if len(rows) < len(outcome.rows) else ""
    with _best_effort("the table"):
        new = [f"[{row.key} {row.version}]({link})" for row in rows if row.status == "done" and (link := _link(row))]
        links = f"\n\nRegistered: {', '.join(new[:50])}" if new else ""
        create_table_artifact(
            key=f"fleet-{jobs.readable(outcome.fleet)}",
            table=[_cells(row) for row in rows],
            description=f"Report: {outcome.report}.{left}{links}",
        )


def _cells(row: Row) -> dict[str, Any]:
    return {
        "customer": row.key,
        "due": row.why,
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
        "mlflow": _link(row),
        "why": row.error or "; ".join(row.reasons),
    }


def _link(row: Row) -> str | None:
    """Where a browser shows a customer's version, or what MLflow calls it if the store has no pages."""
    if row.version is None:
        return None
    from pipeline.registry.store import shown_uri

    name, store = CustomerKey.parse(row.key).model_name, shown_uri()
    if store.startswith(("http://", "https://")):
        return f"{store.rstrip('/')}/#/models/{name}/versions/{row.version}"
    return f"models:/{name}/{row.version}"


class JobProgress:
    """Hands the events of a job on, and shows them in Prefect's UI once the job has taken a while: call it with each event."""

    def __init__(self, name: str, stage: str) -> None:
        self.key = f"progress-{name}-{stage}"
        self.stage, self.said = stage, time.monotonic()
        self.artifact: UUID | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """One event of the child."""
        events.emit(event)
        total, now = event.get("total"), time.monotonic()
        if event["stage"] != self.stage or not total or (now - self.said < _PROGRESS_SECONDS and not self._last(event)):
            return
        self.said = now
        told = described(
            {name: value for name, value in event.items() if name not in ("stage", "done", "total", "unit", "skipped")}
        )
        words = f"{event.get('done', 0):,} of {total:,} {event.get('unit', '')}  {told}"
        share = min(100.0, 100.0 * event.get("done", 0) / total)
        with _best_effort("progress"):
            if self.artifact is None:
                made: Callable[..., Any] = create_progress_artifact
                self.artifact = made(share, key=self.key, description=words)
            else:
                update_progress_artifact(self.artifact, share, description=words)

    def _last(self, event: dict[str, Any]) -> bool:
        return self.artifact is not None and event.get("done", 0) >= event["total"]


def leave_losses(planned: jobs.PlannedJob) -> None:
    """The dev losses of a job's customers over their steps, as a picture: those of the first twenty that have a prefix."""
    with _best_effort("the losses"):
        curves = []
        for member in planned.job.customers:
            with contextlib.suppress(PrefixFleetError, KeyError, TypeError):
                history = read_json(Path(member.prefix_dir) / "prefix.json", 1)["training"]["history"]
                if history:
                    curves.append((str(member.key), history))
            if len(curves) == _MOST_CURVES:
                break
        if curves:
            create_image_artifact(
                f"data:image/png;base64,{base64.b64encode(_plot(curves)).decode()}",
                key=f"loss-{planned.job.name}",
                description=f"Dev losses of {', '.join(name for name, _ in curves)}",
            )


def _plot(curves: list[tuple[str, list[dict[str, float]]]]) -> bytes:
    """PNG: of each customer the dev losses over its steps, or the training losses where there were none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, history in curves:
        what = "dev_loss" if any("dev_loss" in entry for entry in history) else "loss"
        points = [(entry["step"], entry[what]) for entry in history if what in entry]
        axes.plot([step for step, _ in points], [loss for _, loss in points], marker=".", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("dev loss")
    axes.legend(fontsize="x-small", ncols=2 if len(curves) > 10 else 1)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=80)
    return image.getvalue()
