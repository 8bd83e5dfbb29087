"""Seconds of each metric for 1,000 outputs of two systems, intervals and comparison included: the table in docs/evaluation.md.

Needs ../shared (E2E's test set and two systems' outputs for it): its 630 records, and the first 370 of them again, with 7.4 references each.
Run `python benchmarks/metric_seconds.py`; METEOR is left out where its program is missing.
"""

import json
import time
from pathlib import Path

import numpy as np

from pipeline.errors import EvaluationError
from pipeline.evaluation.metrics import METRICS, check_metrics
from pipeline.evaluation.scores import score_systems

SHARED = Path(__file__).resolve().parents[2] / "shared"
RECORDS = 1000


def read(path: Path, field: str) -> list:
    """One field of every line of a JSONL file, 1,000 of them."""
    rows = [json.loads(line)[field] for line in path.read_text(encoding="utf-8").splitlines()]
    return (rows * 2)[:RECORDS]


def main() -> None:
    """Print one line for each metric."""
    test = SHARED / "data" / "e2e" / "test.jsonl"
    references, inputs = read(test, "references"), read(test, "input")
    systems = {name: read(SHARED / "metrics_reference" / f"e2e_test_{name}.jsonl", "prediction") for name in ("tgen", "slug")}
    losses = {name: np.random.default_rng(0).uniform(1, 2, (RECORDS, 2)) for name in systems}
    print("| metric | seconds |\n|---|---:|")
    for name in METRICS:
        try:
            check_metrics([name], inputs)
        except EvaluationError as error:
            print(f"| {name} | left out: {error} |")
            continue
        started = time.process_time() if name != "meteor" else time.monotonic()
        score_systems(systems, references, [name], ours="slug", inputs=inputs, losses=losses, resamples=1000)
        passed = (time.process_time() if name != "meteor" else time.monotonic()) - started
        print(f"| {name} | {passed:.1f} |", flush=True)


if __name__ == "__main__":
    main()
