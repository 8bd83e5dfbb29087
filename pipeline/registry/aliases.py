"""Which version answers: the aliases `champion`, `challenger` and `previous`, and the three who move them: the gate, `promote`, `rollback`.

In: a customer's key and a version. Out: aliases in MLflow, and the tag `prefixfleet.promoted` on whoever became champion. Moving several aliases
takes several requests, so their order is what keeps a process that dies between them from losing anything; see the functions.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from pipeline.errors import RegistryError
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry.lookup import lookup, outdated
from pipeline.registry.store import connect, ensure_store, lock, shown_uri, translated, written
from pipeline.registry.tombstones import refuse_forgotten
from pipeline.registry.versions import CHALLENGER, CHAMPION, PREVIOUS, TAG, aliases_of, models, own_tags, versions_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

Alias = Literal["champion", "challenger"]
# Of `2026-11-23T09:04:40+00:00 by the gate`: the characters of the time.
_TIME = 25


@dataclass(frozen=True)
class Moved:
    """What `promote` or `rollback` did.

    Attributes:
        name: the MLflow registered model.
        champion: the version that answers now.
        before: the version that answered before, or None.
        previous: the version that `rollback` would go back to now, or None.
    """

    name: str
    champion: int
    before: int | None
    previous: int | None


def settle(client: "MlflowClient", name: str, version: int, decision: str) -> Alias | None:
    """Move the aliases as the gate decided about `version`; returns the alias that it holds now.

    - `promote`: champion. Whoever was it becomes previous, and nobody is challenger any more.
    - `keep`: challenger, for it is better than the base but not than the champion.
    - `reject`, or any other word: neither.
    """
    held = aliases_of(client, name)
    if decision == "promote":
        if held.get(CHAMPION) != version:
            _crown(client, name, version, held, "the gate")
        elif held.get(CHALLENGER) == version:
            client.delete_registered_model_alias(name, CHALLENGER)
        return "champion"
    if decision == "keep":
        if held.get(CHAMPION) == version:
            return "champion"
        if held.get(CHALLENGER) != version:
            written(client.set_registered_model_alias, name, CHALLENGER, str(version))
        return "challenger"
    for alias in (CHAMPION, CHALLENGER):
        if held.get(alias) == version:
            client.delete_registered_model_alias(name, alias)
    return None


def promote(key: CustomerKey, version: int | None = None, *, force: bool = False, home: Home | None = None) -> Moved:
    """Make a version champion: this one, or the challenger. Its files are checked first; whoever was champion becomes previous.

    Args:
        key: whose.
        version: by default the one with the alias `challenger`.
        force: even one that the gate rejected.

    Raises:
        RegistryError: there is no such version, the gate rejected it, its files are not what was registered, or MLflow failed.
    """
    home = home or Home.current()
    ensure_store(home)
    name = key.model_name
    with lock(home, name), translated(f"promoting a version of customer {key}"):
        client = connect()
        held = _held(client, key)
        if version is None and CHALLENGER not in held:
            raise RegistryError(f"customer {key}: there is no challenger at {shown_uri()}. {_choice(client, name)}")
        chosen = held[CHALLENGER] if version is None else version
        found = lookup(key, version=chosen, home=home, fresh=True)
        rejected = found.tags.get("decision") == "reject"
        if rejected and not force:
            raise RegistryError(
                f"customer {key}: the gate rejected version {chosen} ({found.tags.get('reasons', '')}). `--force` promotes it nevertheless."
            )
        before = held.get(CHAMPION)
        if before != chosen:
            _crown(client, name, chosen, held, "hand", rejected)
        else:  # what a promotion that was killed had left to do
            if rejected and "promoted" not in found.tags:
                _note(client, name, chosen, "hand")
            if held.get(CHALLENGER) == chosen:
                client.delete_registered_model_alias(name, CHALLENGER)
        outdated(name)
        return Moved(name, chosen, before, aliases_of(client, name).get(PREVIOUS))


def rollback(key: CustomerKey, version: int | None = None, *, home: Home | None = None) -> Moved:
    """Go back to the previous champion, or to `version`. The one that is left becomes previous, so a second rollback undoes the first.

    Raises:
        RegistryError: there is nothing to go back to, the version's files are not what was registered, or MLflow failed.
    """
    home = home or Home.current()
    ensure_store(home)
    name = key.model_name
    with lock(home, name), translated(f"rolling back customer {key}"):
        client = connect()
        held = _held(client, key)
        target = held.get(PREVIOUS) if version is None else version
        before = held.get(CHAMPION)
        if before is not None and target == before:
            return _finish_rollback(client, key, before, held.get(PREVIOUS), named=version is not None)
        if target is None:
            raise RegistryError(
                f"customer {key}: no version was champion before, so there is nothing to go back to at {shown_uri()}. {_choice(client, name)}"
            )
        found = lookup(key, version=target, home=home, fresh=True)
        if found.tags.get("decision") == "reject" and "promoted" not in found.tags:
            raise RegistryError(
                f"customer {key}: the gate rejected version {target} ({found.tags.get('reasons', '')}) and it never was champion, so there is "
                f"no going back to it. `prefixfleet promote --customer {key} --version {target} --force` promotes it nevertheless."
            )
        _note(client, name, target, "rollback")
        if held.get(CHALLENGER) == target:
            client.delete_registered_model_alias(name, CHALLENGER)
        # The champion first: to die before the second step must not lose the version that was to be gone back to.
        written(client.set_registered_model_alias, name, CHAMPION, str(target))
        if before is not None:
            written(client.set_registered_model_alias, name, PREVIOUS, str(before))
        outdated(name)
        return Moved(name, target, before, before)


def _finish_rollback(client: "MlflowClient", key: CustomerKey, champion: int, previous: int | None, *, named: bool) -> Moved:
    """The version to go back to is champion: if a rollback was cut short before it could name the one before it, name that now.

    Args:
        previous: the version that is noted as the one before.
        named: whether somebody asked for this version, rather than for the one before.
    """
    name = key.model_name
    notes = {int(v.version): own_tags(v.tags).get("promoted", "") for v in versions_of(client, name)}
    own = notes.pop(champion, "")
    before = max((number for number in notes if notes[number]), key=lambda number: (notes[number][:_TIME], number), default=None)
    if before is None or not own.endswith("by rollback") or notes[before][:_TIME] > own[:_TIME]:
        before = None
    if before is None and not named:
        raise RegistryError(
            f"customer {key}: a promotion was interrupted before its version became champion, and version {champion} still is. Promote "
            f"again, or name the version to go back to. {_choice(client, name)}"
        )
    if before is None or before == previous:
        raise RegistryError(f"customer {key}: version {champion} is champion already. {_choice(client, name)}")
    written(client.set_registered_model_alias, name, PREVIOUS, str(before))
    outdated(name)
    return Moved(name, champion, before, before)


def _crown(client: "MlflowClient", name: str, version: int, held: dict[str, int], by: str, rejected: bool = False) -> None:
    """Make `version` champion. Whoever is it is noted as previous first. The challenger goes last if it is the one meant, for a call that names none
    finds it by that; another goes before, for once the champion has moved nobody would know that it is to go. So whenever a process dies, the same
    call again finds who was meant and who answered before, and finishes. A `rejected` version is noted as promoted only once it is: that lets
    `rollback` pass it."""
    if not rejected:
        _note(client, name, version, by)
    if held.get(CHAMPION) is not None:
        written(client.set_registered_model_alias, name, PREVIOUS, str(held[CHAMPION]))
    if held.get(CHALLENGER) not in (None, version):
        client.delete_registered_model_alias(name, CHALLENGER)
    written(client.set_registered_model_alias, name, CHAMPION, str(version))
    if rejected:
        _note(client, name, version, by)
    if held.get(CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


def _note(client: "MlflowClient", name: str, version: int, by: str) -> None:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    written(client.set_model_version_tag, name, str(version), f"{TAG}promoted", f"{when} by {by}")


def _held(client: "MlflowClient", key: CustomerKey) -> dict[str, int]:
    refuse_forgotten(client, key.customer)
    if not models(client, [key]):
        raise RegistryError(
            f"customer {key}: no prefix is registered at {shown_uri()}. `prefixfleet run FLEET.yaml` trains and registers."
        )
    return aliases_of(client, key.model_name)


def _choice(client: "MlflowClient", name: str) -> str:
    versions = [f"{v.version} ({own_tags(v.tags).get('decision', 'foreign')})" for v in versions_of(client, name)[:20]]
    return f"Versions are: {', '.join(versions) or 'none'}. Name one with --version."
