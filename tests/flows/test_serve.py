"""`prefixfleet serve` and `prefixfleet keys` as commands."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from flows.cli import main
from pipeline.home import Home

from .test_ensemble import fleet, version  # noqa: F401  # fixtures


def test_the_service_starts_answers_and_ends_on_sigterm_with_what_is_under_way_finished(
    version: object,  # noqa: F811
    fleet: Path,  # noqa: F811
    home: Home,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipeline.registry.store import connect

    version(1)  # type: ignore[operator]
    connect().set_registered_model_alias("prefixfleet.bolt", "champion", "1")
    assert main(["keys", "create", "--customer", "bolt", "--json"]) == 0
    key = json.loads(capsys.readouterr().out)["key"]
    command = [sys.executable, "-m", "flows.cli", "serve", "--port", "0", "--json"]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None and service.stderr is not None
        said = service.stdout.readline()
        assert said, service.stderr.read()
        told = json.loads(said)
        assert told["base"] == "examples/base" and told["keys"] == 1 and told["precision"] in ("float32", "bfloat16")
        body = {"model": "bolt:1", "prompt": "name : bolt 3", "max_tokens": 300, "temperature": 1, "stream": True}
        with (
            httpx.Client(base_url=told["url"], headers={"Authorization": f"Bearer {key}"}, timeout=120) as client,
            client.stream("POST", "/v1/completions", json=body) as events,
        ):
            lines = events.iter_lines()
            next(lines)
            service.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        assert service.wait(60) == 0
        log = service.stderr.read()
        assert "POST /v1/completions 200" in log and "bolt 3" not in log and "Traceback" not in log
    finally:
        service.kill()


def test_a_service_for_other_machines_wants_a_key_first(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "prefixfleet keys create" in capsys.readouterr().err
    assert time.monotonic() - started < 20  # before anything is loaded
    (home.root / "keys.json").write_text('{"format": 1, "keys": [{"id": "a", "sha256": "secret", "customers": ["acme"]}]}')
    assert main(["serve"]) == 2
    assert "64 hex digits" in capsys.readouterr().err


def test_keys_are_made_without_torch_or_mlflow(home: Home) -> None:
    code = "import sys; from flows.cli import main; main(['keys', 'create', '--customer', 'acme']); heavy = {'torch', 'transformers', 'mlflow'}"
    said = subprocess.run(
        [sys.executable, "-c", f"{code}; print(heavy & set(sys.modules))"], capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[-1] == "set()"
    import pipeline.inference as room

    assert all(hasattr(room, name) for name in room.__all__) and not hasattr(room, "nothing")


def test_keys_are_made_listed_and_revoked_and_only_their_digests_are_kept(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "--customer", "acme", "--customer", "bolt", "--note", "till"]) == 0
    secret = capsys.readouterr().out.strip()
    file = home.root / "keys.json"
    assert len(secret) > 40 and secret not in file.read_text() and file.stat().st_mode & 0o077 == 0
    assert main(["keys", "create", "--all-customers"]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["keys"]
    assert [key["customers"] for key in listed] == [["acme", "bolt"], ["*"]] and listed[0]["note"] == "till"
    assert main(["keys", "revoke", listed[0]["id"]]) == 0
    assert main(["keys", "list"]) == 0
    assert listed[0]["id"] not in capsys.readouterr().out
    for wrong in (["revoke", "key-none"], ["revoke"], ["create"], ["create", "--customer", "../acme"]):
        assert main(["keys", *wrong]) == 2
