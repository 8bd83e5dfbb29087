"""Live metrics of training in MLflow, when a tracking store is configured. Never a reason for training to fail or to wait."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.files import read_json, write_json
from pipeline.registry.store import experiment_id, redact, set_environment

FORMAT = 1
EVERY_SECONDS = 5.0


class Tracker:
    """The connection to MLflow: one thread that does all that needs the network. Without `MLFLOW_TRACKING_URI` there is none.

    The first failure ends it for this process: a store that is away would otherwise take its time-out for every customer.
    """

    def __init__(self) -> None:
        self.client: Any = None
        self.lost = not os.environ.get("MLFLOW_TRACKING_URI")
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if not self.lost:
            # Also where nobody called `ensure_store`: with training started by hand.
            set_environment()
            self._thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        """Have something done, in order, some time."""
        if not self.lost:
            self._todo.put(task)

    def close(self, seconds: float) -> None:
        """Finish what was submitted, but take no longer than this."""
        if self._thread.is_alive():
            self._todo.put(None)
            self._thread.join(seconds)

    def _work(self) -> None:
        while (task := self._todo.get()) is not None:
            if self.lost:
                continue
            try:
                if self.client is None:
                    from mlflow import MlflowClient

                    self.client = MlflowClient()
                task()
            except Exception as error:  # MLflow raises its own, requests' and SQLAlchemy's errors; none of them may stop training
                self.lost = True
                print(
                    f"warning: MLflow takes no metrics ({type(error).__name__}: {redact(str(error))}). Training goes on; they are in "
                    "metrics.jsonl.",
                    file=sys.stderr,
                )


class Run:
    """One MLflow run.

    Attributes:
        id: the run's id; None until it is created, and if there is no store.
    """

    def __init__(
        self, tracker: Tracker, experiment: str, name: str, params: dict[str, Any], tags: dict[str, str], note: Path
    ) -> None:
        """Have the run created, or go on with the one that an interrupted job began.

        Args:
            tracker: does it.
            experiment: its name; it is created if there is none.
            name: of the run.
            params: logged once.
            tags: of the run; they also tell whether the run in `note` is this one's.
            note: a file that holds the id while the run is open.
        """
        self.id: str | None = None
        self._tracker, self._note = tracker, note
        self._waiting: list[Any] = []
        self._last = time.monotonic()
        # Of a run that is gone on with, the last step of each metric: what was sent after the checkpoint from which the job goes on is sent once.
        self._there: dict[str, int] = {}

        def begin() -> None:
            from mlflow.entities import Param, RunTag

            try:
                noted = read_json(note, FORMAT)
                if noted.get("tags") == tags and noted.get("store") == redact(os.environ["MLFLOW_TRACKING_URI"]):
                    self.id = noted["id"]
                    for key in tracker.client.get_run(self.id).data.metrics:
                        self._there[key] = max(metric.step for metric in tracker.client.get_metric_history(self.id, key))
                    return
            except StorageError:
                pass
            run = tracker.client.create_run(experiment_id(experiment), run_name=name)
            self.id = run.info.run_id
            write_json(note, {"format": FORMAT, "id": self.id, "tags": tags, "store": redact(os.environ["MLFLOW_TRACKING_URI"])})
            tracker.client.log_batch(
                self.id,
                params=[Param(k, str(v)[:6000]) for k, v in params.items()],
                tags=[RunTag(k, v) for k, v in tags.items()],
            )

        tracker.submit(begin)

    def log(self, entry: dict[str, float]) -> None:
        """Take note of one line of the training log; sent in batches."""
        if self._tracker.lost:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(k, float(v), now, int(entry["step"])) for k, v in entry.items() if k != "step"]
        if time.monotonic() - self._last > EVERY_SECONDS or len(self._waiting) > 500:
            self._send()

    def _send(self) -> None:
        self._last = time.monotonic()
        waiting, self._waiting = self._waiting, []

        def deliver() -> None:
            new = [metric for metric in waiting if metric.step > self._there.get(metric.key, -1)]
            for i in range(0, len(new), 900):  # MLflow takes at most 1,000 metrics a call
                self._tracker.client.log_batch(self.id, metrics=new[i : i + 900])

        self._tracker.submit(deliver)

    def close(self, status: str | None) -> None:
        """Send what is waiting and end the run as `FINISHED` or `FAILED`; None leaves it open for the job that will go on."""
        self._send()
        if status is None:
            return

        def end() -> None:
            self._tracker.client.set_terminated(self.id, status)
            self._note.unlink(missing_ok=True)

        self._tracker.submit(end)
