"""The GPU benchmark on tiny shapes, where nothing is installed but what it says that it needs."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

from benchmarks import gpu

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


def test_what_peft_cannot_do_is_a_row_and_ours_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[str] = []

    class Step:
        def __init__(self, kind: str) -> None:
            self.kind = kind
            alive.append(kind)
            assert alive == [kind], "only one side has something beside the base"

        def __call__(self) -> float:
            if self.kind == "peft flash":
                raise ValueError("no such kernel")
            return 0.0

        def __del__(self) -> None:
            alive.remove(self.kind)

    monkeypatch.setattr(gpu.roofline, "matmul_peak", lambda *_: 1e12)
    bench = gpu.Bench(Namespace(smoke=True, minutes=1.0, rounds=2, json=None))
    kinds = {kind: partial(Step, kind) for kind in ("ours", "peft flash", "peft")}
    found = bench.in_turn("train", kinds, 0.0)
    assert set(found) == {"ours", "peft"}
    assert bench.rows == [{"what": "train peft flash", "left_out": "ValueError: no such kernel"}] and not bench.failed
    with pytest.raises(ValueError, match="no such kernel"):
        bench.in_turn("train", {"ours": partial(Step, "peft flash")}, 0.0)
