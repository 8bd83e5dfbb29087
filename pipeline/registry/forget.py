"""Remove from MLflow what was made from a customer's data: versions, models, runs and their files, for good where MLflow's database can be reached.

In: a customer's id. Out: what was removed, and what only an administrator can remove. The tombstone comes first, so nothing appears again
meanwhile; everything is found by the tags of the customer, so a process that is killed is simply run again. Knows nothing of a customer's files
on this machine (`pipeline.leftovers`) nor of Prefect.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RegistryError
from pipeline.home import Home
from pipeline.keys import validate_id
from pipeline.leftovers import give_up_free_pages
from pipeline.registry import tombstones
from pipeline.registry.erase import database_of, erase_model, erase_run
from pipeline.registry.lookup import outdated
from pipeline.registry.store import connect, database_engine, ensure_store, redact, shown_uri, stores_in_use, translated
from pipeline.registry.versions import MODELS, TAG, key_of, pages, versions_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run


@dataclass
class Forgotten:
    """What became of a customer's traces.

    Attributes:
        since: when the customer was first forgotten (ISO 8601, UTC).
        removed: what is gone, in words.
        left: what is not, why, and who can remove it.
    """

    customer: str
    since: str
    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def forget_in_mlflow(
    customer: str,
    backend_store_uri: str | None = None,
    home: Home | None = None,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> Forgotten:
    """Remove every trace of a customer from MLflow, and leave a tombstone.

    Args:
        customer: all its tasks.
        backend_store_uri: the database behind the MLflow server, where this process can reach it. Over HTTP MLflow deletes softly:
            entries are hidden, their files removed, and the rest is `left`. Not looked at where there is no server.
        home: where the embedded store is.
        count: told how many entries are done, of how many.

    Raises:
        RegistryError: MLflow does not answer, or refuses. What is removed stays removed: run it again. Or `backend_store_uri` is not the
            server's database: then nothing was removed.
    """
    validate_id(customer)
    ensure_store(home)
    with translated(f"forgetting customer {customer}"):
        client = connect()
        backend_store_uri = backend_in_use(client, backend_store_uri)
        database = database_of(client, backend_store_uri)
        done = Forgotten(customer, tombstones.leave_tombstone(client, customer))
        names = _models_of(client, customer)
        runs = _runs(client, customer)
        found = _logged_models(client, customer, runs, database)
        total = len(names) + len(found) + len(runs)
        for number, name in enumerate(names):
            count(number, total)
            versions = [str(version.version) for version in reversed(versions_of(client, name))]
            client.delete_registered_model(name)
            outdated(name)
            done.removed.append(f"MLflow model {name}" + (f" with version {', '.join(versions)}" if versions else ""))
        for number, model in enumerate(found, start=len(names)):
            count(number, total)
            _erase(client, done, database, "model", model.model_id, model, erase_model)
        for number, run in enumerate(runs, start=len(names) + len(found)):
            count(number, total)
            _erase(client, done, database, "run", run.info.run_id, run, erase_run)
        count(total, total)
        hidden = tombstones.still_hidden(client, customer)
        if database is None:
            done.left += _for_an_administrator(customer, hidden)
        else:
            done.left += _compact([*stores_in_use(), backend_store_uri or ""])
    return done


def backend_in_use(client: "MlflowClient", backend_store_uri: str | None) -> str | None:
    """The address of the database behind the server that `client` speaks to, seen to be that; None if it speaks to its database itself.

    Raises:
        RegistryError: it is another database.
    """
    if backend_store_uri is None or database_of(client) is not None:
        return None
    _refuse_another_database(client, backend_store_uri)
    return backend_store_uri


def _refuse_another_database(client: "MlflowClient", uri: str) -> None:
    """Raise a `RegistryError` unless the database at `uri` is the one behind the server, as far as its experiments and its newest run tell.

    Asked in plain SQL: MLflow would make its tables wherever it is pointed to.
    """
    import sqlalchemy
    from mlflow.entities import ViewType

    def refused(why: str) -> RegistryError:
        return RegistryError(
            f"MLFLOW_BACKEND_STORE_URI={redact(uri)}: {why}. Nothing was removed. Set it to what the MLflow server at {shown_uri()} was started "
            "with as --backend-store-uri, or unset it: what only its database can remove is then named at the end."
        )

    experiments = client.search_experiments(ViewType.ALL, max_results=1000)
    newest = client.search_runs(
        [one.experiment_id for one in experiments[:100]], "", ViewType.ALL, max_results=1, order_by=["attributes.start_time DESC"]
    )
    try:
        url = sqlalchemy.make_url(uri)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise refused("there is no such file")
        with database_engine(uri).connect() as connection:
            rows = connection.execute(sqlalchemy.text("SELECT experiment_id, name, creation_time FROM experiments"))
            known = {str(row[0]): (row[1], row[2]) for row in rows}
            runs = [
                connection.execute(sqlalchemy.text("SELECT 1 FROM runs WHERE run_uuid = :id"), {"id": run.info.run_id}).first()
                for run in newest
            ]
    except ModuleNotFoundError as error:
        raise refused(
            f"needs the Python module {error.name!r}, which is not installed (prefixfleet[postgresql] has psycopg2)"
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise refused(
            f"cannot be read as MLflow's database ({redact(str(getattr(error, 'orig', error))).strip()[:300]})"
        ) from error
    if None in runs or any(known.get(one.experiment_id) != (one.name, one.creation_time) for one in experiments):
        raise refused("is another database: it does not know the experiments and the newest run of the server, or is an old copy")


def _models_of(client: "MlflowClient", customer: str) -> list[str]:
    """The registered models of all tasks of a customer."""
    found = [
        *client.search_registered_models(f"name = '{MODELS}{customer}'"),
        *pages(client.search_registered_models, f"name LIKE '{MODELS}{customer}.%'"),
    ]
    # In LIKE an underscore stands for any letter.
    return sorted(model.name for model in found if (key := key_of(model.name)) is not None and key.customer == customer)


def _logged_models(client: "MlflowClient", customer: str, runs: "list[Run]", database: Any | None) -> "list[LoggedModel]":
    """MLflow's records of the files of versions, also those that it hides: a database lists them, a server names them as what `runs` have made."""
    from mlflow.exceptions import MlflowException

    found: list[LoggedModel] = []
    for some in in_parts(experiments(client)):
        token = None
        while True:
            page = client.search_logged_models(some, _of(customer), max_results=50, page_token=token)
            found += page
            token = page.token
            if not token:
                break
    if database is not None:
        hidden = (database.get_logged_model(number, allow_deleted=True) for number in database._get_deleted_logged_models())
        return found + [model for model in hidden if model.tags.get(f"{TAG}customer") == customer]
    known = {model.model_id for model in found} | set(tombstones.hidden(client, customer))
    made = {output.model_id for run in runs if run.outputs for output in run.outputs.model_outputs}
    for number in sorted(made - known):
        try:
            model = tombstones.hidden_model(client, number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        found += [model] if model.tags.get(f"{TAG}customer") == customer else []
    return found


def _runs(client: "MlflowClient", customer: str) -> "list[Run]":
    """The runs of training and registration, also those that MLflow hides."""
    from mlflow.entities import ViewType

    found: list[Run] = []
    for some in in_parts(experiments(client)):
        search = functools.partial(client.search_runs, some, run_view_type=ViewType.ALL)
        own = list(pages(search, _of(customer)))
        # Runs below a sweep's that no training had made say their parent alone: they go before it, or nothing would lead to them.
        sweeps = [run.info.run_id for run in own if f"{TAG}sweep" in run.data.tags]
        below = [child for number in sweeps for child in pages(search, f"tags.`mlflow.parentRunId` = '{number}'")]
        found += {run.info.run_id: run for run in [*below, *own]}.values()
    return found


def experiments(client: "MlflowClient") -> list[str]:
    """The ids of all experiments, also those that MLflow hides."""
    from mlflow.entities import ViewType

    token, found = None, []
    while True:
        page = client.search_experiments(ViewType.ALL, max_results=1000, page_token=token)
        found += [experiment.experiment_id for experiment in page]
        token = page.token
        if not token:
            return found


def in_parts(numbers: list[str]) -> Iterable[list[str]]:
    """As many experiments at a time as one search takes."""
    return (numbers[start : start + 100] for start in range(0, len(numbers), 100))


def _of(customer: str) -> str:
    return f"tags.`{TAG}customer` = '{customer}'"


def _erase(
    client: "MlflowClient", done: Forgotten, database: Any | None, kind: str, number: str, what: Any, erase: Callable[..., bool]
) -> None:
    """Remove one entry, and note in the tombstone what is only hidden."""
    if database is None:
        tombstones.hide(client, done.customer, kind, number)
    try:
        gone = erase(client, what, database)
    except Exception as error:  # of MLflow, of S3, of the file system: the others are to go nevertheless
        reason = redact(str(error)).strip()[:300]
        if "API request to" in reason:
            raise
        done.left.append(
            f"MLflow {kind} {number}: its files or its entry could not be deleted ({reason}). Delete them, and run the command again."
        )
        return
    if gone:
        tombstones.removed(client, done.customer, number)
        done.removed.append(f"MLflow {kind} {number}")
    else:
        done.removed.append(f"files of MLflow {kind} {number}")


def _for_an_administrator(customer: str, hidden: dict[str, str]) -> list[str]:
    if not hidden:
        return []
    runs, models = ([number for number, kind in sorted(hidden.items()) if kind == wanted] for wanted in ("run", "model"))
    named = [f"--run-ids {','.join(runs)}"] * bool(runs) + [f"--logged-model-ids {','.join(models)}"] * bool(models)
    # Of a kind that it is given no ids of, `mlflow gc` removes whatever is deleted (MLflow 3.17).
    others = ["experiments with their runs", *(["runs"] * (not runs)), *(["logged models"] * (not models))]
    return [
        f"{len(hidden)} entries (names, tags, settings, metrics) in the database of MLflow at {shown_uri()}: the server only hides what is deleted "
        "through it. Somebody with access to its database must run `MLFLOW_BACKEND_STORE_URI=<the server's --backend-store-uri> prefixfleet forget "
        f"--customer {customer} --yes`; or, which also removes everybody's deleted {' and '.join(others)}, `mlflow gc --backend-store-uri <the same> "
        f"--tracking-uri {redact(stores_in_use()[0])} {' '.join(named)}`."
    ]


def _compact(uris: list[str]) -> list[str]:
    """Leave no deleted rows readable in the files of SQLite databases. Returns what could not be done."""
    from sqlalchemy import make_url

    files = dict.fromkeys(make_url(uri).database for uri in uris if uri.startswith("sqlite:"))
    return [said for file in files if file and (said := give_up_free_pages(Path(file))) is not None]
