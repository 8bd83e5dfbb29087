"""What a registered version is: its names, tags and aliases, and how versions are found. Every other module of the registry speaks in these words.

In: an MLflow client, a customer's key. Out: versions and models of ours; those of others under similar names are left out. Changes nothing, and
knows nothing of files but which two make a prefix.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, RegistryError
from pipeline.files import digest_of, file_digest
from pipeline.keys import DIGEST_PATTERN, CustomerKey

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

# Who answers; who was judged better than the base but no better than the champion; who answered before.
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
TAG = "prefixfleet."
MODELS = "prefixfleet."
PREFIX_FILES = ("prefix.json", "prefix.safetensors")
# MLflow takes 8,000 characters in a run's tag and more in a version's; nobody reads that many.
_MAX_TEXT = 2000


def own_tags(tags: dict[str, str]) -> dict[str, str]:
    """The tags that are ours, without the leading `prefixfleet.`."""
    return {name.removeprefix(TAG): value for name, value in tags.items() if name.startswith(TAG)}


def plain_text(value: Any) -> str:
    """`value` as text that every store takes: no NUL (PostgreSQL), no lone surrogates (all), not endless; nothing for None."""
    text = "" if value is None else str(value)
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")[:_MAX_TEXT]


def content_digest(folder: Path) -> str:
    """SHA-256 over the digests of the files of a prefix folder: what a downloaded copy must have."""
    return content_digest_of({name: file_digest(folder / name) for name in PREFIX_FILES})


def content_digest_of(digests: dict[str, str]) -> str:
    """As `content_digest`, from the digests of the files by their names."""
    return digest_of(digests)


def find_version(client: "MlflowClient", name: str, fingerprint: str) -> int | None:
    """The version of model `name` that holds the prefix with this fingerprint, or None.

    Of several, which machines that register at the same moment make, the lowest: it was there first, and everybody finds the same one.

    Raises:
        RegistryError: `fingerprint` is none.
    """
    found = find_versions(client, name, fingerprint)
    return int(found[0].version) if found else None


def find_versions(client: "MlflowClient", name: str, fingerprint: str) -> "list[ModelVersion]":
    """All versions with this fingerprint, the lowest first; see `find_version`."""
    if not re.fullmatch(DIGEST_PATTERN, fingerprint):
        raise RegistryError(f"{name}: {fingerprint[:80]!r} is no fingerprint (64 hex digits). Train the prefix again.")
    found = pages(client.search_model_versions, f"name = '{name}' and tags.`{TAG}fingerprint` = '{fingerprint}'")
    return sorted(found, key=lambda version: int(version.version))


def versions_of(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """All versions of model `name`, the newest first. Without aliases, which MLflow's search does not give."""
    return sorted(pages(client.search_model_versions, f"name = '{name}'"), key=lambda version: -int(version.version))


def aliases_of(client: "MlflowClient", name: str) -> dict[str, int]:
    """The versions that hold the aliases of model `name`."""
    return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}


def newest_version(client: "MlflowClient", name: str) -> "ModelVersion | None":
    """The newest version of model `name`, or None if it has none or does not exist."""
    found = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    return found[0] if found else None


def models(client: "MlflowClient", keys: list[CustomerKey] | None) -> "dict[str, tuple[CustomerKey, RegisteredModel]]":
    """Registered models by name, of these customers or of all."""
    if keys is None:
        found = list(pages(client.search_registered_models, f"name LIKE '{MODELS}%'"))
    else:
        # One search a customer: `get` would raise for those that are not there.
        found = [model for key in keys for model in client.search_registered_models(f"name = '{key.model_name}'")]
    return {model.name: (key, model) for model in found if (key := key_of(model.name)) is not None}


def key_of(name: str) -> CustomerKey | None:
    """The inverse of `CustomerKey.model_name`; None for a model of somebody else."""
    parts = name.removeprefix(MODELS).split(".")
    try:
        key = CustomerKey(*parts) if len(parts) <= 2 else None
    except ConfigError:
        return None
    return key if key is not None and key.model_name == name else None


def pages(search: Callable[..., Any], filter_string: str) -> Iterator[Any]:
    """Everything that one of MLflow's searches finds, page by page."""
    token = None
    while True:
        page = search(filter_string, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def scores_of(tags: dict[str, str], start: str) -> dict[str, float]:
    """Scores by metric from the tags (`own_tags`) that begin with `start`: `score.` with the prefix, `base_score.` without."""
    scores = {}
    for name, value in tags.items():
        if name.startswith(start):
            try:
                scores[name.removeprefix(start)] = float(value)
            except ValueError:
                continue  # somebody edited the tag by hand; the others are shown
    return scores
