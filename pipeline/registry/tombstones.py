"""Who was forgotten, and when. A tombstone is an empty registered model `prefixfleet-forgotten.<customer>`: it stands where versions would be
looked for, on every store and for every machine, and MLflow makes it at once or not at all.

Its tags hold the time and, until an administrator has removed the rest, the ids of what MLflow only hides; nothing of the customer's content.
"""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.errors import RegistryError
from pipeline.keys import validate_id
from pipeline.registry.store import connect, ensure_store, translated, written
from pipeline.registry.versions import TAG, own_tags, pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_NAME = "prefixfleet-forgotten."
_HIDDEN = "hidden."
# One question about all tombstones is cheaper than one for each customer, unless there are so many times more of them. How many were last listed:
_TIMES = 3
_listed = 0


def forgotten_customers() -> dict[str, str]:
    """The customers that were forgotten, each with the time (ISO 8601, UTC).

    Raises:
        RegistryError: MLflow failed.
    """
    ensure_store()
    with translated("reading who was forgotten"):
        found = pages(connect().search_registered_models, f"name LIKE '{_NAME}%'")
        return {model.name.removeprefix(_NAME): own_tags(model.tags).get("forgotten", "") for model in found}


def forgotten_among(client: "MlflowClient", customers: set[str]) -> dict[str, str]:
    """Those of `customers` who were forgotten, each with the time: one question for all, or for each if there are far more tombstones."""
    global _listed
    if _listed > _TIMES * len(customers):
        return {name: since for name in sorted(customers) if (since := forgotten_since(client, name)) is not None}
    found = {
        model.name.removeprefix(_NAME): own_tags(model.tags).get("forgotten", "")
        for model in pages(client.search_registered_models, f"name LIKE '{_NAME}%'")
    }
    _listed = len(found)
    return {name: since for name, since in found.items() if name in customers}


def forgotten_since(client: "MlflowClient", customer: str) -> str | None:
    """When this customer was forgotten, or None. Asked at every new look-up: to get costs MLflow half of what a search does."""
    from mlflow.exceptions import MlflowException

    try:
        return own_tags(client.get_registered_model(f"{_NAME}{validate_id(customer)}").tags).get("forgotten", "")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def refuse_forgotten(client: "MlflowClient", customer: str) -> None:
    """Raise a `RegistryError` if this customer was forgotten."""
    since = forgotten_since(client, customer)
    if since is not None:
        raise RegistryError(sentence(customer, since))


def sentence(customer: str, since: str) -> str:
    """What is said wherever a forgotten customer is met."""
    return (
        f"customer {customer}: was forgotten on {since[:10] or 'an unknown day'} and is neither trained nor registered again. "
        f"`prefixfleet forget --customer {customer} --lift` lifts that."
    )


def leave_tombstone(client: "MlflowClient", customer: str) -> str:
    """Make sure that there is a tombstone; returns its time."""
    from mlflow.exceptions import MlflowException

    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        client.create_registered_model(
            f"{_NAME}{validate_id(customer)}",
            tags={f"{TAG}forgotten": now},
            description="What was made from this customer's data was removed. While this entry stands, the customer is not trained again.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return forgotten_since(client, customer) or now


def lift(customer: str) -> bool:
    """Remove a tombstone, so that the customer may be trained again; whether there was one.

    Raises:
        RegistryError: MLflow failed, or still holds what only an administrator can remove: forget the customer again first.
    """
    ensure_store()
    with translated(f"lifting the tombstone of customer {customer}"):
        client = connect()
        if forgotten_since(client, customer) is None:
            return False
        left = still_hidden(client, customer)
        if left:
            raise RegistryError(
                f"customer {customer}: MLflow still holds {len(left)} deleted entries of this customer. Remove them first: "
                f"`prefixfleet forget --customer {customer}` says how."
            )
        client.delete_registered_model(f"{_NAME}{customer}")
        return True


def hide(client: "MlflowClient", customer: str, kind: str, number: str) -> None:
    """Note the id of something that MLflow is about to hide but not to remove. `kind` is `run` or `model`."""
    written(client.set_registered_model_tag, f"{_NAME}{customer}", f"{TAG}{_HIDDEN}{number}", kind)


def removed(client: "MlflowClient", customer: str, number: str) -> None:
    """Take back what `hide` noted."""
    client.delete_registered_model_tag(f"{_NAME}{customer}", f"{TAG}{_HIDDEN}{number}")


def hidden(client: "MlflowClient", customer: str) -> dict[str, str]:
    """What `hide` has noted: kinds by id."""
    tags = own_tags(client.get_registered_model(f"{_NAME}{validate_id(customer)}").tags)
    return {name.removeprefix(_HIDDEN): kind for name, kind in tags.items() if name.startswith(_HIDDEN)}


def still_hidden(client: "MlflowClient", customer: str) -> dict[str, str]:
    """As `hidden`, less what is gone for good: removed by `mlflow gc`, or by a `forget` that was killed before it could take the note back."""
    from mlflow.exceptions import MlflowException

    left = hidden(client, customer)
    for number, kind in list(left.items()):
        try:
            if kind == "run":
                client.get_run(number)  # also one that is hidden
            else:
                hidden_model(client, number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            removed(client, customer, number)
            del left[number]
    return left


def hidden_model(client: "MlflowClient", number: str) -> "LoggedModel":
    """MLflow's record of the files of a version, also one that it hides: what no public function gives (MLflow 3.17)."""
    return client._tracking_client.store.get_logged_model(number, allow_deleted=True)
