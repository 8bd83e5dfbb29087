"""Remove runs and models from MLflow for good: files first, then the record, as `mlflow gc` does.

In: a run or a model, a client. Out: whether it is gone, or only hidden because this process cannot reach MLflow's database: over HTTP, MLflow
deletes softly. (`mlflow gc` itself is not called: besides what it is told to, it removes everybody's deleted experiments.)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run


def database_of(client: "MlflowClient", backend_store_uri: str | None = None) -> Any | None:
    """The store that can delete for good: that of the client if it speaks to a database, or the one behind its server if its address is given.

    Args:
        client: in use.
        backend_store_uri: what the MLflow server was started with as `--backend-store-uri`.
    """
    if backend_store_uri is not None:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=backend_store_uri)
    store = client._tracking_client.store  # there is no public way to a store, and none but stores delete for good (MLflow 3.17)
    return store if hasattr(store, "_hard_delete_run") and hasattr(store, "_hard_delete_logged_model") else None


def erase_model(client: "MlflowClient", model: "LoggedModel", database: Any | None = None) -> bool:
    """Remove a model's files and its record; whether the record is gone, not only hidden."""
    from mlflow.exceptions import MlflowException

    _delete_files(client, model.artifact_location)
    try:
        client.delete_logged_model(model.model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # hidden by somebody before us
            raise
    database = database or database_of(client)
    if database is not None:
        database._hard_delete_logged_model(model.model_id)
    return database is not None


def erase_run(client: "MlflowClient", run: "Run", database: Any | None = None) -> bool:
    """Remove a run's files and its record; whether the record is gone, not only hidden."""
    _delete_files(client, run.info.artifact_uri)
    if run.info.lifecycle_stage == "active":
        client.delete_run(run.info.run_id)
    database = database or database_of(client)
    if database is not None:
        database._hard_delete_run(run.info.run_id)
    return database is not None


def _delete_files(client: "MlflowClient", place: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(place, tracking_uri=client.tracking_uri).delete_artifacts()
