"""Several processes: what one of them is told or runs out of concerns them all, and the job goes on from its checkpoint."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.prefix import load_prefix
from pipeline.training.checkpoint import read_checkpoint
from pipeline.training.job import Job, write_job
from pipeline.training.results import read_result
from pipeline.training.run import run_job

MakeJob = Callable[..., tuple[Job, Path]]

# Rank 1 has little memory: a micro-batch of more than 60 tokens does not fit.
SMALL_RANK = """
import os, sys, torch
sys.path.insert(0, os.getcwd())
from pipeline.training import mixed
from pipeline.training.batches import padded_tokens
real = mixed.row_losses
def small(base, rows, pad):
    if os.environ.get("RANK") == "1" and padded_tokens(rows) > 60:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real(base, rows, pad)
mixed.row_losses = small
from pipeline.training.__main__ import main
sys.exit(main())
"""


def weights(job: Job, i: int) -> dict[str, torch.Tensor]:
    prefix, _ = load_prefix(Path(job.customers[i].prefix_dir))
    return {f"{site}.{kind}": pair[k] for site, pair in prefix.items() for k, kind in enumerate(("key", "value"))}


def launch(root: Path, *arguments: str) -> subprocess.Popen[bytes]:
    config = root / "accelerate_configs" / "cpu_2proc.yaml"
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_one_process_out_of_memory_stops_all_at_a_checkpoint_to_go_on_with_half_the_budget(
    make_job: MakeJob, tmp_path: Path, root: Path
) -> None:
    job, path = make_job(customers=2, mixing={"max_tokens_per_micro_batch": 150})
    alone, _ = make_job(customers=2, name="alone")
    assert run_job(alone) == 0
    script = tmp_path / "small_rank.py"
    script.write_text(SMALL_RANK)
    budgets = []
    for _ in range(6):
        child = launch(root, str(script), str(path))
        output, _ = child.communicate(timeout=180)
        if child.returncode == 0:
            break
        assert re.search(rb"exitcode\s*:\s*75", output), output.decode()
        checkpoint = read_checkpoint(Path(job.folder))
        assert checkpoint is not None
        budgets.append(checkpoint.budget)
    assert child.returncode == 0, output.decode()
    assert budgets and all(b < a for a, b in zip([150, *budgets], budgets, strict=False)), budgets
    for i in range(2):
        a, b = weights(job, i), weights(alone, i)
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_a_row_too_long_for_one_process_fails_its_customer_on_all_and_the_others_finish(
    make_job: MakeJob, tmp_path: Path, root: Path
) -> None:
    job, path = make_job(customers=2)
    alone, _ = make_job(customers=2, name="alone")
    assert run_job(alone) == 0
    script = tmp_path / "small_rank.py"
    # Rank 1 has no room for any row of the first customer, whose prefix is the only one of five columns.
    job = replace(job, customers=[replace(job.customers[0], prefix=replace(job.customers[0].prefix, length=5)), job.customers[1]])
    write_job(path, job)
    script.write_text(
        SMALL_RANK.replace(
            "padded_tokens(rows) > 60", "any(base.active.bank.columns['decoder.self.0'][i.slot] == 5 for i in rows)"
        )
    )
    child = launch(root, str(script), str(path))
    output, _ = child.communicate(timeout=180)
    while re.search(rb"exitcode\s*:\s*75", output):  # first the budget is halved, for mixed micro-batches do not fit either
        child = launch(root, str(script), str(path))
        output, _ = child.communicate(timeout=180)
    assert child.returncode == 0, output.decode()
    results = [read_result(job, c.key, "train") for c in job.customers]
    assert [r and r["status"] for r in results] == ["failed", "done"]
    assert "does not fit" in str(results[0] and results[0]["reason"])
    a, b = weights(job, 1), weights(alone, 1)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_sigterm_to_one_process_stops_all_at_a_checkpoint(make_job: MakeJob, root: Path) -> None:
    job, path = make_job(customers=2, max_steps=100_000, eval_every=50_000)
    child = launch(root, "-m", "pipeline.training", str(path))
    log = Path(job.folder) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 3:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    ranks = [p for p in psutil.Process(child.pid).children(recursive=True) if "pipeline.training" in " ".join(p.cmdline())]
    ranks[-1].send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=60)
    assert re.search(rb"exitcode\s*:\s*75", output), output.decode()
    checkpoint = read_checkpoint(Path(job.folder))
    assert checkpoint is not None and checkpoint.tick >= 2
    assert {plain["step"] for _, plain in checkpoint.states.values()} == {checkpoint.tick}


def test_int8_and_more_than_one_slot_do_not_go_together(make_job: MakeJob) -> None:
    job, _ = make_job()
    with pytest.raises(ConfigError, match=r"launch\.slots"):
        run_job(replace(job, base=replace(job.base, quantization="int8")))


def test_rows_beyond_the_length_from_which_positions_depend_on_neighbours_fail_their_customer(
    make_job: MakeJob, tiny_base: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "longrope"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 12,  # rows have up to 10 tokens
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    job, _ = make_job(base=folder, length=1)
    assert run_job(job) == 0, "within the limit nothing is refused"
    job, _ = make_job(base=folder, name="long", length=3)
    assert run_job(job) == 1
    result: Any = read_result(job, job.customers[0].key, "train")
    assert "pass 12 positions" in result["reason"] and "Shorten" in result["reason"]
