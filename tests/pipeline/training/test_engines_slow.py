"""What takes minutes: four processes, the memory that a base of 350 MB takes, restarts, two machines on one."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.training.job import Job
from pipeline.training.run import run_job

from . import split_worker
from .launching import Launch, ranks, wait_for_steps, weights
from .test_engines import CASES, WITH_DEEPSPEED, assert_equal, outcome

pytestmark = pytest.mark.slow
MakeJob = Callable[..., tuple[Job, Path]]
SPLIT = ["fsdp2_2proc_cpu", pytest.param("zero3_2proc_cpu", marks=WITH_DEEPSPEED)]


@pytest.mark.parametrize("config", SPLIT)
def test_four_processes_come_to_the_same_prefixes_and_keep_a_quarter(launch: Launch, tmp_path: Path, config: str) -> None:
    split_worker.run(str(tmp_path / "alone.safetensors"), CASES)
    found = outcome(launch, config, tmp_path / "out.safetensors", CASES, "--num_processes", "4")
    assert_equal(
        found, load_file(tmp_path / "alone.safetensors"), 0.26
    )  # tables whose rows are no multiple of four are rounded up


@pytest.mark.parametrize("how", ["zero3_offload", "zero3_file", "fsdp2_offload"])
def test_parts_that_wait_elsewhere_come_to_the_same_prefixes(launch: Launch, tmp_path: Path, root: Path, how: str) -> None:
    cases = ("llama:float64:plain",)
    split_worker.run(str(tmp_path / "alone.safetensors"), cases)
    options: list[str] = []
    config = how
    if how == "zero3_file":
        file = tmp_path / "ds.json"
        file.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
        ours = yaml.safe_load((root / "accelerate_configs" / "zero3_2proc_cpu.yaml").read_text())
        ours["deepspeed_config"] = {"deepspeed_config_file": str(file), "zero3_init_flag": False}
        del ours["mixed_precision"]
        config = str(tmp_path / "zero3_file.yaml")
        Path(config).write_text(yaml.safe_dump(ours))
    if how == "fsdp2_offload":
        config, options = "fsdp2_2proc_cpu", ["--fsdp_offload_params", "true"]
    if how.startswith("zero3") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    found = outcome(launch, config, tmp_path / "out.safetensors", cases, *options)
    assert_equal(found, load_file(tmp_path / "alone.safetensors"), 0.5)


@pytest.fixture(scope="module")
def large_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random Llama of some 350 MB, a block of it 28 MB."""
    folder = tmp_path_factory.mktemp("large")
    for file in tiny_base.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)
    config = LlamaConfig.from_pretrained(tiny_base)
    config.update(
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def peak_of_ranks(child: subprocess.Popen[str]) -> float:
    """The most anonymous memory (mapped pages of files do not count) that any rank had at a time, in MB."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            try:
                for process in ranks(child):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    found = re.search(r"RssAnon:\s+(\d+) kB", status)
                    peak[0] = max(peak[0], int(found.group(1)) / 1024 if found else 0.0)
            except (psutil.Error, OSError, KeyError):
                continue  # it has just begun or ended

    thread = threading.Thread(target=watch)
    thread.start()
    output, _ = child.communicate(timeout=420)
    done.set()
    thread.join()
    assert child.returncode == 0, output
    return peak[0]


@pytest.mark.parametrize("config", SPLIT)
def test_peak_memory_of_a_process_falls_with_their_number(
    make_job: MakeJob, launch: Launch, large_base: Path, config: str
) -> None:
    peaks = {}
    for processes in (0, 1, 2, 4):  # 0: what the libraries themselves take, on a tiny base
        base = {} if processes == 0 else {"base": large_base}
        _, path = make_job(**base, name=f"with-{processes}", max_steps=2, eval_every=2, mixing={"gradient_checkpointing": True})
        child = launch(config, "--num_processes", str(max(1, processes)), "-m", "pipeline.training", str(path))
        peaks[processes] = peak_of_ranks(child)
    size = sum(file.stat().st_size for file in large_base.glob("*.safetensors")) / 2**20
    print({"config": config, "base_mb": round(size), "peaks_mb": {n: round(peak) for n, peak in peaks.items()}})
    block = size / 12
    for processes in (1, 2, 4):
        # Two blocks are together at a time, the one that runs and the next, with ZeRO-3 each twice while it is exchanged; the rest is activations.
        assert peaks[processes] - peaks[0] < size / processes + (6 if config.startswith("zero3") else 3) * block + 60, peaks
    assert peaks[4] < peaks[2] < peaks[1]


def test_launcher_restarts_the_processes_after_one_was_killed(make_job: MakeJob, launch: Launch) -> None:
    job, path = make_job(customers=2, max_steps=150, eval_every=50, mixing={"checkpoint_every_seconds": 0.0})
    alone, _ = make_job(customers=2, name="alone", max_steps=150, eval_every=50)
    assert run_job(alone) == 0
    child = launch("fsdp2_2proc_cpu", "--max_restarts", "2", "-m", "pipeline.training", str(path))
    wait_for_steps(child, job, 5)
    ranks(child)[1].kill()
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 0, output
    for i in range(2):
        a, b = weights(job, i), weights(alone, i)
        assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def machines(launch: Launch, config: str, path: Path, address: str, port: int, inside: tuple[list[str], list[str]]) -> list[Any]:
    """Two launchers of one process each, each inside its command."""
    started = []
    for rank, prefix in enumerate(inside):
        where = [
            "--num_machines",
            "2",
            "--machine_rank",
            str(rank),
            "--main_process_ip",
            address,
            "--main_process_port",
            str(port),
        ]
        started.append(launch(config, "--num_processes", "2", *where, "-m", "pipeline.training", str(path), prefix=prefix))
    return started


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def assert_trained_as_alone(job: Job, alone: Job, children: list[Any]) -> None:
    for child in children:
        output, _ = child.communicate(timeout=240)
        assert child.returncode == 0, output
    for i in range(2):
        a, b = weights(job, i), weights(alone, i)
        assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


@pytest.mark.parametrize("config", SPLIT)
def test_two_machines_come_to_the_same_prefixes(make_job: MakeJob, launch: Launch, config: str) -> None:
    job, path = make_job(customers=2)
    alone, _ = make_job(customers=2, name="alone")
    assert run_job(alone) == 0
    assert_trained_as_alone(job, alone, machines(launch, config, path, "127.0.0.1", free_port(), ([], [])))


@pytest.fixture
def two_networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces that see nothing but one another: 10.77.0.1 and 10.77.0.2 on the interface eth0 of each."""
    names = (f"pf{os.getpid()}a", f"pf{os.getpid()}b")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)

    try:
        ip("netns", "add", names[0])
        ip("netns", "add", names[1])
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip(f"network namespaces cannot be created here ({error})")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_machines_meet_over_a_network(make_job: MakeJob, launch: Launch, two_networks: tuple[str, str]) -> None:
    job, path = make_job(customers=2)
    alone, _ = make_job(customers=2, name="alone")
    assert run_job(alone) == 0
    first, second = (["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"] for name in two_networks)
    assert_trained_as_alone(job, alone, machines(launch, "fsdp2_2proc_cpu", path, "10.77.0.1", 29500, (first, second)))


# Process 1 has little memory: a micro-batch of more than 60 tokens does not fit.
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
from pipeline.training.__main__ import entry
entry()
"""


@pytest.mark.parametrize("config", SPLIT)
def test_process_of_a_split_base_that_runs_out_of_memory_leaves_and_the_job_goes_on_with_half_the_budget(
    make_job: MakeJob, launch: Launch, tmp_path: Path, config: str
) -> None:
    job, path = make_job(customers=2, mixing={"max_tokens_per_micro_batch": 100})
    alone, _ = make_job(customers=2, name="alone")
    assert run_job(alone) == 0
    script = tmp_path / "small_rank.py"
    script.write_text(SMALL_RANK)
    budgets = []
    for _ in range(4):
        child = launch(config, str(script), str(path))
        output, _ = child.communicate(timeout=120)
        if child.returncode == 0:
            break
        assert re.findall(r"exitcode\s*:\s*(-?\d+)", output)[-1] == "75", output
        budgets.append(json.loads((Path(job.folder) / "budget.json").read_text())["budget"])
    assert child.returncode == 0, output
    assert budgets and all(b < a for a, b in zip([100, *budgets], budgets, strict=False)), budgets
    for i in range(2):
        a, b = weights(job, i), weights(alone, i)
        assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


@WITH_DEEPSPEED
def test_killed_process_of_zero3_ends_the_job(make_job: MakeJob, launch: Launch) -> None:
    job, path = make_job(customers=2, max_steps=100_000, eval_every=50_000)
    child = launch("zero3_2proc_cpu", "-m", "pipeline.training", str(path))
    wait_for_steps(child, job, 3)
    ranks(child)[1].kill()
    killed = time.monotonic()
    output, _ = child.communicate(timeout=90)
    assert time.monotonic() - killed < 45 and child.returncode != 0
    assert "error: another process of this job ended" in output, output
