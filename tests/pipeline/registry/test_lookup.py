"""Looking up: what was registered comes back byte for byte or not at all, and errors say what there is."""

import uuid
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from mlflow import MlflowClient

from pipeline.errors import RegistryError
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry import ModelStatus, lookup, register, status


def stored(name: str, version: int = 1) -> Path:
    """Where the embedded store keeps the prefix of a version."""
    uri = MlflowClient().get_model_version_download_uri(name, str(version))
    return Path(unquote(urlparse(uri).path)) / "artifacts" / "prefix"


def same(left: Path, right: Path) -> bool:
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in ("prefix.json", "prefix.safetensors"))


def test_champion_and_versions_come_back_as_they_were_registered(home: Home, make) -> None:
    key = CustomerKey(f"c{uuid.uuid4().hex[:8]}")
    old, new = make(customer=key.customer, seed=1), make(customer=key.customer, seed=2)
    register(*old)
    register(*new)
    found = lookup(key)
    assert (found.version, found.alias) == (2, "champion") and same(found.prefix_dir, new[0])
    assert found.tags["decision"] == "promote" and found.prefix_dir.is_relative_to(home.root / "cache")
    assert (first := lookup(key, version=1)).alias is None and same(first.prefix_dir, old[0])


def test_second_lookup_downloads_nothing(sqlite: Home, make, monkeypatch: pytest.MonkeyPatch) -> None:
    register(*make())
    folder = lookup(CustomerKey("acme")).prefix_dir
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", lambda *a, **k: pytest.fail("downloaded again"))
    assert lookup(CustomerKey("acme")).prefix_dir == folder


def test_damaged_cache_is_downloaded_again(sqlite: Home, make) -> None:
    folders = make()
    register(*folders)
    folder = lookup(CustomerKey("acme")).prefix_dir
    (folder / "prefix.safetensors").write_bytes(b"x")
    assert same(lookup(CustomerKey("acme")).prefix_dir, folders[0])
    (folder / "prefix.json").unlink()
    assert same(lookup(CustomerKey("acme")).prefix_dir, folders[0])


@pytest.mark.parametrize("name", ["prefix.safetensors", "prefix.json"])
def test_tampered_artifact_is_refused_by_name(sqlite: Home, make, name: str) -> None:
    register(*make())
    file = stored("prefixfleet.acme") / name
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(RegistryError, match=f"{name} is not what was registered"):
        lookup(CustomerKey("acme"))
    assert not list((sqlite.root / "cache").rglob("prefix.*"))


def test_deleted_artifact_is_an_error_that_names_the_store(sqlite: Home, make) -> None:
    register(*make())
    for file in stored("prefixfleet.acme").iterdir():
        file.unlink()
    with pytest.raises(RegistryError, match="version 1"):
        lookup(CustomerKey("acme"))


def test_unknown_customer_is_told_who_exists(sqlite: Home, make) -> None:
    with pytest.raises(RegistryError, match=r"no prefix is registered at sqlite.*none"):
        lookup(CustomerKey("nobody"))
    register(*make())
    register(*make(customer="bistro", task="menu"))
    with pytest.raises(RegistryError, match=r"customer nobody: .*Registered are: acme, bistro/menu"):
        lookup("nobody", fresh=True)


def test_missing_alias_is_told_which_exist_and_why_the_gate_said_no(home: Home, make) -> None:
    key = CustomerKey(f"c{uuid.uuid4().hex[:8]}")
    register(*make(customer=key.customer, decision="reject", bleu=1.5))
    with pytest.raises(RegistryError, match=r"'champion'.*Aliases are: none.*version is 1, which the gate rejected: bleu is 1.5"):
        lookup(key)
    register(*make(customer=key.customer, seed=2))
    with pytest.raises(RegistryError, match=r"alias 'challenger'.*champion \(version 2\)"):
        lookup(key, alias="challenger")
    with pytest.raises(RegistryError, match=r"no version 7 .*newest is version 2"):
        lookup(key, version=7)


def test_version_of_others_under_our_name_is_not_trusted(sqlite: Home, make) -> None:
    client = MlflowClient()
    client.create_registered_model("prefixfleet.acme")
    client.create_model_version("prefixfleet.acme", "file:///somewhere")
    with pytest.raises(RegistryError, match="cannot be trusted"):
        lookup(CustomerKey("acme"), version=1)


def test_status_has_the_newest_version_its_scores_and_the_champion(sqlite: Home, make) -> None:
    assert status() == []
    first = register(*make(seed=1))
    rejected = register(*make(seed=2, decision="reject", bleu=1.0))
    register(*make(customer="bistro", task="menu"))
    client = MlflowClient()
    for foreign in ("prefixfleet.Acme", "prefixfleet.a.b.c", "prefixfleet.acme.default", "prefixfleetx"):
        client.create_registered_model(foreign)
        client.create_model_version(foreign, "file:///somewhere")
    rows = status()
    assert [str(row.key) for row in rows] == ["acme", "bistro/menu"]
    row = rows[0]
    assert isinstance(row, ModelStatus) and first.version == 1
    assert (row.version, row.champion_version, row.decision, row.run_id) == (2, 1, "reject", rejected.run_id)
    assert row.scores == {"bleu": 1.0, "rougeL": 60.0} and row.base_scores == {"bleu": 3.25, "rougeL": 20.0}
    assert status([CustomerKey("bistro", "menu"), CustomerKey("nobody")]) == rows[1:]
    assert status([CustomerKey("acme")]) == rows[:1]


def test_status_on_a_server(server: Home, make) -> None:
    key = CustomerKey(f"c{uuid.uuid4().hex[:8]}")
    register(*make(customer=key.customer))
    assert status([key]) == [row for row in status() if row.key == key]
