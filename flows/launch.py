"""Run a stage as a child process through `accelerate launch`, and take it down with us.

In: a module (`pipeline.training`, `pipeline.evaluation`), a job file, how to launch. Out: nothing but files that the child writes; its progress
goes to a callback and its other output to a logger. Knows nothing of what the child does, and nothing of Prefect.

The child stays in our process group, so that a Prefect worker's cancel reaches it, and reads a pipe that closes when we die, so that launcher
and ranks end even after a SIGKILL of the flow (`pipeline.process.exit_with_parent` is the other end).
"""

import contextlib
import json
import logging
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, urlsplit

import psutil
import yaml

from pipeline.config import LaunchSettings
from pipeline.errors import ConfigError, EvaluationError, PrefixFleetError, TrainingError
from pipeline.process import RESUME, paused_note
from pipeline.progress import MARK

CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"
GRACE_SECONDS = 8.0  # between asking a child to stop and killing it; the whole must stay under ten
_LAST_LINES = 30
_NOTICE_SECONDS = 20.0  # that the processes of other machines have to see that one is gone
_KEPT_LINES = 200  # more than are shown: the launcher adds a long traceback of its own at the end

# What a machine has to be told of our environment, if it is set.
_CARRIED = (
    "PREFIXFLEET_PROGRESS", "PREFIXFLEET_EXIT_WITH_PARENT", "PREFIXFLEET_HOME", "PYTHONUNBUFFERED", "PYTHONPATH", "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI", "HF_HOME", "HF_HUB_OFFLINE",
)  # fmt: skip
_CARRIED_BEGIN = ("GLOO_", "NCCL_", "TORCH_NCCL_")  # which network to meet over
_RANK = "{machine}"

Event = dict[str, Any]


class ProcessPaused(TrainingError):
    """The child stopped at a checkpoint and wants to be started again: it was sent SIGTERM, or ran out of device memory beside other processes."""


class ProcessCrash(TrainingError):
    """The child was killed or crashed without giving a reason of its own: worth one more try."""


def config_file(launch: LaunchSettings) -> Path:
    """The file that `launch.accelerate_config` names.

    Raises:
        ConfigError: there is none, or it cannot start as many processes as asked for.
    """
    name = launch.accelerate_config
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    file = Path(name).expanduser().resolve() if is_path else CONFIGS / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"launch.accelerate_config: no file {file}. Give a path, or one of: {known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as an accelerate config ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: is no accelerate config. Make one with `accelerate config --config_file {file}`.")
    # YAML 1.1 reads an unquoted NO as false.
    if content.get("distributed_type") in ("NO", False, None) and launch.num_processes > 1:
        raise ConfigError(
            f"launch.num_processes is {launch.num_processes}, but {file} starts one process. "
            "Use accelerate_config: cpu_2proc (processor) or multi_gpu_ddp (GPUs)."
        )
    return file


def command(module: str, job_file: Path, launch: LaunchSettings) -> list[str]:
    """The command line of the child."""
    # The number of processes of the config file holds unless the fleet file names one.
    wanted = ["--num_processes", str(launch.num_processes)] if "num_processes" in launch.model_fields_set else []
    config = ["--config_file", str(config_file(launch))]
    where: list[str] = []
    if launch.main_address is not None:
        host, _, port = launch.main_address.partition(":")
        machines = ["--num_machines", str(launch.num_machines), "--machine_rank", _RANK]
        where = [*machines, "--main_process_ip", host, "--main_process_port", port]
    fitted = (
        ["--device-memory", launch.device_memory] if launch.device_memory is not None and module == "pipeline.training" else []
    )
    return [sys.executable, "-m", "accelerate.commands.launch", *config, *wanted, *where, "-m", module, *fitted, str(job_file)]


def commands(module: str, job_file: Path, launch: LaunchSettings) -> list[list[str]]:
    """The command lines to start here: one, or with a launcher one for each machine unless the launcher starts them all."""
    arguments = command(module, job_file, launch)
    if launch.launcher is None:
        return [arguments]
    env = environment(launch)
    # Nothing of our environment is there on another machine, unless the launcher takes it along.
    there = ["env", *_carried(env), *arguments]
    per_machine = any("{machine}" in part for part in launch.launcher)
    started = []
    for machine in range(launch.num_machines if per_machine else 1):
        rank = str(machine) if per_machine else launch.machine_rank
        # The rank may be for the shell there to find out, so it alone is not quoted.
        line = " ".join(rank if argument == _RANK else shlex.quote(argument) for argument in there)
        started.append([_filled(part, machine, launch.num_machines, line) for part in launch.launcher])
    return started


def _carried(env: Mapping[str, str]) -> list[str]:
    """NAME=value of what another machine has to be told. It stands in command lines, which everybody on both machines can list.

    Raises:
        ConfigError: a store's address holds a secret.
    """
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        if holds_secret(env.get(name, "")):
            raise ConfigError(
                f"{name} holds a password or token, and launch.launcher would put it into a command line that `ps` shows to everybody. Take it "
                "out of the address and give it to every machine by itself: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
                "MLFLOW_TRACKING_TOKEN) in the environment there, or the file ~/.mlflow/credentials, for PostgreSQL ~/.pgpass, both of mode 0600."
            )
    names = [*(n for n in _CARRIED if n in env), *sorted(n for n in env if n.startswith(_CARRIED_BEGIN))]
    return [f"{name}={env[name]}" for name in names]


def told_to_workers(home: Path) -> dict[str, str]:
    """What a flow run on a worker must be told: where the files are, and which MLflow servers.

    An address with a password is not told, since whoever sees Prefect's server would see it: workers need it in their own environment. Nor is that of
    the embedded store, which follows from the home.
    """
    servers = {name: os.environ.get(name, "") for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    told = {name: address for name, address in servers.items() if address.startswith(("http://", "https://", "databricks"))}
    return {"PREFIXFLEET_HOME": str(home), **{name: address for name, address in told.items() if not holds_secret(address)}}


def holds_secret(address: str) -> bool:
    """Whether a store's address has a password or token in it."""
    parts = urlsplit(address)
    # A database's user alone is no secret; what stands before a server's @ may be a token.
    alone = parts.username is not None and parts.scheme in ("http", "https")
    return parts.password is not None or alone or any("pass" in name or "token" in name for name in parse_qs(parts.query))


def _filled(part: str, machine: int, machines: int, line: str) -> str:
    values = {"{machine}": str(machine), "{machines}": str(machines), "{command}": line}
    return re.sub(r"\{machines?\}|\{command\}", lambda found: values[found[0]], part)


def environment(launch: LaunchSettings) -> dict[str, str]:
    """The child's environment: ours, and what makes it fast and well-behaved where the user has set nothing else."""
    file = config_file(launch)
    processes = launch.num_processes
    if "num_processes" not in launch.model_fields_set:
        processes = int(yaml.safe_load(file.read_text(encoding="utf-8")).get("num_processes") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores * launch.num_machines // processes))}
    root = str(Path(__file__).resolve().parent.parent)
    always = {
        "PREFIXFLEET_PROGRESS": "json",
        "PREFIXFLEET_EXIT_WITH_PARENT": "1",
        "PYTHONUNBUFFERED": "1",
        # The child imports the packages that we are, from whatever folder the command is typed in.
        "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
    }
    return {**defaults, **os.environ, **always}


def run_module(
    module: str,
    job_file: Path,
    launch: LaunchSettings,
    on_event: Callable[[Event], None],
    log: logging.Logger | logging.LoggerAdapter[Any],
) -> None:
    """Run `python -m module job_file` through `accelerate launch` and wait for it.

    Whatever ends the wait (the child's end, Ctrl-C, SIGTERM, cancelling), no process of the child's family is left when this returns.

    Args:
        module: importable name.
        job_file: its argument.
        launch: the accelerate config and the number of processes.
        on_event: called with every progress event of the child (see `pipeline.progress`).
        log: gets every other line.

    Raises:
        ProcessCrash: the child was killed or crashed.
        ProcessPaused: the child wants to be started again.
        TrainingError, EvaluationError: the child refused the job or was asked to stop.
        ConfigError: there is no such accelerate config, or another machine cannot be told of a store without telling a secret.
    """
    started, note = commands(module, job_file, launch), paused_note(job_file)
    note.unlink(missing_ok=True)  # of an earlier run
    try:
        if len(started) == 1:
            run_process(started[0], environment(launch), module, on_event, log, note=note)
        else:
            _run_together(started, environment(launch), module, on_event, log, note)
    finally:
        note.unlink(missing_ok=True)


def _run_together(
    started: list[list[str]],
    env: dict[str, str],
    name: str,
    on_event: Callable[[Event], None],
    log: logging.Logger | logging.LoggerAdapter[Any],
    note: Path,
) -> None:
    """As `run_process`, for several that need one another: when one fails the others are ended, and what it failed with is raised."""
    stop = threading.Event()
    failures: list[PrefixFleetError] = []

    def one(arguments: list[str]) -> None:
        try:
            run_process(arguments, env, name, on_event, log, stop, note)
        except PrefixFleetError as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(arguments,)) for arguments in started]
    for thread in threads:
        thread.start()
    try:
        deadline = None
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            if failures and deadline is None:
                # They notice by themselves and say so; those that cannot are ended.
                deadline = time.monotonic() + _NOTICE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                stop.set()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def run_process(
    arguments: list[str],
    env: dict[str, str],
    name: str,
    on_event: Callable[[Event], None],
    log: logging.Logger | logging.LoggerAdapter[Any],
    stop: threading.Event | None = None,
    note: Path | None = None,
) -> None:
    """As `run_module`, for any command line; `name` is what error messages call it. Once `stop` is set the child is ended, which is no error.

    If the file `note` is there when the child has failed, it wants to be started again, whatever it ended with (`pipeline.process.paused_note`).
    """
    child = subprocess.Popen(arguments, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    family: dict[int, psutil.Process] = {}
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    assert child.stdout is not None
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reader.start()
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    try:
        looked = 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=0.5)
                if line is None:
                    break
                _handle(line, last, on_event, log)
            if time.monotonic() - looked > 1.0:
                _remember(child.pid, family)
                looked = time.monotonic()
                # A launcher that was killed leaves ranks behind, which hold the pipe open: its end is what counts, not the end of output.
                if child.poll() is not None:
                    break
            if stop is not None and stop.is_set():
                return
        child.wait()
    finally:
        _end(child, family)
        reader.join(timeout=2.0)
        child.stdout.close()
        while not lines.empty():
            line = lines.get()
            if line is not None:
                _handle(line, last, on_event, log)
    if child.returncode != 0:
        raise _error(name, RESUME if note is not None and note.exists() else child.returncode, list(last))


def _read(stream: IO[bytes], lines: "queue.SimpleQueue[str | None]") -> None:
    with contextlib.suppress(ValueError, OSError):  # closed under us at the end
        for raw in stream:
            # A bar of some library redraws its line with carriage returns: what it showed last is the line.
            lines.put(raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2])
    lines.put(None)


def _handle(
    line: str, last: deque[str], on_event: Callable[[Event], None], log: logging.Logger | logging.LoggerAdapter[Any]
) -> None:
    if said := re.match(
        rf"(\[rank\d+\] )?{re.escape(MARK)}", line
    ):  # of several processes with its rank, see `pipeline.process.mark_rank`
        try:
            event = json.loads(line[said.end() :])
        except ValueError:
            event = None  # two ranks writing at once can garble a line; it is then a line like any other
        if isinstance(event, dict) and isinstance(event.get("stage"), str):
            on_event(event)
            return
    if line.strip():
        last.append(line)
        log.info("%s", line)


def _remember(pid: int, family: dict[int, psutil.Process]) -> None:
    """Note the descendants now: once their parent is dead nobody can say whose they are. psutil tells a reused id by its start time."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            family.setdefault(process.pid, process)


def _end(child: subprocess.Popen[bytes], family: dict[int, psutil.Process]) -> None:
    """End the child and all its descendants: ask, wait, kill."""
    _remember(child.pid, family)
    assert child.stdin is not None
    with contextlib.suppress(OSError):
        child.stdin.close()
    alive = [process for process in family.values() if process.is_running()]
    if child.poll() is None:
        with contextlib.suppress(psutil.Error):
            alive.append(psutil.Process(child.pid))
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    # A second Ctrl-C must not leave them behind: kill at once then.
    try:
        _, alive = psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    finally:
        for process in alive:
            with contextlib.suppress(psutil.Error):
                if process.is_running():
                    process.kill()
        # Popen learns of the end here, whoever reaped the process.
        child.wait()


def _error(name: str, status: int, lines: list[str]) -> PrefixFleetError:
    """What a non-zero exit status of the launcher means: it ends with 1 whatever happened to the processes it started, and says what in words."""
    # Of several processes the launcher names the one that ended first last; those that it then ended itself say nothing.
    text = "\n".join(lines).rpartition("Root Cause (first observed failure)")[2]
    if status == 1:
        died = re.findall(r"died with <Signals\.\w+: (\d+)>|Signal (\d+) \(SIG\w+\) received", text)
        ended = re.findall(r"returned non-zero exit status (\d+)|exitcode\s*:\s*(-?\d+)", text)
        if died:
            status = -int(next(group for group in died[-1] if group))
        elif ended:
            status = int(next(group for group in ended[-1] if group))
    if status > 128 and status - 128 in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT):
        status = 128 - status
    lines = _own_lines(lines)
    # Whatever was said after it: a disk that is full has many consequences, and a remedy of its own.
    full = next(
        (line for line in lines if re.search(r"the disk is full|No space left on device|Disk quota exceeded", line)), None
    )
    lines = lines[-_LAST_LINES:]
    kind = EvaluationError if name.endswith("evaluation") else TrainingError
    if full is not None:
        return kind(
            f"{name} found the disk full. Free some space and run the same command again: what is finished is kept.\n    {full}"
        )
    shown = "".join(f"\n    {line}" for line in lines) if lines else " it printed nothing."
    if status == 2:
        return kind(f"{name} refused the job:{shown}")
    if status == RESUME:
        return ProcessPaused(f"{name} stopped at a checkpoint:{shown}")
    if -status in (signal.SIGTERM, signal.SIGINT):
        return kind(
            f"{name} was stopped by {signal.Signals(-status).name} from outside. Run the same command again: what is finished is kept."
        )
    what = f"ended with exit status {status}"
    remedy = "Run the same command again: what is finished is kept. If it ends the same way, the last lines say why."
    if status < 0:
        try:
            what = f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            what = f"was killed by signal {-status}"
        if -status == signal.SIGKILL:
            what += ", which often means that the machine ran out of memory"
            remedy = "Lower training.batch_size or max_input_tokens, or free some memory, and run the same command again: what is finished is kept."
    return ProcessCrash(f"{name} {what}. Its last lines:{shown}\n  {remedy}")


def _own_lines(lines: list[str]) -> list[str]:
    """`lines` without the traceback that the launcher adds about its child's end."""
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    # accelerate's launcher of one process raises the former, torchrun the latter.
    if starts and any(name in line for line in lines[starts[-1] :] for name in ("CalledProcessError", "ChildFailedError")):
        return lines[: starts[-1]]
    return lines
