"""What planning asks of the registry, compared with what MLflow's own search says of the same database."""

import pytest
from mlflow import MlflowClient

from pipeline.errors import RegistryError
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry import Held, held, register, status


def version(client: MlflowClient, name: str, fingerprint: str, **tags: str) -> int:
    made = client.create_model_version(name, "/nowhere", tags={"prefixfleet.fingerprint": fingerprint, **tags})
    return int(made.version)


def by_mlflow() -> dict[CustomerKey, Held]:
    return {one.key: Held(one.version, one.fingerprint, one.champion_version, one.challenger_version) for one in status()}


def test_what_a_database_is_asked_for_is_what_mlflows_search_finds_whatever_was_changed_behind_our_back(sqlite: Home) -> None:
    client = MlflowClient()
    for name in (
        "prefixfleet.acme",
        "prefixfleet.acme.menu",
        "prefixfleet.bolt",
        "prefixfleet.none",
        "prefixfleet.Not Ours",
        "other",
    ):
        client.create_registered_model(name)
    for number in range(3):
        version(client, "prefixfleet.acme", f"{number}" * 64, **{"prefixfleet.customer": "acme"})
    version(client, "prefixfleet.acme.menu", "a" * 64)
    version(client, "prefixfleet.bolt", "b" * 64)
    version(client, "prefixfleet.Not Ours", "c" * 64)
    version(client, "other", "d" * 64)
    client.set_registered_model_alias("prefixfleet.acme", "champion", "1")
    client.set_registered_model_alias("prefixfleet.acme", "challenger", "3")
    client.set_registered_model_alias("prefixfleet.acme", "somebody", "2")
    acme, menu, bolt = CustomerKey("acme"), CustomerKey("acme", "menu"), CustomerKey("bolt")
    assert held() == by_mlflow()
    assert held() == {
        acme: Held(3, "2" * 64, 1, 3), menu: Held(1, "a" * 64, None, None), bolt: Held(1, "b" * 64, None, None),
    }  # fmt: skip
    assert held([acme, CustomerKey("none")]) == {acme: Held(3, "2" * 64, 1, 3)}

    client.delete_model_version("prefixfleet.acme", "3")
    client.set_registered_model_alias("prefixfleet.acme", "champion", "2")
    client.delete_model_version_tag("prefixfleet.bolt", "1", "prefixfleet.fingerprint")
    client.delete_registered_model("prefixfleet.acme.menu")
    assert held() == by_mlflow()
    assert held() == {acme: Held(2, "1" * 64, 2, None), bolt: Held(1, "", None, None)}


def test_a_database_that_refuses_is_named(sqlite: Home) -> None:
    import sqlalchemy

    from pipeline.registry.store import database_engine

    with database_engine(f"sqlite:///{sqlite.mlflow_database}").begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE registered_model_aliases"))
    with pytest.raises(RegistryError, match=r"reading what is registered: MLflow at sqlite:///.*no such table"):
        held()


def test_a_server_is_asked_through_mlflow(server: Home, make, customer: str) -> None:
    register(*make(customer=customer))
    assert held()[CustomerKey(customer)] == by_mlflow()[CustomerKey(customer)]
    assert held()[CustomerKey(customer)].champion_version == 1
