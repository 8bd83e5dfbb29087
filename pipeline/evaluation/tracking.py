"""Logs an evaluation to the MLflow run that its prefix was trained in. MLflow is imported only when there is something to log."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import EvaluationError
from pipeline.files import write_json
from pipeline.registry.store import connect, ensure_store, shown_uri, translated

_ARTIFACTS = ("report.html", "report.md", "metrics.json", "decision.json")
_NOTE = "mlflow_run.json"


def is_logged(folder: Path) -> bool:
    """Whether an evaluation was logged, or its run refused it: there is nothing more to do."""
    return (folder / _NOTE).exists()


def log_evaluation(run_id: str, metrics: Mapping[str, Any], folder: Path) -> None:
    """Add scores and reports to an MLflow run: `bleu`, `bleu_low`, `bleu_high`; the same with `base_`, `prompt_` and `champion_` before them;
    `bleu_gain_over_base` and `bleu_p_over_base`, and so for the others; below `evaluation/` the report as HTML, Markdown and JSON; and as a tag
    `prefixfleet.signature.bleu` how it was computed.

    The store is the one that `MLFLOW_TRACKING_URI` names. A note in the folder then says that it is done (`is_logged`); one
    that was killed or found no store leaves none, and the next run of the fleet does it.

    Args:
        run_id: the run of prefix.json.
        metrics: content of metrics.json.
        folder: the evaluation folder, which holds the report.

    Raises:
        EvaluationError: the store has no such run, or it was deleted.
        RegistryError: the store does not answer.
    """
    ensure_store()
    from mlflow.entities import Metric, RunTag
    from mlflow.exceptions import MlflowException

    note = {"format": 1, "id": run_id, "store": shown_uri()}
    now = int(time.time() * 1000)
    with translated("logging an evaluation"):
        client = connect()
        try:
            client.log_batch(
                run_id,
                metrics=[Metric(name, value, now, 0) for name, value in _flat(metrics).items()],
                tags=[RunTag(f"prefixfleet.signature.{name}", own) for name, own in metrics["signatures"].items()],
            )
            for name in _ARTIFACTS:
                client.log_artifact(run_id, str(folder / name), artifact_path="evaluation")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            write_json(folder / _NOTE, {**note, "refused": str(error)})  # a run that is gone does not come back
            raise EvaluationError(
                f"MLflow takes no scores for run {run_id}, which trained the prefix ({error}). They are in {folder}."
            ) from error
    write_json(folder / _NOTE, note)


def _flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    flat = {}
    for system, scores in metrics["scores"].items():
        before = "" if system == "prefix" else f"{system}_"
        for metric, score in scores.items():
            flat[f"{before}{metric}"] = score["score"]
            flat |= {f"{before}{metric}_{end}": score[end] for end in ("low", "high")}
    for other, compared in metrics["comparisons"].items():
        for metric, gain in compared.items():
            flat[f"{metric}_gain_over_{other}"] = gain["gain"]
            if gain["p"] is not None:
                flat[f"{metric}_p_over_{other}"] = gain["p"]
    return flat
