"""Whether a prefix that MLflow itself has loaded (`mlflow.pyfunc`, `mlflow models serve`) is the one that was registered.

In: the prefix's folder within a downloaded version, MLflow's model configuration. Out: nothing, or a `RegistryError`. The digest of the content is
compared with what the version's MLmodel says, or whoever loads it (`model_config`), and with the version's tag, which is not kept beside the files.
Does not judge the code of the version: MLflow runs that before anything here is asked.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import RegistryError
from pipeline.registry.store import impatient, shown_uri, translated
from pipeline.registry.versions import TAG, content_digest

log = logging.getLogger(__name__)

# In the MLmodel, as part of MLflow's model configuration: who loads a model may override it with a digest of their own knowledge.
CONTENT_DIGEST = "content_digest"


def check_loaded(folder: Path, config: Mapping[str, Any] | None) -> None:
    """Refuse a prefix that is not what was registered.

    Args:
        folder: with the two files of the prefix, `artifacts/prefix` of a version.
        config: MLflow's model configuration; versions of an older PrefixFleet have none.

    Raises:
        RegistryError: its digest is another than the configuration's or the tag's, or the registry does not know the version.
    """
    found = content_digest(folder)
    wanted = (config or {}).get(CONTENT_DIGEST)
    if wanted is not None and wanted != found:
        raise _other(folder, found, wanted, "its MLmodel, or the model_config that it is loaded with,")
    registered = _registered_as(folder.parents[1])
    if registered is not None:
        tag = _tag(*registered)
        if tag is not None and tag != found:
            raise _other(folder, found, tag, f"{registered[0]} version {registered[1]} at {shown_uri()}")


def _other(folder: Path, found: str, wanted: Any, who: str) -> RegistryError:
    return RegistryError(
        f"{folder}: is not the prefix that was registered: its content has digest {found[:16]}, and {who} says {str(wanted)[:16]}. "
        "It was damaged or tampered with and does not answer. Delete the version in MLflow, and `prefixfleet run FLEET.yaml` registers it again."
    )


def _registered_as(root: Path) -> tuple[str, str] | None:
    """The model and version that MLflow fetched this folder as; None if it was not fetched by a registered name."""
    import yaml
    from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME

    file = root / REGISTERED_MODEL_META_FILE_NAME  # which MLflow writes over whatever is downloaded
    if not file.is_file():
        return None
    said = yaml.safe_load(file.read_text(encoding="utf-8"))
    name, version = (said.get("model_name"), said.get("model_version")) if isinstance(said, dict) else (None, None)
    return (str(name), str(version)) if name and version else None


def _tag(name: str, version: str) -> str | None:
    """What the registry says; None if this process knows no registry, or it does not answer: a container may have nothing but the files."""
    import mlflow
    from mlflow.exceptions import MlflowException

    if not mlflow.is_tracking_uri_set():
        log.warning(
            "%s version %s: no MLFLOW_TRACKING_URI is set, so its prefix is compared with its own MLmodel only.", name, version
        )
        return None
    try:
        with translated(f"comparing {name} version {version} with its tags"), impatient():
            return str(mlflow.MlflowClient().get_model_version(name, version).tags.get(f"{TAG}content_digest", ""))
    except RegistryError as error:
        cause = error.__cause__
        if isinstance(cause, MlflowException) and cause.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise RegistryError(
                f"{name} version {version} is not registered at {shown_uri()} any more, so it does not answer. Load a version that is, or "
                "let MLFLOW_TRACKING_URI name the MLflow that it comes from."
            ) from error
        log.warning("%s Its prefix is compared with its own MLmodel only.", error)
        return None
