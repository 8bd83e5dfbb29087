"""What a stage's process tells the flow about each customer: one small file, so that nothing rests on its output or exit status."""

import time
from pathlib import Path

from pipeline.files import read_json, write_json
from pipeline.keys import CustomerKey
from pipeline.training.job import Job, JobCustomer

FORMAT = 1
PREFIX_FILES = ("prefix.json", "prefix.safetensors")
EVALUATION_FILES = ("generations.jsonl", "metrics.json", "decision.json", "report.html", "report.md")


def result_path(job: Job, key: CustomerKey, stage: str) -> Path:
    """`<job folder>/<customer>/<task>/train_result.json` or `eval_result.json`; `stage` is `train` or `eval`."""
    return key.below(Path(job.folder)) / f"{stage}_result.json"


def write_result(job: Job, customer: JobCustomer, stage: str, started: float, reason: str | None = None) -> None:
    """Say that a stage is done with a customer, or (with a `reason`) that it failed. `started` is `time.monotonic()` of its start."""
    write_json(
        result_path(job, customer.key, stage),
        {
            "format": FORMAT,
            "customer": customer.customer,
            "task": customer.task,
            "digest": customer.train_digest if stage == "train" else customer.evaluate_digest,
            "status": "done" if reason is None else "failed",
            "reason": reason,
            "seconds": round(time.monotonic() - started, 3),
        },
    )


def read_result(job: Job, key: CustomerKey, stage: str) -> dict[str, object] | None:
    """The result of a customer, or None if the process ended before it came to it."""
    path = result_path(job, key, stage)
    return read_json(path, FORMAT) if path.exists() else None
