"""Jobs in processes of their own: start them, watch them, read what they left."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from pipeline.prefix import load_prefix
from pipeline.training.job import Job

Launch = Callable[..., subprocess.Popen[str]]


def weights(job: Job, i: int) -> dict[str, torch.Tensor]:
    prefix, _ = load_prefix(Path(job.customers[i].prefix_dir))
    return {f"{site}.{kind}": pair[k] for site, pair in prefix.items() for k, kind in enumerate(("key", "value"))}


def wait_for_steps(child: subprocess.Popen[str], job: Job, steps: int) -> None:
    log, deadline = Path(job.folder) / "metrics.jsonl", time.monotonic() + 150
    while not log.exists() or log.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "no steps"
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.1)


def ranks(child: subprocess.Popen[str]) -> list[psutil.Process]:
    family = psutil.Process(child.pid).children(recursive=True)
    return sorted((p for p in family if "pipeline.training" in " ".join(p.cmdline())), key=lambda p: int(p.environ()["RANK"]))
