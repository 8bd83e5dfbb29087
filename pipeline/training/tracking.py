"""Live metrics of training in MLflow, when a tracking store is configured. Never a reason for training to fail or to wait."""

import os
import sys
import time
from concurrent.futures import Executor
from typing import Any

from pipeline.registry.store import experiment_id, redact, set_environment

EVERY_SECONDS = 5.0


class Run:
    """One MLflow run. Without `MLFLOW_TRACKING_URI`, or when the store is away, it does nothing.

    Attributes:
        id: the run's id, or None.
    """

    def __init__(
        self,
        experiment: str,
        name: str,
        params: dict[str, Any],
        tags: dict[str, str],
        sender: Executor,
        id: str | None = None,
    ) -> None:
        """Create the run, or go on with the one that has `id`.

        Args:
            experiment: its name; it is created if there is none.
            name: of the run.
            params: logged once.
            tags: of the run.
            sender: does the sending, of one run after another, so that no step waits for the network.
            id: of the run that an interrupted job had begun.
        """
        self.id = id
        self._client: Any = None
        self._sender = sender
        self._waiting: list[Any] = []
        self._last = time.monotonic()
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            return
        # Also where nobody called `ensure_store`: with training started by hand.
        set_environment()
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param, RunTag

            client = MlflowClient()
            if id is None:
                run = client.create_run(experiment_id(experiment), run_name=name)
                self.id = run.info.run_id
                client.log_batch(
                    self.id,
                    params=[Param(k, str(v)[:6000]) for k, v in params.items()],
                    tags=[RunTag(k, v) for k, v in tags.items()],
                )
            self._client = client
        except Exception as error:  # MLflow raises its own, requests' and SQLAlchemy's errors; none of them may stop training
            self._lost(error)

    def log(self, entry: dict[str, float]) -> None:
        """Take note of one line of the training log; sent in batches."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(k, float(v), now, int(entry["step"])) for k, v in entry.items() if k != "step"]
        if time.monotonic() - self._last > EVERY_SECONDS or len(self._waiting) > 500:
            self._send()

    def _send(self) -> None:
        self._last = time.monotonic()
        waiting, self._waiting = self._waiting, []
        self._sender.submit(self._deliver, waiting)

    def _deliver(self, metrics: list[Any]) -> None:
        try:
            for i in range(0, len(metrics), 900):  # MLflow takes at most 1,000 metrics a call
                if self._client is not None:
                    self._client.log_batch(self.id, metrics=metrics[i : i + 900])
        except Exception as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        print(
            f"warning: MLflow takes no metrics ({type(error).__name__}: {redact(str(error))}). Training goes on; they are in metrics.jsonl.",
            file=sys.stderr,
        )
        self._client = None

    def pause(self) -> None:
        """Send what is waiting and leave the run open: an interrupted job will go on with it."""
        if self._client is not None:
            self._send()

    def close(self, status: str) -> None:
        """Send what is waiting and end the run as `FINISHED` or `FAILED`."""
        if self._client is not None:
            self._send()
            self._sender.submit(self._terminate, status)

    def _terminate(self, status: str) -> None:
        try:
            if self._client is not None:
                self._client.set_terminated(self.id, status)
        except Exception as error:
            self._lost(error)
