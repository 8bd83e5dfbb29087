"""Training a prefix: what it learns, what it leaves alone, and what it says when it cannot."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from pipeline.data import Record, read_split
from pipeline.errors import BaseModelError, ConfigError
from pipeline.inference import load_engine
from pipeline.prefix import PrefixBank, load_base, load_prefix
from pipeline.prefix.direct import Direct
from pipeline.prefix.initialise import from_text
from pipeline.training.batches import row_losses
from pipeline.training.job import Job, read_job
from pipeline.training.resident import Resident
from pipeline.training.results import read_result
from pipeline.training.run import run_job

from .crowd import SETTINGS
from .warm import Trainer

MakeJob = Callable[..., tuple[Job, Path]]


def weights(job: Job, i: int = 0) -> dict[str, torch.Tensor]:
    prefix, _ = load_prefix(Path(job.customers[i].prefix_dir))
    return {f"{site}.{kind}": pair[k] for site, pair in prefix.items() for k, kind in enumerate(("key", "value"))}


def test_training_lowers_the_dev_loss_and_writes_the_best_prefix(make_job: MakeJob) -> None:
    job, _ = make_job(max_steps=40, eval_every=10)
    assert run_job(job) == 0
    _, config = load_prefix(Path(job.customers[0].prefix_dir))
    training = config["training"]
    dev = {entry["step"]: entry["dev_loss"] for entry in training["history"] if "dev_loss" in entry}
    assert training["best_dev_loss"] == min(dev.values()) < dev[0] - 0.1
    assert dev[training["best_step"]] == training["best_dev_loss"]
    # The prefix on disk is the one that had that loss, not the last one.
    base = load_base(job.base, torch.device("cpu"))
    bank = PrefixBank(base.sites, slots=1, length=3)
    bank.put(0, load_prefix(Path(job.customers[0].prefix_dir))[0])
    rows = read_split(Path(job.customers[0].prepared), "dev")
    with torch.no_grad(), base.prefixes(bank, torch.zeros(len(rows), dtype=torch.int64)):
        measured = float(row_losses(base, rows, pad=1).sum()) / sum(len(row.target_ids) for row in rows)
    assert measured == pytest.approx(training["best_dev_loss"], abs=1e-6)


def test_loss_is_the_mean_cross_entropy_of_the_target_tokens_alone(make_job: MakeJob) -> None:
    job, _ = make_job()
    base = load_base(job.base, torch.device("cpu"))
    rows = [Record([3, 4, 5], [6, 7, 0], "", [""]), Record([8], [9, 0], "", [""]), Record([3, 4], [5, 6, 7, 8, 0], "", [""])]
    bank = PrefixBank(base.sites, slots=1, length=3)
    bank.put(0, from_text(base, [10, 11, 12], 3))
    with torch.no_grad():
        with base.prefixes(bank, torch.zeros(3, dtype=torch.int64)):
            total = row_losses(base, rows, pad=1)
        expected = 0.0
        for row in rows:  # one at a time, with the prefix's text as a plain prompt
            ids = torch.tensor([[10, 11, 12, *row.prompt_ids, *row.target_ids]])
            log_probabilities = base.model(input_ids=ids).logits[0].log_softmax(-1)
            start = 3 + len(row.prompt_ids)
            expected -= sum(float(log_probabilities[start + i - 1, token]) for i, token in enumerate(row.target_ids))
    assert total.shape == (3,)
    assert float(total.sum()) == pytest.approx(expected, rel=1e-5)


def test_same_seed_gives_the_same_prefix_and_another_seed_another(make_job: MakeJob) -> None:
    jobs = [make_job(name=name, seed=seed)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for job in jobs:
        run_job(job)
    a, b, c = (weights(job) for job in jobs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_a_customer_gets_the_same_prefix_alone_and_after_others(make_job: MakeJob) -> None:
    together, _ = make_job(customers=3, name="together")
    run_job(together)
    alone, _ = make_job(customers=3, name="alone")
    alone = Job(**{**vars(alone), "customers": alone.customers[2:]})
    run_job(alone)
    a, b = weights(together, 2), weights(alone)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")])
@pytest.mark.parametrize(("warmup", "last"), [(0, 12), (5, 12), (12, 12), (20, 12)])
def test_schedules_are_those_of_transformers(name: str, theirs: str, warmup: int, last: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=last)
    settings = replace(SETTINGS, schedule=name, warmup_steps=warmup, max_steps=last, lr=1.0)
    resident = Resident(
        Direct({"decoder.self.0": (torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))}, torch.device("cpu")), False, [], [], settings
    )
    for step in range(last + 2):
        resident.step = step
        assert resident.lr == pytest.approx(expected.get_last_lr()[0], abs=1e-15), step
        optimizer.step()
        expected.step()


def test_early_stopping_ends_before_max_steps(make_job: MakeJob) -> None:
    job, _ = make_job(lr=1e-9, max_steps=200, eval_every=1, early_stopping=3)
    run_job(job)
    _, config = load_prefix(Path(job.customers[0].prefix_dir))
    assert config["training"]["steps"] < 200


def test_a_diverging_customer_fails_with_a_reason_and_the_others_finish(make_job: MakeJob) -> None:
    job, _ = make_job(customers=3)
    bad = job.customers[1]
    diverging = type(bad)(**{**vars(bad), "training": type(bad.training)(**{**vars(bad.training), "lr": 1e30, "max_steps": 30})})
    job = Job(**{**vars(job), "customers": [job.customers[0], diverging, job.customers[2]]})
    assert run_job(job) == 1
    results = [read_result(job, customer.key, "train") for customer in job.customers]
    assert [r["status"] for r in results if r] == ["done", "failed", "done"]
    assert results[1] and "not finite" in str(results[1]["reason"]) and "training.lr" in str(results[1]["reason"])
    assert not Path(diverging.prefix_dir).exists()


def test_a_prefix_too_long_for_the_base_makes_the_batches_of_the_others_no_wider(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = make_job(customers=2, max_steps=2)
    one, other = job.customers
    job = replace(job, customers=[replace(one, prefix=replace(one.prefix, length=2000)), other])
    widths = []

    class Spy(PrefixBank):
        def __init__(self, sites: Any, slots: int, length: int, *more: Any) -> None:
            widths.append(length)
            super().__init__(sites, slots, length, *more)

    monkeypatch.setattr("pipeline.training.mixed.PrefixBank", Spy)
    assert run_job(job) == 1
    assert widths == [other.prefix.length]
    results = [read_result(job, customer.key, "train") for customer in job.customers]
    assert [r["status"] for r in results if r] == ["failed", "done"]
    assert "prefix of 2000" in str((results[0] or {})["reason"])


def test_a_finished_customer_is_not_trained_again(make_job: MakeJob) -> None:
    job, _ = make_job()
    run_job(job)
    file = Path(job.customers[0].prefix_dir) / "prefix.json"
    before = file.stat().st_mtime_ns
    run_job(job)
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("init", ["random", "zeros"])
def test_other_initialisers_train_too(make_job: MakeJob, init: str) -> None:
    job, _ = make_job(init=init)
    assert run_job(job) == 0


def test_metrics_are_written_as_lines_of_json(make_job: MakeJob) -> None:
    job, _ = make_job()
    run_job(job)
    lines = [json.loads(line) for line in (Path(job.folder) / "c0" / "default" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(math.isfinite(line["grad_norm"]) and line["tokens"] > 0 for line in steps)
    assert steps[0]["lr"] == 0.02 and steps[-1]["lr"] == pytest.approx(0.02 / 12)


def test_a_prefix_folder_that_lost_a_file_is_trained_again(make_job: MakeJob) -> None:
    job, _ = make_job()
    run_job(job)
    (Path(job.customers[0].prefix_dir) / "prefix.safetensors").unlink()
    assert run_job(job) == 0
    assert weights(job)


def test_data_prepared_anew_since_the_job_was_written_is_refused(make_job: MakeJob) -> None:
    job, _ = make_job()
    stale = type(job.customers[0])(**{**vars(job.customers[0]), "data_fingerprint": "0" * 64})
    job = Job(**{**vars(job), "customers": [stale]})
    assert run_job(job) == 1
    result = read_result(job, stale.key, "train")
    assert result and "prepared anew" in str(result["reason"])


def test_another_base_than_the_jobs_is_refused(make_job: MakeJob) -> None:
    job, _ = make_job()
    changed = type(job.base)(**{**vars(job.base), "digest": "0" * 64})
    with pytest.raises(BaseModelError, match="0000000000000000"):
        run_job(Job(**{**vars(job), "base": changed}))


def test_job_file_comes_back_and_mistakes_name_their_place(make_job: MakeJob) -> None:
    job, path = make_job()
    assert read_job(path) == job
    text = path.read_text()
    for old, new, place in [
        ("max_steps: 12", "max_steps: many", "training.max_steps"),
        ("batch_size: 6", "batch_sice: 6", r"customers\[0\].training"),
        ("format: 3", "format: 7", "format 3"),
    ]:
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=place):
            read_job(path)
    with pytest.raises(ConfigError, match="no such job file"):
        read_job(path.with_name("none.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("slots: 32", "slots: 0", "mixing.slots: 0 must be at least 1"),
        ("max_tokens_per_micro_batch: 4096", "max_tokens_per_micro_batch: -5", "mixing.max_tokens_per_micro_batch"),
        ("batch_size: 6", "batch_size: 0", r"customers\[0\].training.batch_size"),
        ("eval_every: 4", "eval_every: 0", r"customers\[0\].training.eval_every"),
        ("max_steps: 12", "max_steps: 0", r"customers\[0\].training.max_steps"),
        ("early_stopping: null", "early_stopping: 0", r"customers\[0\].training.early_stopping"),
        ("lr: 0.02", "lr: .inf", r"customers\[0\].training.lr"),
        ("schedule: linear", "schedule: steep", "none of linear, cosine, constant"),
        ("customer: c1", "customer: c0", r"customers\[1\]: c0 stands twice"),
    ],
)
def test_values_that_no_fleet_file_would_give_are_refused(make_job: MakeJob, old: str, new: str, place: str) -> None:
    _, path = make_job(customers=2)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=place):
        read_job(path)


def test_an_encoder_decoder_trains_and_answers_with_its_prefix(make_job: MakeJob, tiny_encoder_decoder: Path) -> None:
    job, _ = make_job(base=tiny_encoder_decoder, max_steps=40, eval_every=10, lr=0.1)
    assert run_job(job) == 0
    prefix, config = load_prefix(Path(job.customers[0].prefix_dir))
    dev = [entry["dev_loss"] for entry in config["training"]["history"] if "dev_loss" in entry]
    assert min(dev) < dev[0] - 0.1
    assert {site.rsplit(".", 1)[0] for site in prefix} == {"encoder.self", "decoder.self", "decoder.cross"}
    engine = load_engine(job.base)
    slot = engine.add(Path(job.customers[0].prefix_dir))
    prompts = [record.prompt_ids for record in read_split(Path(job.customers[0].prepared), "test")]
    assert engine.generate(prompts, [slot] * len(prompts), max_new_tokens=8) != engine.generate(
        prompts, [0] * len(prompts), max_new_tokens=8
    )


def launch(path: Path, config: str, root: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(root / "accelerate_configs" / f"{config}.yaml"),
    ]
    return subprocess.Popen(
        [*command, "-m", "pipeline.training", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_processes_give_the_prefix_of_one(make_job: MakeJob, root: Path) -> None:
    one, _ = make_job(name="one")
    two, path = make_job(name="two")
    assert run_job(one) == 0
    child = launch(path, "cpu_2proc", root)
    output, _ = child.communicate(timeout=180)
    assert child.returncode == 0, output.decode()
    a, b = weights(one), weights(two)
    # The two sum their gradients in another order; Adam turns a rounding error of a tiny gradient into a step of up to lr.
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_a_customer_that_one_process_fails_at_is_given_up_by_all_and_the_next_is_trained_rightly(
    make_job: MakeJob, root: Path
) -> None:
    one, _ = make_job(customers=2, name="one")
    two, path = make_job(customers=2, name="two")
    assert run_job(one) == 0
    (Path(two.folder) / "c0" / "default" / "metrics.jsonl").mkdir(parents=True)  # only the first process writes it
    child = launch(path, "cpu_2proc", root)
    output, _ = child.communicate(timeout=180)
    assert child.returncode == 0, output.decode()
    results = [read_result(two, customer.key, "train") for customer in two.customers]
    assert [r and r["status"] for r in results] == ["failed", "done"]
    a, b = weights(one, 1), weights(two, 1)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_training_ends_when_the_process_that_started_it_dies(make_job: MakeJob, root: Path) -> None:
    job, path = make_job(max_steps=100_000, eval_every=50_000)
    child = launch(path, "cpu", root, PREFIXFLEET_EXIT_WITH_PARENT="1")
    log = Path(job.folder) / "c0" / "default" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert child.stdin is not None
    child.stdin.close()  # what the kernel does when the flow is killed
    child.wait(timeout=20)
    assert child.returncode != 0
    assert not Path(job.customers[0].prefix_dir).exists()


def test_killed_at_any_moment_it_can_be_run_again(make_job: MakeJob, root: Path) -> None:
    job, path = make_job(customers=2, max_steps=300, eval_every=50)
    child = Trainer(path, root)
    first = Path(job.customers[0].prefix_dir) / "prefix.json"
    deadline = time.monotonic() + 120
    while not first.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = first.stat().st_mtime_ns
    assert run_job(job) == 0
    assert first.stat().st_mtime_ns == before, "the finished customer was trained again"
    assert all(Path(c.prefix_dir, "prefix.safetensors").exists() for c in job.customers)
