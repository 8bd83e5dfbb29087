"""`prefixfleet sweep` as a person types it, with real training and a real model: killed in the middle, it goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import rows


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_best_setting(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "acme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(0, 200)), encoding="utf-8")
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        f"base_model: {{path: {tiny_base}}}\n"
        "launch: {checkpoint_every_seconds: 0}\n"
        "defaults: {prefix: {length: 3}, training: {max_steps: 40, batch_size: 6, lr: 0.02}, "
        "prompt: {max_input_tokens: 40, max_target_tokens: 12}}\n"
        "customers: [{id: acme, data: acme.jsonl}]\n",
        encoding="utf-8",
    )
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "sweep",
        str(fleet),
        "--customer",
        "acme",
        "--lengths",
        "1,3,60",
        "--lrs",
        "0.1",
    ]
    environment = {**os.environ, "PREFIXFLEET_HOME": str(tmp_path / "home")}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("train: ") and not line.startswith(("train: 0/", "train: 120/")):
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    swept = tmp_path / "home" / "sweeps" / "acme" / "default"
    assert list(swept.glob("jobs/*/acme/*/checkpoint-*.safetensors"))
    assert not list(swept.glob("reports/*/sweep.json"))

    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr  # 60 does not fit the tiny base's 64 positions
    content = json.loads(done.stdout)
    errors = {row["settings"]["length"]: row.get("error") for row in content["variants"]}
    assert errors[1] is None and errors[3] is None and "pass the 64 positions" in str(errors[60])
    assert {row["settings"]["length"]: row.get("steps") for row in content["variants"]} == {1: 40, 3: 40, 60: None}
    scores = {group["settings"]["length"]: group["score"] for group in content["settings"]}
    assert scores[content["best"]["settings"]["length"]] == max(scores.values())
    assert (Path(content["folder"]) / "sweep.html").is_file()
