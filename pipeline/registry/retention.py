"""Runs and versions in MLflow that nobody needs any more: found by a retention rule, and removed for good where MLflow's database can be reached.

In: customers, the rule, and the runs that prefixes on this machine still name. Out: `Removal`s. What has an alias, is a member of an ensemble, or is
among the newest versions is no candidate, and whether it still is none is asked again at the moment of the removal. Knows nothing of files on this
machine (`pipeline.stale`) nor of Prefect.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import RegistryError
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry.erase import database_of, erase_model, erase_run
from pipeline.registry.forget import backend_in_use, experiments, in_parts
from pipeline.registry.lookup import outdated
from pipeline.registry.register import model_id_of
from pipeline.registry.store import connect, lock, redact, translated
from pipeline.registry.versions import MODELS, TAG, aliases_of, key_of, models, own_tags, pages
from pipeline.removal import Removal

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

_DAY = 86_400_000


@dataclass
class Registered:
    """What the registry holds, read once.

    Attributes:
        versions: by customer, the newest first.
        aliases: by customer, the versions that hold one.
    """

    versions: "dict[CustomerKey, list[ModelVersion]]" = field(default_factory=dict)
    aliases: dict[CustomerKey, dict[str, int]] = field(default_factory=dict)

    def digests(self, key: CustomerKey) -> set[str]:
        """The fingerprints of a customer's prefixes that may yet be asked for: those with an alias, and the newest."""
        held = set(self.aliases.get(key, {}).values())
        versions = self.versions.get(key, [])
        return {own_tags(v.tags).get("fingerprint", "") for v in versions if int(v.version) in held} | {
            own_tags(v.tags).get("fingerprint", "") for v in versions[:1]
        }


def read_registered() -> Registered:
    """All versions and aliases of all customers, in two questions. `ensure_store` must have been called.

    Raises:
        RegistryError: MLflow failed.
    """
    with translated("reading what is registered"):
        client = connect()
        found = Registered(aliases={key: dict(model.aliases) for key, model in models(client, None).values()})
        found.aliases = {key: {alias: int(v) for alias, v in held.items()} for key, held in found.aliases.items()}
        for version in pages(client.search_model_versions, f"name LIKE '{MODELS}%'"):
            key = key_of(version.name)
            if key is not None:
                found.versions.setdefault(key, []).append(version)
    for versions in found.versions.values():
        versions.sort(key=lambda version: -int(version.version))
    return found


def checked_backend(address: str | None) -> str | None:
    """The address of MLflow's database, if it is needed to delete for good and is that of the server in use.

    Raises:
        RegistryError: it is another database, or MLflow failed.
    """
    with translated("looking at MLflow's database"):
        return backend_in_use(connect(), address)


def surplus_versions(
    registered: Registered, keys: Collection[CustomerKey], keep: int, days: float, now: float, home: Home, backend: str | None
) -> Iterator[Removal]:
    """The versions of `keys` beyond the newest `keep` that are older than `days`, hold no alias and are in no ensemble that stays.

    Args:
        registered: see `read_registered`.
        now: seconds since the epoch.
        backend: see `checked_backend`.
    """
    for key in sorted(keys):
        versions = registered.versions.get(key, [])
        for version in versions[keep:]:
            if version.creation_timestamp > now * 1000 - days * _DAY or _needed(
                int(version.version), versions, registered.aliases.get(key, {})
            ):
                continue
            yield Removal(
                "version",
                f"{key} version {version.version}",
                f"older than {days:g} days, and {keep} newer versions are there",
                frozenset([key]),
                home,
                functools.partial(_remove_version, key, version, home, backend),
            )


def _needed(number: int, versions: "list[ModelVersion]", aliases: dict[str, int]) -> bool:
    return number in aliases.values() or number in members_of_ensembles(versions)


def members_of_ensembles(versions: "list[ModelVersion]") -> set[int]:
    """The numbers of the versions that ensembles among `versions` were made of, as their tag `prefixfleet.ensemble` names them."""
    told = " ".join(own_tags(version.tags).get("ensemble", "") for version in versions)
    return {int(number) for number in re.findall(r"\bversion (\d+)", told)}


def _remove_version(key: CustomerKey, version: "ModelVersion", home: Home, backend: str | None) -> str | None:
    """Remove a version, its files, and its run if no other version has it."""
    from mlflow.exceptions import MlflowException

    name, what = key.model_name, f"{key} version {version.version}"
    with lock(home, name), translated(f"removing {what}"):
        client = connect()
        database = database_of(client, backend)
        others = [v for v in pages(client.search_model_versions, f"name = '{name}'") if v.version != version.version]
        # Asked again: somebody may have promoted it, or made an ensemble of it, since the plan was made.
        if _needed(int(version.version), others, aliases_of(client, name)):
            return f"{what}: is in use by now."
        client.delete_model_version(name, version.version)
        outdated(name)
        gone = True
        model = model_id_of(version)
        try:
            if model is not None and model not in {model_id_of(other) for other in others}:
                gone = erase_model(client, client.get_logged_model(model), database)
            if version.run_id and version.run_id not in {other.run_id for other in others}:
                gone = erase_run(client, client.get_run(version.run_id), database) and gone
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # removed by somebody before us
                raise
        return None if gone else _only_hidden(what)


def surplus_runs(
    registered: Registered,
    keys: Collection[CustomerKey],
    members_of: Callable[[str], Collection[CustomerKey] | None],
    in_use: Collection[str],
    days: float,
    now: float,
    home: Home,
    backend: str | None,
) -> Iterator[Removal]:
    """The runs of `keys`, of their sweeps and of the fleet's jobs that are older than `days` and belong to no version.

    Several homes may share an MLflow: what bears the mark of another home is left, and so is a job's run that bears none.

    Args:
        registered: see `read_registered`.
        members_of: the customers of a job of this name, as far as files here tell; None if it is none of the fleet's.
        in_use: ids of runs that prefixes on this machine name which may yet be registered.
        now: seconds since the epoch.
        backend: see `checked_backend`.

    Raises:
        RegistryError: MLflow failed.
    """
    from mlflow.entities import ViewType

    kept = {version.run_id for versions in registered.versions.values() for version in versions if version.run_id} | set(in_use)
    with translated("looking for runs that belong to no version"):
        client = connect()
        can_erase = database_of(client, backend) is not None
        view = ViewType.ALL if can_erase else ViewType.ACTIVE_ONLY  # what is hidden can be removed only there
        old = f"attributes.start_time < {int(now * 1000 - days * _DAY)}"
        found: dict[str, Run] = {}
        for some in in_parts(experiments(client)):
            search = functools.partial(client.search_runs, some, run_view_type=view)
            for begin in (f"tags.`{TAG}customer` LIKE '%'", f"tags.`{TAG}home` = '{home.identity()}'"):
                found |= {run.info.run_id: run for run in pages(search, f"{begin} and {old}")}
            sweeps = [number for number, run in found.items() if f"{TAG}sweep" in run.data.tags]
            # Settings of a sweep that no training had made name their parent alone.
            found |= {
                run.info.run_id: run for number in sweeps for run in pages(search, f"tags.`mlflow.parentRunId` = '{number}'")
            }
    for number, run in found.items():
        whose = _whose(run, found, keys, members_of, home.identity())
        if number in kept or whose is None:
            continue
        parent = run.data.tags.get("mlflow.parentRunId")
        if parent is not None and parent not in found:
            continue  # of a sweep that is younger
        yield Removal(
            "run",
            f"MLflow run {run.info.run_name} ({number})",
            f"older than {days:g} days, and no version was made of it",
            whose,
            home,
            functools.partial(_remove_run, number, home, backend),
        )


def _whose(
    run: "Run",
    others: "dict[str, Run]",
    keys: Collection[CustomerKey],
    members_of: Callable[[str], Collection[CustomerKey] | None],
    home: str,
) -> frozenset[CustomerKey] | None:
    """Those whose run it is, who must not be at work when it goes; None if it is none of `keys` and of the fleet's jobs in this home.

    That includes runs that MLflow calls running: what was killed never says that it has ended, and what is under way holds its customers.
    """
    parent = others.get(run.data.tags.get("mlflow.parentRunId", ""))
    tags = own_tags(run.data.tags)
    if "customer" not in tags and parent is not None:
        tags = own_tags(parent.data.tags)
    if tags.get("home", home) != home:
        return None
    if "customer" in tags:
        task = tags.get("task", "default")
        key = key_of(f"{MODELS}{tags['customer']}" + ("" if task == "default" else f".{task}"))
        return frozenset([key]) if key is not None and key in keys else None
    members = members_of(tags["job"]) if "home" in tags and "job" in tags else None
    return None if members is None else frozenset(members)


def _remove_run(number: str, home: Home, backend: str | None) -> str | None:
    from mlflow.exceptions import MlflowException

    what = f"MLflow run {number}"
    with translated(f"removing {what}"):
        client = connect()
        try:
            if any(pages(client.search_model_versions, f"run_id = '{number}'")):
                return f"{what}: a version was made of it by now."
            return None if erase_run(client, client.get_run(number), database_of(client, backend)) else _only_hidden(what)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None


def _only_hidden(what: str) -> str:
    return (
        f"{what}: its files are gone and it is hidden; its entry stays in the database of MLflow. Set MLFLOW_BACKEND_STORE_URI to that database, "
        "or have somebody who reaches it run `mlflow gc`."
    )


def recorded_score(key: CustomerKey, registered: Registered, metric: str) -> dict[str, float] | None:
    """What the registry knows of the champion's score: `score`, `low` and `high`; None if there is no champion, or none with this metric.

    Raises:
        RegistryError: MLflow failed.
    """
    champion = registered.aliases.get(key, {}).get("champion")
    version = next((v for v in registered.versions.get(key, []) if int(v.version) == champion), None)
    if version is None or not version.run_id:
        return None
    with translated(f"reading the champion's score of customer {key}"):
        try:
            metrics: dict[str, Any] = connect().get_run(version.run_id).data.metrics
        except Exception as error:
            raise RegistryError(f"customer {key}: the run of its champion cannot be read ({redact(str(error))}).") from error
    values = {"score": f"score.{metric}", "low": f"score.{metric}.low", "high": f"score.{metric}.high"}
    return {name: float(metrics[own]) for name, own in values.items()} if set(values.values()) <= metrics.keys() else None
