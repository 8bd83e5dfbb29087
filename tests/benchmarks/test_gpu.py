"""The GPU benchmark on tiny shapes, where nothing is installed but what it says that it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Of the packages here, hides what a bare GPU node does not have.
BARE = """
import runpy, sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    hidden = {"pydantic", "pyarrow", "datasets", "mlflow", "prefect", "matplotlib", "sacrebleu", "fastapi", "deepspeed", "pandas", "rich"}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_measures_both_sides_with_the_packages_of_a_bare_gpu_node(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", BARE, "benchmarks/gpu.py", "--smoke", "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    measured = {(row["what"], row["kind"]) for row in rows if "kind" in row}
    for what in ("train llama-tiny sdpa 4x2", "train qwen-tiny sdpa 8x1", "decode llama-tiny 4 customers"):
        assert {(what, "ours"), (what, "peft")} <= measured
    ours = next(row for row in rows if row["what"] == "train llama-tiny sdpa 8x1" and row["kind"] == "ours")
    peft = next(row for row in rows if row["what"] == "train llama-tiny sdpa 8x1" and row["kind"] == "peft")
    assert ours["tokens_per_second"] * ours["seconds"] == pytest.approx(8 * 32)
    assert ours["against_peft"] == pytest.approx(ours["tokens_per_second"] / peft["tokens_per_second"])
    assert {"torch", "transformers", "peft"} <= set(ours["versions"])
    # What cannot run here is named, not missing.
    assert any(row["what"].startswith("train llama-tiny flash") and row["left_out"] == "needs a GPU" for row in rows)
