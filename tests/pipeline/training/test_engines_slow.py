"""What takes minutes: the memory that a base of 500 MB takes, and two machines on one."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.training.job import Job, read_job
from pipeline.training.plan import plan
from pipeline.training.run import run_job

from .launching import CONFIGS, Launch, assert_like, free_port, ranks
from .test_engines import WITH_DEEPSPEED

pytestmark = pytest.mark.slow
MakeJob = Callable[..., tuple[Job, Path]]
SPLIT = ["fsdp2_2proc_cpu", pytest.param("zero3_2proc_cpu", marks=WITH_DEEPSPEED)]


@pytest.fixture(scope="module")
def large_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random Llama of 510 MB, a block of it 28 MB; embeddings are next to nothing."""
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
            "head_dim": 64,
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


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        ("fsdp2_2proc_cpu", (1, 2, 4)),
        pytest.param("zero3_2proc_cpu", (1, 2, 4), marks=WITH_DEEPSPEED),
        ("tp_2proc_cpu", (2, 4)),  # one process alone shares nothing out
    ],
)
def test_peak_memory_of_a_process_falls_with_their_number(
    make_job: MakeJob, launch: Launch, large_base: Path, tmp_path: Path, config: str, counts: tuple[int, ...]
) -> None:
    peaks: dict[int, float] = {}
    for processes in (0, *counts):  # 0: what the libraries themselves take, on a tiny base
        base = {} if processes == 0 else {"base": large_base}
        _, path = make_job(**base, name=f"with-{processes}", max_steps=2, eval_every=2, mixing={"gradient_checkpointing": True})
        file = tmp_path / "config.yaml"
        file.write_text((CONFIGS / f"{config}.yaml").read_text().replace("tp_size: 2", f"tp_size: {processes or 2}"))
        child = launch(str(file), "--num_processes", str(processes or counts[0]), "-m", "pipeline.training", str(path))
        peaks[processes] = peak_of_ranks(child)
    size = sum(file.stat().st_size for file in large_base.glob("*.safetensors")) / 2**20
    print({"config": config, "base_mb": round(size), "peaks_mb": {n: round(peak) for n, peak in peaks.items()}})
    block = size / 18
    for processes in counts:
        engine = config.partition("_")[0]
        if processes > 1 and engine != "tp":
            needs = plan(read_job(path), processes, 2**40, gpu=False).needs
            planned = next(need.total for need in needs if need.engine == engine and need.checkpointing) / 2**20
            print({"config": config, "processes": processes, "planned_mb": round(planned)})
            assert 0.75 <= planned / (peaks[processes] - peaks[0]) <= 1.25, (planned, peaks)
        # Two blocks are together at a time, the one that runs and the next, with ZeRO-3 each twice while it is exchanged; the rest is activations.
        assert peaks[processes] - peaks[0] < size / processes + (6 if config.startswith("zero3") else 3) * block + 60, peaks
    assert sorted(counts, key=lambda count: -peaks[count]) == list(counts), peaks


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


def assert_trained_as_alone(job: Job, alone: Job, children: list[Any]) -> None:
    for child in children:
        output, _ = child.communicate(timeout=240)
        assert child.returncode == 0, output
    assert_like(job, alone, [0, 1], 1e-3)


@pytest.mark.parametrize("config", ["cpu_2proc", *SPLIT, "tp_2proc_cpu"])
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
