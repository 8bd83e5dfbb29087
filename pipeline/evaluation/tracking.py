"""Logs an evaluation to the MLflow run that its prefix was trained in. MLflow is imported only when there is something to log."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import EvaluationError
from pipeline.registry.store import connect, ensure_store, translated


def log_evaluation(run_id: str, metrics: Mapping[str, Any], folder: Path) -> None:
    """Add scores and the report to an MLflow run: `bleu`, `bleu_low`, `bleu_high`, the same with `base_` before them, and
    `evaluation/report.html`.

    The store is the one that `MLFLOW_TRACKING_URI` names.

    Args:
        run_id: the run of prefix.json.
        metrics: content of metrics.json.
        folder: the evaluation folder, which holds the report.

    Raises:
        EvaluationError: the store has no such run, or it was deleted.
        RegistryError: the store does not answer.
    """
    ensure_store()
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    now = int(time.time() * 1000)
    with translated("logging an evaluation"):
        client = connect()
        try:
            client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in _flat(metrics["scores"]).items()])
            client.log_artifact(run_id, str(folder / "report.html"), artifact_path="evaluation")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise EvaluationError(
                f"MLflow takes no scores for run {run_id}, which trained the prefix ({error}). They are in {folder}."
            ) from error


def _flat(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    flat = {}
    for system, before in (("prefix", ""), ("base", "base_")):
        for metric, score in scores[system].items():
            flat[f"{before}{metric}"] = score["score"]
            flat |= {f"{before}{metric}_{end}": score[end] for end in ("low", "high")}
    return flat
