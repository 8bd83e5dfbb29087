"""Registration: once a prefix, whatever happens; lineage whole; the alias only to those that passed the gate."""

import http.server
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.errors import RegistryError, StorageError
from pipeline.files import file_digest, read_json, write_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.registry import find, lookup, register
from pipeline.registry.register import Registration
from pipeline.registry.store import translated

InChild = Callable[..., Any]


def versions(customer: str) -> list[int]:
    return sorted(int(v.version) for v in MlflowClient().search_model_versions(f"name = 'prefixfleet.{customer}'"))


def champion(customer: str) -> int | None:
    value = MlflowClient().get_registered_model(f"prefixfleet.{customer}").aliases.get("champion")
    return None if value is None else int(value)


def test_registering_twice_makes_one_version(home: Home, make, customer: str) -> None:
    folders = make(customer=customer)
    first, second = register(*folders), register(*folders)
    assert (first.version, first.created, first.alias) == (1, True, "champion")
    assert second == Registration(first.name, 1, "champion", False, first.run_id)
    assert versions(customer) == [1]
    assert find(CustomerKey(customer), read_json(folders[0] / "prefix.json", 1)["digest"]) == 1
    assert find(CustomerKey(customer), "0" * 64) is None


def test_another_prefix_becomes_another_version_and_champion(home: Home, make, customer: str) -> None:
    register(*make(customer=customer, seed=1))
    assert register(*make(customer=customer, seed=2)).version == 2
    assert (versions(customer), champion(customer)) == ([1, 2], 2)


def test_rejected_prefix_is_registered_but_leaves_the_champion(home: Home, make, customer: str) -> None:
    register(*make(customer=customer, seed=1))
    rejected = register(*make(customer=customer, seed=2, decision="reject", bleu=1.0))
    assert (rejected.version, rejected.alias, champion(customer)) == (2, None, 1)


def test_changed_decision_updates_tags_report_scores_and_alias_of_the_same_version(
    home: Home, make, customer: str, tmp_path: Path
) -> None:
    first = register(*make(customer=customer, decision="reject", bleu=1.0))
    assert (first.alias, champion(customer)) == (None, None)
    again = register(*make(customer=customer, decision="promote", bleu=50.0))
    assert (again.version, again.created, again.alias, champion(customer)) == (1, False, "champion", 1)
    client = MlflowClient()
    version = client.get_model_version(first.name, "1")
    assert version.tags["prefixfleet.decision"] == "promote" and version.tags["prefixfleet.score.bleu"] == "50.0000"
    assert version.description == "promote: bleu 50.0 (base 3.2), rougeL 60.0 (base 20.0)"
    assert client.get_run(first.run_id).data.metrics["score.bleu"] == 50.0
    report = mlflow.artifacts.download_artifacts(
        f"models:/{first.name}/1/artifacts/evaluation/report.html", dst_path=str(tmp_path / "got")
    )
    assert Path(report).read_text() == "<p>bleu 50.0</p>"
    assert register(*make(customer=customer, decision="reject", bleu=1.0)).alias is None
    assert (versions(customer), champion(customer)) == ([1], None)


def test_lineage_is_in_the_tags_and_files_are_in_the_model(home: Home, make, customer: str, tmp_path: Path) -> None:
    prefix_dir, evaluation_dir = make(customer=customer, task="menu")
    done = register(prefix_dir, evaluation_dir)
    prefix, client = read_json(prefix_dir / "prefix.json", 1), MlflowClient()
    version = client.get_model_version(f"prefixfleet.{customer}.menu", str(done.version))
    expected = {
        "fingerprint": prefix["digest"],
        "config_digest": prefix["lineage"]["config_digest"],
        "data_fingerprint": prefix["lineage"]["data_fingerprint"],
        "base_id": "examples/base",
        "base_revision": "",
        "base_digest": prefix["base"]["digest"],
        "code_version": "0.1.0+abc",
        "seed": "0",
        "weights_sha256": file_digest(prefix_dir / "prefix.safetensors"),
        "decision": "promote",
        "score.bleu": "41.5000",
        "base_score.bleu": "3.2500",
        "score.rougeL": "60.0000",
        "base_score.rougeL": "20.0000",
    }
    assert {name: version.tags.get(f"prefixfleet.{name}") for name in expected} == expected
    assert version.run_id == done.run_id and client.get_run(done.run_id).info.status == "FINISHED"
    assert client.get_run(done.run_id).data.metrics["score.bleu.low"] == 39.0
    got = Path(mlflow.artifacts.download_artifacts(f"models:/prefixfleet.{customer}.menu/1", dst_path=str(tmp_path / "got")))
    assert (got / "artifacts/prefix/prefix.safetensors").read_bytes() == (prefix_dir / "prefix.safetensors").read_bytes()
    assert (got / "artifacts/evaluation/report.html").read_text() == "<p>bleu 41.5</p>"
    assert not [f for f in got.rglob("*") if f.suffix in (".pkl", ".pickle", ".bin", ".pt")]
    info = mlflow.models.get_model_info(f"models:/prefixfleet.{customer}.menu/1")
    assert info.signature.inputs.to_dict() == [{"type": "string", "name": "input", "required": True}]
    assert info.signature.outputs.to_dict() == [{"type": "string", "required": True}]
    assert json.loads((got / "serving_input_example.json").read_text()) == {
        "dataframe_split": {"columns": ["input"], "data": [["name : The Punter"]]}
    }
    assert "torch==" in (got / "requirements.txt").read_text() and "+cpu" not in (got / "requirements.txt").read_text()


def test_run_of_training_is_used_if_this_store_has_it(home: Home, make, customer: str) -> None:
    client = MlflowClient()
    experiment = client.create_experiment(f"training-{customer}")
    run_id = client.create_run(experiment).info.run_id
    client.set_terminated(run_id)
    assert register(*make(customer=customer, seed=1, run_id=run_id)).run_id == run_id
    elsewhere = register(*make(customer=customer, seed=2, run_id="f" * 32))
    assert elsewhere.run_id not in (run_id, "f" * 32) and elsewhere.version == 2
    client.delete_run(run_id)
    assert register(*make(customer=customer, seed=3, run_id=run_id)).run_id not in (run_id, elsewhere.run_id)


def test_hostile_text_in_lineage_is_stored_as_text(home: Home, make, customer: str, sqlite: Home) -> None:
    nasty = "'; DROP TABLE runs; -- \" ` <script>alert(1)</script> {{x}} \n\r\t \x00 \ud800 é 漢"
    prefix_dir, evaluation_dir = make(customer=customer)
    prefix = json.loads((prefix_dir / "prefix.json").read_text())
    prefix["base"]["id"], prefix["lineage"]["code_version"] = nasty, "x" * 50_000
    (prefix_dir / "prefix.json").write_text(json.dumps(prefix))
    done = register(prefix_dir, evaluation_dir)
    tags = MlflowClient().get_model_version(done.name, "1").tags
    assert tags["prefixfleet.base_id"] == nasty.replace("\x00", "\ufffd").replace("\ud800", "?")
    assert len(tags["prefixfleet.code_version"]) == 2000
    assert register(prefix_dir, evaluation_dir).created is False


def test_evaluation_of_another_prefix_is_refused(sqlite: Home, make) -> None:
    with pytest.raises(RegistryError, match="Evaluate this prefix first"):
        register(make(seed=1)[0], make(seed=2)[1])


def test_changed_weights_are_refused(sqlite: Home, make) -> None:
    prefix_dir, evaluation_dir = make()
    with (prefix_dir / "prefix.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(RegistryError, match="train again"):
        register(prefix_dir, evaluation_dir)


@pytest.mark.parametrize("fingerprint", ["' OR 1=1 --", "A" * 64, "", "../x"])
def test_fingerprint_that_is_none_never_reaches_a_query(sqlite: Home, make, fingerprint: str) -> None:
    prefix_dir, evaluation_dir = make()
    for file in (prefix_dir / "prefix.json", evaluation_dir / "metrics.json"):
        content = read_json(file, 1)
        content["digest" if file.name == "prefix.json" else "prefix_digest"] = fingerprint
        write_json(file, content)
    with pytest.raises(RegistryError, match="is no fingerprint"):
        register(prefix_dir, evaluation_dir)


def test_upload_that_fails_makes_no_version(sqlite: Home, make, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise MlflowException("API request to http://store.invalid failed with exception")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", away)
    with pytest.raises(RegistryError, match="does not answer"):
        register(*make())
    assert versions("acme") == []


def test_a_server_that_fails_is_not_told_to_be_started(sqlite: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    client = MlflowClient(f"http://127.0.0.1:{server.server_port}")
    try:
        with (
            pytest.raises(RegistryError, match=r"asking: MLflow .* fails with status 500 .* log says why") as told,
            translated("asking"),
        ):
            client.get_experiment("0")
    finally:
        server.shutdown()
        server.server_close()
    assert "Start it" not in str(told.value)


def test_registry_of_its_own_gets_the_versions(
    sqlite: Home, make, server_uri: str, customer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{sqlite.root}/registry.db")
    assert register(*make(customer=customer)).alias == "champion"
    assert lookup(CustomerKey(customer)).version == 1
    assert MlflowClient(registry_uri=f"sqlite:///{sqlite.mlflow_database}").search_registered_models() == []


@pytest.mark.parametrize("died", [False, True])
def test_a_registration_in_one_registry_leaves_the_files_of_another_on_the_same_tracking_store(
    sqlite: Home, fresh_home: Path, make, monkeypatch: pytest.MonkeyPatch, died: bool
) -> None:
    register(*make(seed=1))
    if died:  # after the version appeared, before its files were noted as belonging to it
        client = MlflowClient()
        model = client.get_model_version("prefixfleet.acme", "1").source.removeprefix("models:/")
        client.delete_logged_model_tag(model, "mlflow.modelVersions")
    shutil.copyfile(fresh_home / "mlflow.db", sqlite.root / "registry.db")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{sqlite.root}/registry.db")
        assert register(*make(seed=2)).version == 1
    assert lookup("acme", fresh=True).tags["seed"] == "1"


@pytest.mark.parametrize("name", ["generations.jsonl", "metrics.json", "decision.json", "report.html"])
def test_missing_file_of_an_evaluation_is_named_with_the_remedy(make, name: str) -> None:
    prefix, evaluation = make()
    (evaluation / name).unlink()
    with pytest.raises(RegistryError, match=f"{name}: is missing. Delete .* and run the same command again"):
        register(prefix, evaluation)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("prefix.json", "weights_sha256"),
        ("prefix.json", "lineage.seed"),
        ("metrics.json", "scores"),
        ("decision.json", "reasons"),
    ],
)
def test_a_field_that_is_missing_is_named_with_the_remedy(make, name: str, field: str) -> None:
    folders = make()
    file = next(folder / name for folder in folders if (folder / name).exists())
    content = json.loads(file.read_text())
    part, _, last = field.rpartition(".")
    del (content[part] if part else content)[last]
    file.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=f"{name}: lacks {field}. Delete {file.parent}, and run"):
        register(*folders)


def test_a_prefix_that_is_no_better_than_the_champion_is_registered_and_leaves_it(home: Home, make, customer: str) -> None:
    register(*make(customer=customer, seed=1))
    kept = register(*make(customer=customer, seed=2, decision="keep", bleu=40.0))
    assert (kept.version, kept.alias, champion(customer)) == (2, "challenger", 1)
