"""`python -m pipeline.training` without the seconds that importing torch and transformers takes: forked from a server that has imported them.

For claims about what a process does once it runs (signals, kills, checkpoints, exit status). Claims about how one starts use a real command line.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

# What forked processes find imported; whatever of it is not there is left out.
PRELOAD = [
    "pipeline.training.__main__",
    "pipeline.training.run",
    "pipeline.training.engines.fsdp2",
    "pipeline.training.engines.tp",
    "accelerate",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.olmo2.modeling_olmo2",
    "transformers.models.t5.modeling_t5",
    "deepspeed",
]


class Trainer:
    """A process with the part of `subprocess.Popen` that tests use; standard output and error go to one file."""

    def __init__(self, job: Path, cwd: Path, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self._output = Path(name)
        # The child opens the reading end by name: it must not hold the writing end, or it would never see it close.
        self._pipe = Path(tempfile.mkdtemp()) / "stdin"
        os.mkfifo(self._pipe)
        self._process = context.Process(target=_run, args=(job, cwd, self._output, self._pipe, environment), daemon=True)
        self._process.start()
        self.stdin: IO[bytes] | None = self._pipe.open("wb", buffering=0)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `Popen.returncode`."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `Popen.poll`."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To the process, if it is there."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """As `Popen.wait`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("pipeline.training", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, None]:
        """Wait, and return what it wrote."""
        self.wait(timeout)
        return self._output.read_bytes(), None


def _run(job: Path, cwd: Path, output: Path, pipe: Path, environment: dict[str, str]) -> None:
    appended = os.O_WRONLY | os.O_APPEND
    for source, target, flags in ((pipe, 0, os.O_RDONLY), (output, 1, appended), (output, 2, appended)):
        opened = os.open(source, flags)
        os.dup2(opened, target)
        os.close(opened)
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["pipeline.training", str(job)]
    runpy.run_module("pipeline.training", run_name="__main__")
