"""Look up what is registered: a customer's prefix by alias or version, and the state of the whole fleet.

In: a customer's key. Out: a folder on this machine with a prefix that was checked against the digests in its version's tags, or
rows for a table. Folders are kept below `PREFIXFLEET_HOME/cache/prefixes` by their content, so a version is downloaded once.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, RegistryError, StorageError
from pipeline.files import file_digest, whole_folder
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry.register import CHAMPION, PREFIX_FILES, TAG, content_digest
from pipeline.registry.store import connect, ensure_store, lock, shown_uri, translated

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_MODELS = "prefixfleet."


@dataclass(frozen=True)
class Found:
    """A version and its prefix on this machine.

    Attributes:
        name: the MLflow registered model.
        alias: the alias that was asked for, or None if a version was.
        prefix_dir: folder with `prefix.json` and `prefix.safetensors`, checked.
        tags: of the version, without the leading `prefixfleet.`.
    """

    name: str
    version: int
    alias: str | None
    prefix_dir: Path
    tags: dict[str, str]


@dataclass(frozen=True)
class ModelStatus:
    """The newest version of one customer, and which version is champion.

    Attributes:
        champion_version: None if no version has passed the gate.
        scores: points by metric, with the prefix.
        base_scores: points by metric, without it.
        created_at: UTC.
        fingerprint: of the prefix; training with the same data, settings and base gives the same.
    """

    key: CustomerKey
    name: str
    version: int
    champion_version: int | None
    scores: dict[str, float]
    base_scores: dict[str, float]
    decision: str
    created_at: datetime
    fingerprint: str
    run_id: str | None


def lookup(key: CustomerKey, alias: str = CHAMPION, version: int | None = None, home: Home | None = None) -> Found:
    """The prefix of a customer: the version that holds `alias`, or `version` if it is given.

    Raises:
        RegistryError: no such customer, alias or version (the message says what there is); the stored prefix is not the one that
            was registered; or MLflow failed.
        StorageError: it cannot be written to the cache.
    """
    home = home or Home.current()
    ensure_store(home)
    with translated(f"looking up customer {key}"):
        client = connect()
        found = _resolve(client, key, alias, version)
        tags = {name.removeprefix(TAG): value for name, value in found.tags.items() if name.startswith(TAG)}
        if not tags.get("content_digest") or not tags.get("weights_sha256"):
            raise RegistryError(
                f"{found.name} version {found.version} at {shown_uri()} has no digest of its content in its tags, so it cannot "
                "be trusted. It was not registered by PrefixFleet, or its tags were changed: register the prefix again."
            )
        folder = _cached(home, key, int(found.version), tags)
    return Found(found.name, int(found.version), alias if version is None else None, folder, tags)


def status(keys: list[CustomerKey] | None = None) -> list[ModelStatus]:
    """The state of these customers, or of all, sorted by key. Customers without any version are left out.

    Raises:
        RegistryError: MLflow failed.
    """
    ensure_store()
    with translated("reading the status"):
        client = connect()
        models = _models(client, keys)
        if keys is None:
            newest: dict[str, ModelVersion] = {}
            for version in _pages(client.search_model_versions, f"name LIKE '{_MODELS}%'"):
                if version.name not in newest or int(version.version) > int(newest[version.name].version):
                    newest[version.name] = version
        else:
            newest = {name: version for name in models if (version := _newest(client, name)) is not None}
        rows = [_status(key, model, newest[name]) for name, (key, model) in models.items() if name in newest]
    return sorted(rows, key=lambda row: row.key)


def _resolve(client: "MlflowClient", key: CustomerKey, alias: str, version: int | None) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    name = key.model_name
    try:
        if version is not None:
            return client.get_model_version(name, str(version))
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # An unknown alias is RESOURCE_DOES_NOT_EXIST or INVALID_PARAMETER_VALUE, depending on the store (MLflow 3.17).
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    raise RegistryError(_what_there_is(client, key, alias, version))


def _what_there_is(client: "MlflowClient", key: CustomerKey, alias: str, version: int | None) -> str:
    models = _models(client, [key])
    newest = _newest(client, key.model_name) if models else None
    if newest is None:
        known = sorted(str(k) for k, _ in _models(client, None).values())
        named = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
        return (
            f"customer {key}: no prefix is registered at {shown_uri()}. Registered are: {named or 'none'}. "
            "`prefixfleet run FLEET.yaml` trains and registers."
        )
    if version is not None:
        return f"customer {key}: there is no version {version} at {shown_uri()}; the newest is version {newest.version}."
    aliases = models[key.model_name][1].aliases
    held = ", ".join(f"{name} (version {number})" for name, number in sorted(aliases.items())) or "none"
    rejected = newest.tags.get(f"{TAG}decision") == "reject"
    why = f", which the gate rejected: {newest.tags.get(f'{TAG}reasons', '')}" if rejected else "."
    return (
        f"customer {key}: no version holds the alias {alias!r} at {shown_uri()}. Aliases are: {held}. "
        f"The newest version is {newest.version}{why} Ask for a version by its number, or train a prefix that passes the gate."
    )


def _newest(client: "MlflowClient", name: str) -> "ModelVersion | None":
    found = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    return found[0] if found else None


def _models(client: "MlflowClient", keys: list[CustomerKey] | None) -> "dict[str, tuple[CustomerKey, RegisteredModel]]":
    """Registered models by name. Models of others that happen to begin with our name are left out."""
    if keys is None:
        found = list(_pages(client.search_registered_models, f"name LIKE '{_MODELS}%'"))
    else:
        # One search a customer: `get` would raise for those that are not there.
        found = [model for key in keys for model in client.search_registered_models(f"name = '{key.model_name}'")]
    return {model.name: (key, model) for model in found if (key := _key_of(model.name)) is not None}


def _key_of(name: str) -> CustomerKey | None:
    """The inverse of `CustomerKey.model_name`."""
    parts = name.removeprefix(_MODELS).split(".")
    try:
        key = CustomerKey(*parts) if len(parts) <= 2 else None
    except ConfigError:
        return None
    return key if key is not None and key.model_name == name else None


def _pages(search: Callable[..., Any], filter_string: str) -> Iterator[Any]:
    token = None
    while True:
        page = search(filter_string, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _status(key: CustomerKey, model: "RegisteredModel", newest: "ModelVersion") -> ModelStatus:
    tags = newest.tags
    champion = model.aliases.get(CHAMPION)
    return ModelStatus(
        key=key,
        name=model.name,
        version=int(newest.version),
        champion_version=int(champion) if champion is not None else None,
        scores=_scores(tags, f"{TAG}score."),
        base_scores=_scores(tags, f"{TAG}base_score."),
        decision=tags.get(f"{TAG}decision", ""),
        created_at=datetime.fromtimestamp(newest.creation_timestamp / 1000, tz=UTC),
        fingerprint=tags.get(f"{TAG}fingerprint", ""),
        run_id=newest.run_id or None,
    )


def _scores(tags: dict[str, str], start: str) -> dict[str, float]:
    scores = {}
    for name, value in tags.items():
        if name.startswith(start):
            try:
                scores[name.removeprefix(start)] = float(value)
            except ValueError:
                continue  # somebody edited the tag by hand; the table shows the other scores
    return scores


def _cached(home: Home, key: CustomerKey, version: int, tags: dict[str, str]) -> Path:
    """The folder in the cache that holds this content, downloaded if need be. The cache is checked at every look-up."""
    folder = home.cached_prefix(key, tags["content_digest"])
    if _damage(folder, tags) is None:
        return folder
    with lock(home, f"{key.model_name}.cache"):
        if _damage(folder, tags) is not None:  # else another process was faster
            _download(key, version, tags, folder)
    return folder


def _download(key: CustomerKey, version: int, tags: dict[str, str], folder: Path) -> None:
    import mlflow

    with tempfile.TemporaryDirectory() as temporary:
        source = f"models:/{key.model_name}/{version}/artifacts/prefix"
        try:
            got = Path(mlflow.artifacts.download_artifacts(source, dst_path=temporary))
        except OSError as error:
            raise RegistryError(
                f"{key.model_name} version {version}: its files cannot be read from {shown_uri()} ({error}). "
                "They were moved or deleted; register the prefix again."
            ) from error
        damage = _damage(got, tags)
        if damage:
            raise RegistryError(
                f"{key.model_name} version {version} at {shown_uri()}: {damage} is not what was registered. It was damaged or "
                "tampered with and is not used. Delete the version in MLflow and register the prefix again."
            )
        with whole_folder(folder) as new:
            for name in PREFIX_FILES:
                shutil.copyfile(got / name, new / name)


def _damage(folder: Path, tags: dict[str, str]) -> str | None:
    """The first file that is missing or not what the tags say, or None."""
    missing = next((name for name in PREFIX_FILES if not (folder / name).is_file()), None)
    if missing:
        return missing
    try:
        if file_digest(folder / "prefix.safetensors") != tags["weights_sha256"]:
            return "prefix.safetensors"
        return None if content_digest(folder) == tags["content_digest"] else "prefix.json"
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror}). Check its permissions, or delete it.") from error
