"""Jobs in processes of their own: start them, watch them, read what they left.

`Launch` is the real `accelerate launch`. Most tests need not its ten seconds of imports: `Group` forks processes, as `warm` does one, with the
environment that the launcher would give them, worked out by Accelerate's own functions from the same config files.
"""

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from pipeline.prefix import load_prefix
from pipeline.training.job import Job

from .warm import PRELOAD

CONFIGS = Path(__file__).resolve().parents[3] / "accelerate_configs"
Launch = Callable[..., subprocess.Popen[str]]


def weights(job: Job, i: int) -> dict[str, torch.Tensor]:
    prefix, _ = load_prefix(Path(job.customers[i].prefix_dir))
    return {f"{site}.{kind}": pair[k] for site, pair in prefix.items() for k, kind in enumerate(("key", "value"))}


def assert_like(job: Job, other: Job, customers: list[int], most: float) -> None:
    """The prefixes of both are the same, but for `most` in an entry."""
    for i in customers:
        a, b = weights(job, i), weights(other, i)
        assert all(torch.allclose(a[name], b[name], rtol=0, atol=most) for name in a), i


def wait_for_steps(alive: Callable[[], bool], job: Job, steps: int) -> None:
    log, deadline = Path(job.folder) / "metrics.jsonl", time.monotonic() + 400
    while not log.exists() or log.read_text().count("\n") < steps:
        assert time.monotonic() < deadline and alive(), "no steps"
        time.sleep(0.05)


def ranks(child: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a launcher started, in order."""
    family = psutil.Process(child.pid).children(recursive=True)
    return sorted((p for p in family if "pipeline.training" in " ".join(p.cmdline())), key=lambda p: int(p.environ()["RANK"]))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def parsed(name: str, *options: str) -> argparse.Namespace:
    """A config as Accelerate's launcher understands it."""
    file = CONFIGS / f"{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(file), *options, "-m", "pipeline.training", "job.yaml"])
    validated: Any = _validate_launch_command(arguments)[0]
    assert isinstance(validated, argparse.Namespace)
    validated.deepspeed_fields_from_accelerate_config = ""  # which keys the file had: the launcher notes them next
    return validated


def environment_of(name: str, *options: str) -> dict[str, str]:
    """What the launcher puts into the environment of the processes of a config, their numbers apart."""
    arguments = parsed(name, *options)
    if arguments.use_deepspeed:
        environment: dict[str, str] = prepare_deepspeed_cmd_env(arguments)[1]
    elif int(arguments.num_processes) > 1:
        environment = prepare_multi_gpu_env(arguments)
    else:
        environment = {}
    ours = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    return {key: value for key, value in environment.items() if key.startswith(ours)}


class Group:
    """Processes that run a function together, each as one process of a launcher's config would."""

    def __init__(self, config: str, function: Callable[..., Any], *arguments: Any, folder: Path, processes: int = 2) -> None:
        """Start them; `folder` gets what each prints."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.outputs = [folder / f"process-{rank}.txt" for rank in range(processes)]
        shared = {
            **environment_of(config, "--num_processes", str(processes)), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        self.processes = []
        for rank, output in enumerate(self.outputs):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_run, args=(own, output, function, arguments), daemon=True)
            process.start()
            self.processes.append(process)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> list[int | None]:
        """Their exit statuses; those that take longer are killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{len(late)} did not end in {seconds} s: {self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "\n".join(output.read_text() for output in self.outputs if output.exists())


def _run(environment: Mapping[str, str], output: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    with output.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
    sys.stdout.flush()
    os._exit(0)  # as the trainer itself leaves: the tidying of gloo waits for the others


def train(path: Path) -> None:
    """What `python -m pipeline.training JOB.yaml` does."""
    from pipeline.training.__main__ import entry

    sys.argv = ["pipeline.training", str(path)]
    entry()


def noted(job: Job, file: str) -> Any:
    return json.loads((Path(job.folder) / file).read_text())
