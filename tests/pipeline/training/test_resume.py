"""A job that is killed, stopped or out of disk goes on where it was, and ends with the prefixes that it would have had undisturbed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipeline.training.run as training_run
from pipeline.errors import StorageError
from pipeline.files import file_digest
from pipeline.process import RESUME, paused_note
from pipeline.training.checkpoint import read_checkpoint
from pipeline.training.job import Job, JobCustomer, write_job
from pipeline.training.results import read_result
from pipeline.training.run import Paused, run_job

from ..conftest import job_maker
from .warm import Trainer

MakeJob = Callable[..., tuple[Job, Path]]

# Five customers through two slots: whoever is late gets a slot only when another is through.
MIXING = {"slots": 2, "max_tokens_per_micro_batch": 64, "checkpoint_every_seconds": 0.0}


def digests(job: Job) -> list[str]:
    """Of the weights of all prefixes."""
    return [file_digest(Path(c.prefix_dir) / "prefix.safetensors") for c in job.customers]


def varied(job: Job, path: Path) -> Job:
    """Customers of a job made different in length, parameterisation and steps."""
    changes: list[dict[str, Any]] = [
        {"training": {"max_steps": 9, "eval_every": 3}},
        {"prefix": {"reparam": "mlp", "mid_dim": 16}, "training": {"lr": 0.005}},
        {"training": {"batch_size": 4, "gradient_accumulation_steps": 2, "seed": 5}},
        {"prefix": {"reparam": "embedding"}, "training": {"max_steps": 8, "eval_every": 4}},
        {"training": {"max_steps": 17, "early_stopping": 2, "eval_every": 2, "lr": 1.0}},
    ]
    customers = [
        replace(
            c, prefix=replace(c.prefix, **change.get("prefix", {})), training=replace(c.training, **change.get("training", {}))
        )
        for c, change in zip(job.customers, changes, strict=True)
    ]
    job = replace(job, customers=customers)
    write_job(path, job)
    return job


def tick_of(job: Job) -> int:
    """How far a job has come, by its own metrics."""
    try:
        lines = (Path(job.folder) / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[str]]:
    make_job = job_maker(tiny_base, tmp_path_factory.mktemp("undisturbed"))
    job = varied(*make_job(customers=5, name="undisturbed", mixing=MIXING))
    assert run_job(job) == 0
    return job, digests(job)


def test_killed_at_random_moments_it_ends_with_the_same_prefixes_bit_for_bit(
    make_job: MakeJob, undisturbed: tuple[Job, list[str]], root: Path
) -> None:
    job, path = make_job(customers=5, name="killed", mixing=MIXING)
    job = varied(job, path)
    seed = random.randrange(10_000)
    moments = random.Random(seed)
    kills = 0
    for _ in range(4):
        from_tick = tick_of(job)
        until = from_tick + moments.randint(1, 12)
        child = Trainer(path, root)
        while child.poll() is None and tick_of(job) < until:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        child.kill()
        child.wait()
        kills += child.returncode == -signal.SIGKILL
        left = [f for c in job.customers for f in c.key.below(Path(job.folder)).glob("checkpoint-*")]
        # Bounded: of each customer the files that count, and at most those that were being written.
        assert len(left) <= 2 * 2 * 5, left
    assert kills >= 2, f"seed {seed}: the job was over too soon"
    assert run_job(job) == 0
    assert digests(job) == undisturbed[1], f"seed {seed}"
    histories = [
        [(c.key.below(Path(j.folder)) / "metrics.jsonl").read_text() for c in j.customers] for j in (job, undisturbed[0])
    ]
    assert histories[0] == histories[1], "the metrics of a job that went on are those of one that never stopped"
    assert not (Path(job.folder) / "checkpoint.json").exists()
    assert not list(Path(job.folder).rglob("checkpoint-*")) and not list(Path(job.folder).rglob(".checkpoint-*"))


def test_stopped_before_every_tick_it_ends_with_the_same_prefixes(make_job: MakeJob, undisturbed: tuple[Job, list[str]]) -> None:
    """Also when the flow lists only those who are still due, as it does when it starts a job again."""
    job, path = make_job(customers=5, name="stopped", mixing=MIXING)
    job = varied(job, path)
    everybody, stops = job.customers, 0
    for patience in range(1000):
        looks = iter(range(10_000))

        def asked(looks: Any = looks, patience: int = patience) -> bool:
            return next(looks) >= 3 + patience % 4

        due = [c for c in everybody if not (Path(c.prefix_dir) / "prefix.json").exists()]
        try:
            assert run_job(replace(job, customers=due), asked) == 0
            break
        except Paused as paused:
            assert "same command again" in str(paused)
            stops += 1
    assert stops > 10
    assert digests(replace(job, customers=everybody)) == undisturbed[1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "parent"])
def test_asked_to_stop_it_leaves_a_checkpoint_and_says_resume_me(make_job: MakeJob, root: Path, how: Any) -> None:
    job, path = make_job(customers=2, max_steps=100_000, eval_every=50_000)
    environment = {"PREFIXFLEET_EXIT_WITH_PARENT": "1"} if how == "parent" else {}
    child = Trainer(path, root, **environment)
    deadline = time.monotonic() + 120
    while tick_of(job) < 5:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if how == "parent":
        assert child.stdin is not None
        child.stdin.close()  # what the kernel does when the flow is killed
        child.stdin = None
    else:
        child.send_signal(how)
    output, _ = child.communicate(timeout=30)
    assert child.returncode == RESUME, output.decode()
    assert paused_note(path).exists()
    assert b"Run the same command again to go on" in output
    checkpoint = read_checkpoint(Path(job.folder))
    assert checkpoint is not None and checkpoint.tick >= 5
    assert {plain["step"] for _, plain in checkpoint.states.values()} == {checkpoint.tick}


_FLOW = """
import logging, pathlib, signal, sys
from flows import launch
from pipeline.config import LaunchSettings
signal.signal(signal.SIGINT, signal.default_int_handler)
launch.run_module("pipeline.training", pathlib.Path(sys.argv[1]), LaunchSettings(), lambda event: None, logging.getLogger())
"""


@pytest.mark.parametrize("how", ["cancelled", "group", "killed"])
def test_whatever_ends_the_flow_the_job_has_a_checkpoint(make_job: MakeJob, root: Path, how: str) -> None:
    """A flow that is cancelled closes the pipe and sends SIGTERM; a worker signals the whole group; a flow that is killed only closes the pipe."""
    job, path = make_job(customers=2, max_steps=100_000, eval_every=50_000)
    flow = subprocess.Popen(
        [sys.executable, "-c", _FLOW, str(path)], cwd=root, start_new_session=True, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while tick_of(job) < 5:
        assert flow.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if how == "cancelled":
        flow.send_signal(signal.SIGINT)
    elif how == "group":
        os.killpg(flow.pid, signal.SIGTERM)
    else:
        flow.kill()
    flow.wait(timeout=30)
    while (checkpoint := read_checkpoint(Path(job.folder))) is None:
        assert time.monotonic() < deadline + 60
        time.sleep(0.1)
    assert checkpoint.tick >= 5
    assert {plain["step"] for _, plain in checkpoint.states.values()} == {checkpoint.tick}


def stop_after(looks: int) -> Callable[[], bool]:
    counted = iter(range(1_000_000))
    return lambda: next(counted) >= looks


def test_a_full_disk_is_an_error_that_keeps_the_last_good_checkpoint(
    make_job: MakeJob, undisturbed: tuple[Job, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, path = make_job(customers=5, name="full", mixing=MIXING)
    job = varied(job, path)
    with pytest.raises(Paused):
        run_job(job, stop_after(30))
    before = read_checkpoint(Path(job.folder))
    assert before is not None and before.tick > 0
    real, writes = os.fsync, iter(range(1_000_000))

    def full(handle: int) -> None:
        if next(writes) >= 7:  # in the midst of the second customer's files
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        run_job(job)
    monkeypatch.setattr(os, "fsync", real)
    kept = read_checkpoint(Path(job.folder))
    assert kept is not None and kept.tick == before.tick
    assert run_job(job) == 0
    assert digests(job) == undisturbed[1]


def test_an_unwritable_folder_is_an_error_that_names_it(make_job: MakeJob) -> None:
    job, _ = make_job(mixing=MIXING)
    (Path(job.folder) / "checkpoint.json").mkdir(parents=True)  # root may write anywhere, but not over a folder
    with pytest.raises(StorageError, match=r"checkpoint\.json"):
        run_job(job)


def test_a_failure_that_cannot_even_be_noted_is_raised_once_the_others_are_through(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = make_job(customers=2, mixing=MIXING)
    lost, other = job.customers
    (Path(lost.prepared) / "train.parquet").unlink()
    real = training_run.write_result

    def full(job: Job, customer: JobCustomer, stage: str, started: float, reason: str | None = None) -> None:
        if reason is not None:
            raise StorageError("the disk is full")
        real(job, customer, stage, started)

    monkeypatch.setattr(training_run, "write_result", full)
    with pytest.raises(StorageError, match="disk is full"):
        run_job(job)
    assert (Path(other.prefix_dir) / "prefix.json").is_file()


def test_a_prefix_that_cannot_be_written_is_not_lost(make_job: MakeJob) -> None:
    job, _ = make_job(customers=2, mixing=MIXING)
    # The first is through long before the others: it is kept over many checkpoints.
    first = replace(job.customers[0], training=replace(job.customers[0].training, max_steps=2))
    job = replace(job, customers=[first, job.customers[1]])
    blocked = Path(job.customers[0].prefix_dir)
    blocked.parent.parent.mkdir(parents=True)
    blocked.parent.write_text("a file where a folder should be")
    assert run_job(job) == 1
    result = read_result(job, job.customers[0].key, "train")
    assert result is not None and result["status"] == "failed" and str(blocked.parent) in str(result["reason"])
    blocked.parent.unlink()
    lines = (Path(job.folder) / "metrics.jsonl").read_text()
    assert run_job(job) == 0
    assert (blocked / "prefix.safetensors").exists()
    assert (Path(job.folder) / "metrics.jsonl").read_text() == lines, "it was trained again"


def test_a_damaged_checkpoint_is_named_with_the_remedy(make_job: MakeJob) -> None:
    job, _ = make_job(customers=2, mixing=MIXING)
    with pytest.raises(Paused):
        run_job(job, stop_after(20))
    file = next(Path(job.folder).rglob("checkpoint-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"Delete .*checkpoint\.json"):
        run_job(job)
    (Path(job.folder) / "checkpoint.json").unlink()
    assert run_job(job) == 0


def test_a_customer_whose_settings_were_changed_begins_anew_and_the_others_go_on(
    make_job: MakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _ = make_job(customers=2, mixing=MIXING)
    with pytest.raises(Paused):
        run_job(job, stop_after(20))
    reached = read_checkpoint(Path(job.folder))
    assert reached is not None and reached.tick > 2
    other = replace(job.customers[0], train_digest="0" * 64)
    assert run_job(replace(job, customers=[other, job.customers[1]])) == 0
    assert "c0: warning: its settings or data were changed" in capsys.readouterr().out
    steps = [[json.loads(line) for line in (c.key.below(Path(job.folder)) / "metrics.jsonl").open()] for c in job.customers]
    assert [entry["step"] for entry in steps[1] if "loss" in entry] == list(range(1, 13))
    ticks = [json.loads(line) for line in (Path(job.folder) / "metrics.jsonl").open()]
    assert len(ticks) == reached.tick + 12, "one went on, the other took all its steps again"


def test_whoever_is_not_asked_for_keeps_what_was_reached(make_job: MakeJob, undisturbed: tuple[Job, list[str]]) -> None:
    job, path = make_job(customers=5, name="parked", mixing=MIXING)
    job = varied(job, path)
    with pytest.raises(Paused):
        run_job(job, stop_after(20))
    at = read_checkpoint(Path(job.folder))
    assert at is not None
    away, others = job.customers[0], job.customers[1:]
    before = at.states[away.key][1]["step"]
    assert before > 0
    assert run_job(replace(job, customers=others)) == 0
    parked = read_checkpoint(Path(job.folder))
    assert parked is not None and parked.parked == [away.key] and parked.states[away.key][1]["step"] == before
    assert run_job(replace(job, customers=[away])) == 0
    lines = [json.loads(line) for line in (away.key.below(Path(job.folder)) / "metrics.jsonl").open()]
    assert [entry["step"] for entry in lines if "loss" in entry] == list(range(1, 10))
    assert not list(Path(job.folder).rglob("*checkpoint*"))


def test_prepared_data_that_is_gone_fails_its_customer_alone_on_resume_too(make_job: MakeJob) -> None:
    import shutil

    job, _ = make_job(customers=2, mixing=MIXING)
    with pytest.raises(Paused):
        run_job(job, stop_after(20))
    shutil.rmtree(job.customers[0].prepared)
    assert run_job(job) == 1
    assert [r and r["status"] for r in (read_result(job, c.key, "train") for c in job.customers)] == ["failed", "done"]


class Killed(BaseException):
    """Nothing but the test catches this."""


@pytest.mark.parametrize("what", ["replace", "unlink"])
def test_ended_before_any_change_of_the_folder_it_ends_with_the_same_prefixes(
    make_job: MakeJob, undisturbed: tuple[Job, list[str]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Every step at which files come or go: between a customer's two files, before the manifest, behind it, before the prefix, in the sweep."""
    job, path = make_job(customers=5, name=what, mixing=MIXING)
    job = varied(job, path)
    real = getattr(os, what)
    ended = 0
    for moment in range(1000):
        changes = iter(range(10_000))

        def change(*arguments: Any, changes: Any = changes, moment: int = moment, **named: Any) -> Any:
            # Once it is killed nothing changes any more.
            if next(changes) >= 9 + 7 * (moment % 5) + 5 * (moment // 5):
                raise Killed
            return real(*arguments, **named)

        monkeypatch.setattr(os, what, change)
        try:
            assert run_job(job) == 0
            break
        except Killed:
            ended += 1
        finally:
            monkeypatch.setattr(os, what, real)
    assert ended > 8
    assert digests(job) == undisturbed[1]
    assert not list(Path(job.folder).rglob("*checkpoint*"))


def test_two_processes_on_one_job_do_not_write_over_one_another(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    from pipeline.training import run

    job, _ = make_job()
    monkeypatch.setattr(run, "_WAIT_SECONDS", 0.2)
    Path(job.folder).mkdir(exist_ok=True)
    with FileLock(Path(job.folder) / "lock"), pytest.raises(StorageError, match="another process"):
        run_job(job)
    assert run_job(job) == 0


def test_more_slots_or_another_budget_go_on_from_the_checkpoint_too(make_job: MakeJob) -> None:
    job, _ = make_job(customers=3, mixing=MIXING)
    with pytest.raises(Paused):
        run_job(job, stop_after(20))
    at = read_checkpoint(Path(job.folder))
    assert at is not None
    wider = replace(job, mixing=replace(job.mixing, slots=3, max_tokens_per_micro_batch=500))
    assert run_job(wider) == 0
    first = json.loads((Path(job.folder) / "metrics.jsonl").read_text().splitlines()[at.tick])
    assert first["step"] == at.tick + 1 and first["resident"] == 3 and first["micro_batch_tokens"] == 500


def test_a_customer_that_failed_before_the_kill_is_not_tried_again_beside_the_others(
    make_job: MakeJob, undisturbed: tuple[Job, list[str]]
) -> None:
    job, path = make_job(customers=5, name="failing", mixing=MIXING)
    job = varied(job, path)
    broken = replace(job.customers[0], data_fingerprint="another")
    job = replace(job, customers=[broken, *job.customers[1:]])
    with pytest.raises(Paused):
        run_job(job, stop_after(40))
    assert run_job(job) == 1
    result = read_result(job, broken.key, "train")
    assert result is not None and result["status"] == "failed" and "prepared anew" in str(result["reason"])
    # The job is over: the next one tries it anew.
    assert run_job(replace(job, customers=[replace(broken, data_fingerprint=undisturbed[0].customers[0].data_fingerprint)])) == 0
