"""What takes minutes: four processes, the memory that a base of 500 MB takes, restarts, two machines on one."""

import importlib.util
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
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
def test_parts_that_wait_in_memory_come_to_the_same_prefixes(launch: Launch, tmp_path: Path, how: str) -> None:
    cases = ("llama:float64:plain",)
    split_worker.run(str(tmp_path / "alone.safetensors"), cases)
    options: list[str] = []
    config = how
    if how == "zero3_file":
        config, file = "zero3_2proc_cpu", tmp_path / "ds.json"
        file.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
        options = ["--deepspeed_config_file", str(file)]
    if how == "fsdp2_offload":
        config, options = "fsdp2_2proc_cpu", ["--fsdp_offload_params", "true"]
    if how.startswith("zero3") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    found = outcome(launch, config, tmp_path / "out.safetensors", cases, *options)
    assert_equal(found, load_file(tmp_path / "alone.safetensors"), 0.5)


@pytest.fixture(scope="module")
def large_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random Llama of some 500 MB, its blocks of 44 MB."""
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
        # Two blocks are together at a time, the one that runs and the next; the rest is activations and buffers of the exchange.
        assert peaks[processes] - peaks[0] < size / processes + 3 * block + 60, peaks
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
