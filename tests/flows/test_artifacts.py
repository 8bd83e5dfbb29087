"""What a run leaves in Prefect's UI beside its table, read back through a real API."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import events
from flows.work import Row


@pytest.fixture
def artifacts(prefect_session: Any) -> Any:
    """The module, imported once Prefect's settings are made."""
    from flows import artifacts

    return artifacts


def read(key: str) -> list[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_a_long_job_shows_its_progress_in_one_artifact_and_a_short_one_none(
    artifacts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    seen: list[dict[str, Any]] = []
    with events.listening(seen.append):
        short = artifacts.JobProgress("short-0", "train")
        for done in range(5):
            short({"stage": "train", "done": done, "total": 4, "unit": "steps"})
        long = artifacts.JobProgress("long-0", "train")
        for done in range(201):
            now[0] += 1.0
            long({"stage": "train", "done": done, "total": 200, "unit": "steps", "loss": 1.5})
            long({"stage": "other", "done": 1, "total": 1})
    assert len(seen) == 5 + 2 * 201, "every event is handed on"
    assert read("progress-short-0-train") == []
    (made,) = read("progress-long-0-train")
    assert made.type == "progress" and float(made.data) == 100.0 and made.description.startswith("200 of 200 steps")
    assert "1.5" in made.description


def test_the_curves_of_losses_are_a_picture_of_those_who_have_a_prefix(artifacts: Any, tmp_path: Path) -> None:
    members = []
    for name in ("acme", "bolt"):
        folder = tmp_path / name
        members.append(SimpleNamespace(key=name, prefix_dir=str(folder)))
        if name == "acme":
            folder.mkdir()
            history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "dev_loss": 2.5}]
            (folder / "prefix.json").write_text(json.dumps({"format": 1, "training": {"history": history}}), encoding="utf-8")
    artifacts.leave_losses(SimpleNamespace(job=SimpleNamespace(name="curves-0", customers=members)))
    (made,) = read("loss-curves-0")
    assert made.type == "image" and made.description == "Dev losses of acme"
    kind, _, picture = made.data.partition("base64,")
    assert kind == "data:image/png;" and base64.b64decode(picture).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("store", "link"),
    [
        ("http://mlflow.example:5000/", "http://mlflow.example:5000/#/models/prefixfleet.acme.menu/versions/7"),
        ("http://user:secret@mlflow.example", "http://mlflow.example/#/models/prefixfleet.acme.menu/versions/7"),
        ("sqlite:////home/x/mlflow.db", "models:/prefixfleet.acme.menu/7"),
    ],
)
def test_the_table_links_to_mlflows_page_of_a_version_and_shows_no_password(
    artifacts: Any, store: str, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    assert artifacts._cells(Row("acme/menu", version=7))["mlflow"] == link
    assert artifacts._cells(Row("acme/menu"))["mlflow"] is None
