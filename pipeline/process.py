"""How a stage's process behaves: it dies with the flow that started it, says what it used, and is quiet."""

import atexit
import contextlib
import ctypes
import functools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import pipeline

INTERRUPTED = 143  # 128 + SIGTERM: asked to stop; run the same command again to go on
_PR_SET_PDEATHSIG = 1
RESUME = 75  # sysexits' EX_TEMPFAIL: stopped at a checkpoint; run the same command again to go on


def paused_note(job_file: Path) -> Path:
    """The file beside a job's file that a process leaves which ends with `RESUME`, for whoever started the launcher that started it.

    `accelerate launch` ends with 1 whatever its processes end with, and what a command on another machine ends with depends on that command.
    """
    return job_file.with_name("paused")


def prepare_process() -> None:
    """Let waiting threads give their core away soon, and let freed memory stay with the process. Call before torch is imported.

    torch's OpenMP threads spin while they wait for one another. When another process wants a core too, each of the thousands of waits of a
    step then lasts until the scheduler steps in: measured beside one busy process of lowest priority on two cores (torch 2.13), over 3 s a
    training step instead of 0.4 s; alone on the machine it makes no difference. A setting of the user's own stands.
    """
    os.environ.setdefault(*_SPIN_COUNT)
    _keep_freed_memory()


_SPIN_COUNT = ("GOMP_SPINCOUNT", "3000")
# What is told glibc's allocator, and may have been told by the user: parameter of mallopt(3) and value.
_ALLOCATOR_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**30),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 2**26),
}


def as_environment(given: Mapping[str, str]) -> dict[str, str]:
    """What `prepare_process` sets in a process with the environment `given`, as variables for somebody else's."""
    allocator = {} if _tells_allocator(given) else {name: str(value) for name, (_, value) in _ALLOCATOR_SETTINGS.items()}
    return dict([_SPIN_COUNT]) | allocator


def _tells_allocator(environment: Mapping[str, str]) -> bool:
    return any(name in environment for name in (*_ALLOCATOR_SETTINGS, "GLIBC_TUNABLES"))


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, unless the user has told it something else.

    It gives a freed tensor of some megabytes back to the system, and the next one is then made of new pages, each of which costs a page fault: about
    a tenth of the CPU seconds of a training step on a processor (glibc 2.36). The peak stays as it is.
    """
    if sys.platform != "linux" or _tells_allocator(os.environ):
        return
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is None:  # musl
        return
    for parameter, value in _ALLOCATOR_SETTINGS.values():
        tune(parameter, value)


def exit_with_parent(grace_seconds: float = 0.0) -> None:
    """Leave as soon as standard input closes, if `PREFIXFLEET_EXIT_WITH_PARENT` is set.

    A flow keeps the other end of that pipe open. The launcher between the two survives a SIGKILL of the flow, so being orphaned shows
    only here.

    Args:
        grace_seconds: if not 0, the process gets a SIGTERM first, and this long to write what it wants to keep.
    """
    if os.environ.get("PREFIXFLEET_EXIT_WITH_PARENT") != "1":
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        if grace_seconds:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace_seconds)
        os._exit(INTERRUPTED)  # every file is written whole or not at all, so there is nothing to tidy

    threading.Thread(target=wait, name="exit-with-parent", daemon=True).start()


class _Ranked:
    """A text stream in whose lines the rank stands. A line is written in one go, so that those of several processes on one pipe do not mix."""

    def __init__(self, stream: TextIO, rank: str) -> None:
        self._stream, self._rank, self._open = stream, rank, ""

    def write(self, text: str) -> int:
        whole, newline, self._open = (self._open + text).rpartition("\n")
        if newline:
            self._stream.write("".join(f"[rank{self._rank}] {line}\n" for line in whole.split("\n")))
            self._stream.flush()
        return len(text)

    def finish(self) -> None:
        """Write what has no end of line yet."""
        if self._open:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mark_rank() -> None:
    """Let every line that this process prints begin with `[rank1]`, if it is one of several of a job: their output meets in one log.

    What libraries print from C is beyond it; NCCL and torchrun name the rank themselves.
    """
    rank = os.environ.get("RANK")
    if rank is None or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    for name in ("stdout", "stderr"):
        marked = _Ranked(getattr(sys, name), rank)
        setattr(sys, name, marked)
        atexit.register(marked.finish)


def begin_stage() -> None:
    """What a stage's process does before it imports torch: it leaves with whoever started it, is fast beside others, and ends tidily on SIGTERM."""
    exit_with_parent()
    mark_rank()
    prepare_process()
    # An exception instead of sudden death, so that temporary folders are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))


def end_with_launcher() -> None:
    """Get a SIGTERM when `accelerate launch` dies. It does not pass on the one that ended it: without this we would go on alone. Linux only."""
    if sys.platform != "linux" or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return  # not started by the launcher: whoever starts us from a shell may close it
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != launcher:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def code_version() -> str:
    """`0.1.0`, with the commit behind it: `0.1.0+g1a2b3c4`, of a git checkout (`.dirty` if it was changed since) or, in an image, which has no
    history, what `PREFIXFLEET_COMMIT` says."""
    if named := os.environ.get("PREFIXFLEET_COMMIT"):
        return f"{pipeline.__version__}+g{named}"
    root = Path(pipeline.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return pipeline.__version__
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return pipeline.__version__
    return f"{pipeline.__version__}+g{described.stdout.strip()}"
