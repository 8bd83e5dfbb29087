"""Live metrics of training in MLflow, when a tracking store is configured. Never a reason for training to fail."""

import os
import sys
import time
from types import TracebackType
from typing import Any

from pipeline.registry.store import experiment_id, redact, set_environment

EVERY_SECONDS = 5.0


class Run:
    """One MLflow run for one customer, as a context manager. Without `MLFLOW_TRACKING_URI`, or when the store is away, it does nothing.

    Attributes:
        id: the run's id, or None.
    """

    def __init__(self, experiment: str, name: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        self.id: str | None = None
        self._client: Any = None
        self._waiting: list[Any] = []
        self._last = time.monotonic()
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            return
        # Also where nobody called `ensure_store`: with training started by hand.
        set_environment()
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param, RunTag

            self._client = MlflowClient()
            run = self._client.create_run(experiment_id(experiment), run_name=name)
            self.id = run.info.run_id
            self._client.log_batch(
                self.id,
                params=[Param(k, str(v)[:6000]) for k, v in params.items()],
                tags=[RunTag(k, v) for k, v in tags.items()],
            )
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
        try:
            for i in range(0, len(self._waiting), 900):  # MLflow takes at most 1,000 metrics a call
                self._client.log_batch(self.id, metrics=self._waiting[i : i + 900])
            self._waiting = []
        except Exception as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        print(
            f"warning: MLflow takes no metrics ({type(error).__name__}: {redact(str(error))}). Training goes on; they are in metrics.jsonl.",
            file=sys.stderr,
        )
        self._client = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._client is None:
            return
        self._send()
        if self._client is not None:
            try:
                self._client.set_terminated(self.id, "FINISHED" if kind is None else "FAILED")
            except Exception as lost:
                self._lost(lost)
