"""Logs a sweep to MLflow as people know sweeps there: a run for the whole with the page, and below it a run for every setting."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PrefixFleetError
from pipeline.files import read_json, write_json
from pipeline.home import identity_above
from pipeline.registry.store import connect, experiment_id, shown_uri, translated

EXPERIMENT = "prefixfleet-sweeps"
_NOTE = "mlflow_run.json"
_PARENT = "mlflow.parentRunId"


def log_sweep(content: Mapping[str, Any], folder: Path) -> str:
    """Log a sweep, unless this store has it already; returns the id of its run.

    The runs that the settings were trained in become its children, with `dev_<metric>` and its interval as metrics beside the losses that training
    logged. A setting that has no run in this store, since none was reachable or it failed, gets one.

    Args:
        content: of sweep.json.
        folder: where the sweep's files are; a note of the run is left there.

    Raises:
        RegistryError: the store does not answer.
    """
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    with translated("logging a sweep"):
        client = connect()
        experiment = experiment_id(EXPERIMENT)
        known = _noted(folder / _NOTE, content["digest"])
        if known is not None:
            return known
        metric, now = content["metric"], int(time.time() * 1000)
        key = f"{content['customer']}/{content['task']}"
        best = content["best"]["settings"]
        test = content["test"]["systems"]
        home = identity_above(folder)
        parent = str(client.create_run(experiment, run_name=f"sweep {key}").info.run_id)
        client.log_batch(
            parent,
            metrics=[
                *(Metric(f"test_{m}", score["score"], now, 0) for m, score in test["best"].items()),
                *(Metric(f"base_test_{m}", score["score"], now, 0) for m, score in test["base"].items()),
                Metric(f"dev_{metric}", next(g["score"] for g in content["settings"] if g["best"]), now, 0),
            ],
            params=[
                *(Param(f"tried.{axis}", ", ".join(map(str, values))[:6000]) for axis, values in content["axes"].items()),
                *(Param(f"best.{axis}", str(value)) for axis, value in best.items()),
            ],
            tags=[
                RunTag("prefixfleet.customer", content["customer"]),
                RunTag("prefixfleet.task", content["task"]),
                RunTag("prefixfleet.sweep", content["digest"]),
                *([] if home is None else [RunTag("prefixfleet.home", home)]),
                *(RunTag(f"prefixfleet.signature.{name}", own) for name, own in content["signatures"].items()),
            ],
        )
        for file in sorted(folder.glob("sweep*.*")):
            client.log_artifact(parent, str(file))
        for variant in content["variants"]:
            own = variant.get("run_id")
            try:
                own = None if own is None else str(client.get_run(own).info.run_id)
            except MlflowException:
                own = None  # of another store, or deleted
            fresh = own is None
            if own is None:
                own = str(client.create_run(experiment, run_name=variant["name"]).info.run_id)
            params = [Param(axis, str(value)) for axis, value in variant["settings"].items()] if fresh else []
            dev = variant.get("dev", {})
            client.log_batch(
                own,
                metrics=[
                    Metric(f"dev_{metric}{'' if end == 'score' else f'_{end}'}", value, now, 0) for end, value in dev.items()
                ],
                params=params,
                tags=[RunTag(_PARENT, parent)],
            )
            if fresh:
                client.set_terminated(own, "FAILED" if "error" in variant else "FINISHED")
        client.set_terminated(parent, "FINISHED")
    write_json(folder / _NOTE, {"format": 1, "id": parent, "digest": content["digest"], "store": shown_uri()})
    return parent


def _noted(path: Path, digest: str) -> str | None:
    try:
        noted = read_json(path, 1)
    except PrefixFleetError:
        return None
    return str(noted["id"]) if (noted.get("digest"), noted.get("store")) == (digest, shown_uri()) else None
