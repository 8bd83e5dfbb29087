"""`prefixfleet compare` as a person types it: methods in processes of their own, one table, and nothing done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.files import read_json

from ..conftest import rows


def command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "compare", *arguments],
        env={**os.environ, "PREFIXFLEET_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_methods_are_trained_once_and_a_method_that_cannot_be_had_is_told(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "acme.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(0)), encoding="utf-8")
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        f"base_model: {{path: {tiny_base}}}\n"
        "defaults: {prefix: {length: 3}, training: {max_steps: 4, batch_size: 4, lr: 0.02}, "
        "prompt: {max_input_tokens: 40, max_target_tokens: 16}}\n"
        "customers: [{id: acme, data: acme.jsonl}]\n",
        encoding="utf-8",
    )
    home = tmp_path / "home"
    asked = (str(fleet), "--customer", "acme", "--method", "top2", "--tries", "1", "--json")
    first = command(home, *asked)
    assert first.returncode == 0, first.stderr
    content = json.loads(first.stdout)
    assert [row["method"] for row in content["methods"]] == ["base", "top2"]
    assert content["methods"][1]["steps"] == 4
    folder = Path(content["folder"])
    assert {"compare.html", "compare.md", "compare.json"} <= {path.name for path in folder.iterdir()}

    before = read_json(folder / "top2.json", 1)
    again = command(home, *asked)
    assert again.returncode == 0 and "top2: training" not in again.stderr
    assert read_json(folder / "top2.json", 1) == before

    wrong = command(home, str(fleet), "--customer", "nobody")
    assert wrong.returncode == 2 and "nobody" in wrong.stderr and "Traceback" not in wrong.stderr
