"""What the registry holds, for tables: the whole fleet, one customer's versions, and what changed between two of them.

In: customers and versions. Out: rows with scores, settings and counts. Changes nothing.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import RegistryError
from pipeline.files import read_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry.lookup import Found, lookup
from pipeline.registry.store import connect, ensure_store, shown_uri, translated
from pipeline.registry.tombstones import refuse_forgotten
from pipeline.registry.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    models,
    newest_version,
    own_tags,
    scores_of,
    versions_of,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

# What training found out, as against what it was told.
_OUTCOMES = ("steps", "best_step", "best_dev_loss", "train_loss")
# Neither settings nor figures that can be compared: lists, and what differs with the machine.
_LEFT_OUT = ("sites", "history", "seconds", "peak_memory_bytes", "path")


@dataclass(frozen=True)
class ModelStatus:
    """The newest version of one customer, and which versions hold the aliases.

    Attributes:
        champion_version, challenger_version, previous_version: None if no version holds the alias.
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
    challenger_version: int | None = None
    previous_version: int | None = None


@dataclass(frozen=True)
class Version:
    """One version in a customer's history.

    Attributes:
        aliases: those it holds.
        promoted: when it last became champion and by whom (`2026-11-23T09:04:40+00:00 by the gate`); empty if never.
        parent_version: the version that its training started from; None for a cold start.
        champion_before: the champion when this version appeared; None if there was none.
        created_at: UTC.
    """

    version: int
    aliases: tuple[str, ...]
    decision: str
    reasons: str
    scores: dict[str, float]
    base_scores: dict[str, float]
    created_at: datetime
    promoted: str
    parent_version: int | None
    champion_before: int | None
    data_fingerprint: str
    config_digest: str
    base_digest: str
    code_version: str
    seed: str
    fingerprint: str
    run_id: str | None


@dataclass(frozen=True)
class Difference:
    """What changed from version `old` to version `new` of a customer. Each list holds only what differs, as (name, old, new).

    Attributes:
        settings: of prefix, prompt, training, decoding and base; a setting that one of the two does not have is None there.
        data: counts and fingerprints of the data; the same fingerprint means the same rows.
        outcomes: steps and losses of the training.
        scores: of both by metric (None where one was not scored), all of them, changed or not.
    """

    name: str
    old: int
    new: int
    settings: list[tuple[str, Any, Any]] = field(default_factory=list)
    data: list[tuple[str, Any, Any]] = field(default_factory=list)
    outcomes: list[tuple[str, Any, Any]] = field(default_factory=list)
    scores: list[tuple[str, float | None, float | None]] = field(default_factory=list)


def status(keys: list[CustomerKey] | None = None) -> list[ModelStatus]:
    """The state of these customers, or of all, sorted by key. Customers without any version are left out.

    Raises:
        RegistryError: MLflow failed.
    """
    ensure_store()
    with translated("reading the status"):
        client = connect()
        found = models(client, keys)
        if keys is None:
            # One question for all: MLflow gives the newest version of each stage along with its model, and a fleet has no stages but `None`.
            newest = {
                name: max(model.latest_versions, key=lambda version: int(version.version))
                for name, (_, model) in found.items()
                if model.latest_versions
            }
        else:
            newest = {name: version for name in found if (version := newest_version(client, name)) is not None}
        rows = [_status(key, model, newest[name]) for name, (key, model) in found.items() if name in newest]
    return sorted(rows, key=lambda row: row.key)


def history(key: CustomerKey) -> list[Version]:
    """All versions of a customer, the newest first.

    Raises:
        RegistryError: there are none, the customer was forgotten, or MLflow failed.
    """
    ensure_store()
    with translated(f"reading the history of customer {key}"):
        client = connect()
        refuse_forgotten(client, key.customer)
        found = models(client, [key])
        rows = [_version(version, found[key.model_name][1]) for version in versions_of(client, key.model_name)] if found else []
    if not rows:
        raise RegistryError(
            f"customer {key}: no prefix is registered at {shown_uri()}. `prefixfleet run FLEET.yaml` trains and registers."
        )
    return rows


def diff(key: CustomerKey, old: int | str, new: int | str, home: Home | None = None) -> Difference:
    """What changed between two versions of a customer, each named by number or alias.

    Raises:
        RegistryError: there is no such version, its files are not what was registered, or MLflow failed.
    """
    home = home or Home.current()
    left, right = (_look_up(key, which, home) for which in (old, new))
    before, after = (read_json(found.prefix_dir / "prefix.json", 1) for found in (left, right))
    settings = [
        _flat(content, ("prefix", "prompt", "chat", "generation", "base")) | _training(content) for content in (before, after)
    ]
    lineage = [content["lineage"] for content in (before, after)]
    for told, line in zip(settings, lineage, strict=True):
        told |= {"seed": line["seed"], "code_version": line["code_version"]}
    data = [{"fingerprint": line["data_fingerprint"], **_flat(line, ("counts",))} for line in lineage]
    outcomes = [{name: content["training"].get(name) for name in _OUTCOMES} for content in (before, after)]
    scores = [
        {
            f"{who}{metric}": score
            for start, who in (("score.", ""), ("base_score.", "base "))
            for metric, score in scores_of(tags, start).items()
        }
        for tags in (left.tags, right.tags)
    ]
    return Difference(
        key.model_name,
        left.version,
        right.version,
        _changed(*settings),
        _changed(*data),
        _changed(*outcomes),
        [(name, scores[0].get(name), scores[1].get(name)) for name in dict.fromkeys([*scores[0], *scores[1]])],
    )


def _look_up(key: CustomerKey, which: int | str, home: Home) -> Found:
    if isinstance(which, int):
        return lookup(key, version=which, home=home, fresh=True)
    return lookup(key, which, home=home, fresh=True)


def _training(content: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in _flat(content, ("training",)).items() if name.removeprefix("training.") not in _OUTCOMES
    }


def _flat(content: dict[str, Any], sections: tuple[str, ...]) -> dict[str, Any]:
    """`{"prefix": {"length": 5}}` as `{"prefix.length": 5}`, without what cannot be compared."""
    flat: dict[str, Any] = {}
    for section in sections:
        value = content.get(section)
        if isinstance(value, dict):
            flat |= {f"{section}.{name}": one for name, one in value.items() if name not in _LEFT_OUT}
        elif value is not None:
            flat[section] = value
    return flat


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def _status(key: CustomerKey, model: "RegisteredModel", newest: "ModelVersion") -> ModelStatus:
    tags, held = own_tags(newest.tags), {alias: int(version) for alias, version in model.aliases.items()}
    return ModelStatus(
        key=key,
        name=model.name,
        version=int(newest.version),
        champion_version=held.get(CHAMPION),
        scores=scores_of(tags, "score."),
        base_scores=scores_of(tags, "base_score."),
        decision=tags.get("decision", ""),
        created_at=_time(newest),
        fingerprint=tags.get("fingerprint", ""),
        run_id=newest.run_id or None,
        challenger_version=held.get(CHALLENGER),
        previous_version=held.get(PREVIOUS),
    )


def _version(version: "ModelVersion", model: "RegisteredModel") -> Version:
    tags = own_tags(version.tags)
    return Version(
        version=int(version.version),
        aliases=tuple(sorted(alias for alias, number in model.aliases.items() if int(number) == int(version.version))),
        decision=tags.get("decision", ""),
        reasons=tags.get("reasons", ""),
        scores=scores_of(tags, "score."),
        base_scores=scores_of(tags, "base_score."),
        created_at=_time(version),
        promoted=tags.get("promoted", ""),
        parent_version=_number(tags.get("parent_version")),
        champion_before=_number(tags.get("champion_before")),
        data_fingerprint=tags.get("data_fingerprint", ""),
        config_digest=tags.get("config_digest", ""),
        base_digest=tags.get("base_digest", ""),
        code_version=tags.get("code_version", ""),
        seed=tags.get("seed", ""),
        fingerprint=tags.get("fingerprint", ""),
        run_id=version.run_id or None,
    )


def _time(version: "ModelVersion") -> datetime:
    return datetime.fromtimestamp(version.creation_timestamp / 1000, tz=UTC)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None
