"""Children of a flow: their output, their end, and ours."""

import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from flows import launch
from pipeline.config import LaunchSettings
from pipeline.errors import ConfigError, EvaluationError, TrainingError
from pipeline.process import RESUME, paused_note

LOG = logging.getLogger("test_launch")


def run(code: str, on_event: Any = lambda event: None, name: str = "pipeline.training", log: Any = LOG) -> None:
    launch.run_process([sys.executable, "-c", code], dict(os.environ), name, on_event, log)


def sleepers(tag: str) -> list[psutil.Process]:
    """Living processes with `tag` in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(tag in part for part in process.info["cmdline"] or []):
            found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def wait_until(condition: Any, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_marked_lines_are_events_and_all_others_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    events: list[dict[str, Any]] = []
    code = """
import sys
print('@prefixfleet {"stage": "train", "done": 1, "total": 2, "unit": "steps"}')
print("plain")
print("to stderr", file=sys.stderr)
print("@prefixfleet {garbled")
print("bar 1\\rbar 2")
sys.stdout.buffer.write(b"bad \\xff byte\\n")
print("", flush=True)
"""
    with caplog.at_level(logging.INFO, logger="test_launch"):
        run(code, events.append)
    assert events == [{"stage": "train", "done": 1, "total": 2, "unit": "steps"}]
    assert {"plain", "to stderr", "@prefixfleet {garbled", "bar 2", "bad \ufffd byte"} == {r.getMessage() for r in caplog.records}


def test_child_that_floods_its_output_loses_no_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="test_launch"):
        run("for i in range(20000): print(i)")
    assert [r.getMessage() for r in caplog.records] == [str(i) for i in range(20000)]


def test_killed_child_is_named_with_its_signal_its_last_lines_and_a_remedy() -> None:
    with pytest.raises(launch.ProcessCrash, match=r"(?s)SIGKILL.*out of memory.*last words.*run the same command again"):
        run("import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)")


def test_only_the_last_thirty_lines_are_repeated() -> None:
    with pytest.raises(launch.ProcessCrash) as caught:
        run("import sys\nfor i in range(100): print('line', i)\nsys.exit(7)")
    assert "exit status 7" in str(caught.value)
    assert "line 70\n" in str(caught.value) and "line 69\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("pipeline.training", TrainingError), ("pipeline.evaluation", EvaluationError)])
def test_refused_job_is_no_crash_and_not_worth_a_retry(name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="error: no such base") as caught:
        run("import sys; print('error: no such base', file=sys.stderr); sys.exit(2)", name=name)
    assert not isinstance(caught.value, launch.ProcessCrash)


@pytest.mark.parametrize("status", [1, 2])
def test_full_disk_is_named_whatever_was_said_after_it(status: int) -> None:
    with pytest.raises(TrainingError, match=r"found the disk full\. Free some space.*\n.*No space left on device") as caught:
        run(f"import sys; print('OSError: [Errno 28] No space left on device'); print('noise\\n' * 50); sys.exit({status})")
    assert not isinstance(caught.value, launch.ProcessCrash)


def test_child_that_stopped_at_a_checkpoint_wants_to_be_started_again() -> None:
    with pytest.raises(launch.ProcessPaused, match="stopped at a checkpoint"):
        run(f"import sys; sys.exit({RESUME})")


@pytest.mark.parametrize("status", [143, 130])
def test_child_that_was_asked_to_stop_is_no_crash(status: int) -> None:
    with pytest.raises(TrainingError, match="from outside") as caught:
        run(f"import sys; sys.exit({status})")
    assert not isinstance(caught.value, launch.ProcessCrash)


@pytest.mark.parametrize("config", ["cpu", "cpu_2proc"])
def test_error_behind_the_real_launcher_is_that_of_the_process_it_started(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `accelerate launch` ends with status 1 whatever happened, with a traceback of its own.
    (tmp_path / "dies.py").write_text(
        "import os, signal, sys\nprint('argument', sys.argv[1], flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(launch.ProcessCrash) as caught:
        launch.run_module("dies", tmp_path / "job.yaml", LaunchSettings(accelerate_config=config), lambda event: None, LOG)
    assert "SIGKILL" in str(caught.value) and f"argument {tmp_path / 'job.yaml'}" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("config", ["cpu", "cpu_2proc"])
def test_a_pause_is_told_from_a_crash_behind_the_real_launcher(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pauses.py").write_text(f"import sys\nprint('the checkpoint is written', flush=True)\nsys.exit({RESUME})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(launch.ProcessPaused, match="the checkpoint is written"):
        launch.run_module("pauses", tmp_path / "job.yaml", LaunchSettings(accelerate_config=config), lambda event: None, LOG)


def test_a_pause_is_known_from_the_note_whatever_the_launcher_ends_with_and_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a command on another machine ends with a status of its own, or the launcher names another process than the one that asked."""
    stand_in = [sys.executable, "-c", "import os; os._exit({status})", "{command}"]

    def run_with(status: int, before: bool, during: bool) -> Exception:
        note = paused_note(tmp_path / "job.yaml")
        if before:
            note.touch()
        code = [part.format(status=status, command="{command}") for part in stand_in]
        if during:
            code[2] = f"import pathlib; pathlib.Path({str(note)!r}).touch(); {code[2]}"
        settings = on_two_machines(launcher=[*code, "{machine}"])
        monkeypatch.setattr(launch, "_NOTICE_SECONDS", 5.0)
        with pytest.raises(TrainingError) as caught:
            launch.run_module("pipeline.training", tmp_path / "job.yaml", settings, lambda event: None, LOG)
        assert not note.exists()
        return caught.value

    assert isinstance(run_with(255, before=False, during=True), launch.ProcessPaused)
    assert isinstance(run_with(255, before=True, during=False), launch.ProcessCrash), "a note of an earlier run says nothing"


def test_interrupt_ends_child_and_grandchild_in_another_session_and_ignoring_sigterm() -> None:
    tag = f"sleeper-{os.getpid()}-a"
    grandchild = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '{tag}'; time.sleep(600)"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True)\ntime.sleep(600)"

    def interrupt() -> None:
        wait_until(lambda: len(sleepers(tag)) >= 2)
        time.sleep(0.3)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(code)
    assert sleepers(tag) == []


def test_grandchildren_of_a_killed_launcher_do_not_outlive_it() -> None:
    tag = f"sleeper-{os.getpid()}-b"
    grandchild = f"import time; '{tag}'; time.sleep(600)"
    code = f"""
import os, signal, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', {grandchild!r}])
time.sleep(2.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with pytest.raises(launch.ProcessCrash, match="SIGKILL"):
        run(code)
    assert sleepers(tag) == []


def test_child_ends_when_its_parent_is_killed() -> None:
    tag = f"sleeper-{os.getpid()}-c"
    child = f"from pipeline.process import exit_with_parent; import time; exit_with_parent(); '{tag}'; time.sleep(600)"
    parent = f"""
import logging, os, sys
from flows import launch
env = {{**os.environ, "PREFIXFLEET_EXIT_WITH_PARENT": "1"}}
launch.run_process([sys.executable, "-c", {child!r}], env, "x", print, logging.getLogger())
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        assert wait_until(lambda: any(p.ppid() == process.pid for p in sleepers(tag)), 30)
        time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    assert wait_until(lambda: not sleepers(tag))


def test_environment_sets_what_is_unset_and_leaves_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "7")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    env = launch.environment(LaunchSettings())
    cores = len(os.sched_getaffinity(0))
    assert (env["OMP_NUM_THREADS"], env["TOKENIZERS_PARALLELISM"], env["HF_HUB_OFFLINE"]) == (str(cores), "7", "0")
    assert launch.environment(LaunchSettings(accelerate_config="cpu_2proc"))["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.environment(LaunchSettings())["OMP_NUM_THREADS"] == "3"


def test_unknown_accelerate_config_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"gpus\.yaml.*cpu, cpu_2proc, fsdp2, .*multi_gpu_ddp, .*single_gpu, tp, .*zero3"):
        launch.config_file(LaunchSettings(accelerate_config="gpus"))


def test_more_processes_than_the_config_starts_are_refused() -> None:
    with pytest.raises(ConfigError, match="starts one process"):
        launch.config_file(LaunchSettings(accelerate_config="cpu", num_processes=2))


def test_processes_are_the_config_file_s_unless_the_fleet_file_says(tmp_path: Path) -> None:
    assert "--num_processes" not in launch.command("m", tmp_path, LaunchSettings(accelerate_config="cpu_2proc"))
    named = launch.command("m", tmp_path, LaunchSettings(accelerate_config="multi_gpu_ddp", num_processes=4))
    assert named[named.index("--num_processes") + 1] == "4"


def test_two_process_config_starts_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ranks.py").write_text(
        # In one write, or the lines of the two may run into one another.
        "import os\nprint('rank {RANK} of {WORLD_SIZE}'.format(**os.environ) + '\\n', end='', flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="test_launch"):
        launch.run_module("ranks", tmp_path / "job.yaml", LaunchSettings(accelerate_config="cpu_2proc"), lambda event: None, LOG)
    assert {"rank 0 of 2", "rank 1 of 2"} <= {record.getMessage() for record in caplog.records}


# Stands for SSH, srun or kubectl: runs the command on "another machine" with nothing of our environment but where programs are.
STAND_IN = ["env", "-i", "PATH=/usr/bin:/bin", "MACHINE={machine}", "bash", "-c", "exec {command}"]


def on_two_machines(**settings: Any) -> LaunchSettings:
    port = str(free_port())
    whole = {
        "accelerate_config": "cpu_2proc",
        "num_processes": 4,
        "num_machines": 2,
        "main_address": f"127.0.0.1:{port}",
        **settings,
    }
    return LaunchSettings(**{"launcher": STAND_IN, **whole})


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_launcher_is_started_for_each_machine_with_a_quoted_command() -> None:
    settings = on_two_machines(launcher=["ssh", "node{machine}", "cd /srv && exec {command}"], main_address="node0:29500")
    first, second = launch.commands("pipeline.training", Path("/jobs/a b/job.yaml"), settings)
    assert (first[:2], second[:2]) == (["ssh", "node0"], ["ssh", "node1"])
    words = shlex.split(second[2].removeprefix("cd /srv && exec "))
    assert words[words.index("--machine_rank") + 1] == "1" and words[words.index("--num_machines") + 1] == "2"
    assert words[words.index("--main_process_ip") + 1] == "node0" and words[words.index("--main_process_port") + 1] == "29500"
    assert words[0] == "env" and "PREFIXFLEET_EXIT_WITH_PARENT=1" in words and words[-1] == "/jobs/a b/job.yaml"


def test_launcher_that_starts_all_machines_is_started_once_and_leaves_the_rank_to_their_shells() -> None:
    srun = ["srun", "--nodes={machines}", "--ntasks-per-node=1", "--input=all", "bash", "-c", "exec {command}"]
    (only,) = launch.commands("m", Path("job.yaml"), on_two_machines(launcher=srun, machine_rank="$SLURM_NODEID"))
    assert only[1] == "--nodes=2"
    assert "--machine_rank $SLURM_NODEID" in only[-1]


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
@pytest.mark.parametrize(
    "address",
    [
        "https://me:s3cret@mlflow:5000",
        "https://s3cret@mlflow",
        "postgresql://me:s3cret@db/mlflow",
        "postgresql://db/mlflow?password=s3cret",
    ],
)
def test_secret_in_an_address_is_not_put_into_a_command_line(monkeypatch: pytest.MonkeyPatch, name: str, address: str) -> None:
    monkeypatch.setenv(name, address)
    with pytest.raises(ConfigError, match=rf"{name} holds a password.*~/\.mlflow/credentials") as caught:
        launch.commands("m", Path("job.yaml"), on_two_machines())
    assert "s3cret" not in str(caught.value)
    launch.commands(
        "m", Path("job.yaml"), LaunchSettings(accelerate_config="cpu")
    )  # here the environment is handed on, and nothing is shown


def test_machines_are_told_of_stores_and_networks_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"MLFLOW_TRACKING_URI": "postgresql://me@db/mlflow", "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth1"}
    for item in {**told, "MLFLOW_TRACKING_PASSWORD": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret"}.items():
        monkeypatch.setenv(*item)
    for line in launch.commands("m", Path("job.yaml"), on_two_machines(launcher=["ssh", "n{machine}", "{command}"])):
        assert {f"{name}={value}" for name, value in told.items()} <= set(shlex.split(line[2]))
        assert "s3cret" not in line[2]


def test_two_machines_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    script = (
        "import os\nprint('machine {MACHINE} rank {RANK} of {WORLD_SIZE}'.format(**os.environ) + '\\n', end='', flush=True)\n"
    )
    (tmp_path / "ranks.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="test_launch"):
        launch.run_module("ranks", tmp_path / "job.yaml", on_two_machines(), lambda event: None, LOG)
    said = {record.getMessage() for record in caplog.records}
    assert {f"machine {rank // 2} rank {rank} of 4" for rank in range(4)} <= said


def test_one_machine_that_asks_to_be_resumed_ends_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, sys, time\nsys.exit(75) if os.environ['RANK'] == '3' else time.sleep(600)\n"
    (tmp_path / "waits.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "_NOTICE_SECONDS", 1.0)
    before = set(psutil.pids())
    with pytest.raises(launch.ProcessPaused):
        launch.run_module("waits", tmp_path / "job.yaml", on_two_machines(), lambda event: None, LOG)
    left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and "waits" in (p.info["cmdline"] or [])]
    assert not left


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_machines": 2}, "needs launcher and main_address"),
        ({"launcher": ["ssh", "{command}"]}, "set num_machines"),
        ({"num_machines": 2, "main_address": "a:1", "launcher": ["ssh", "node{machine}"]}, "must hold {command}"),
        ({"num_machines": 2, "main_address": "a:1", "launcher": ["srun", "{command}"]}, "set machine_rank"),
        ({"num_machines": 2, "main_address": "a", "launcher": ["ssh", "n{machine}", "{command}"]}, "pattern"),
        (
            {"num_machines": 2, "num_processes": 3, "main_address": "a:1", "launcher": ["ssh", "n{machine}", "{command}"]},
            "multiple",
        ),
    ],
)
def test_machines_that_cannot_be_reached_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        LaunchSettings(**settings)


def test_the_memory_of_the_devices_is_told_to_training_alone() -> None:
    settings = LaunchSettings(device_memory="24GiB")
    assert launch.command("pipeline.training", Path("job.yaml"), settings)[-4:] == [
        "pipeline.training", "--device-memory", "24GiB", "job.yaml",
    ]  # fmt: skip
    assert "--device-memory" not in launch.command("pipeline.evaluation", Path("job.yaml"), settings)


def test_lines_of_several_processes_are_whole_and_begin_with_the_rank_and_their_events_are_understood() -> None:
    code = """
import os, sys
from pipeline.process import mark_rank
from pipeline.progress import Progress
mark_rank()
print("one", end=" ")
print("two", file=sys.stderr)
print("line\\nanother")
Progress("train", 3, "steps")
sys.stdout.write("no end")
"""
    env = {**launch.environment(LaunchSettings()), "RANK": "1", "WORLD_SIZE": "2"}
    log = logging.getLogger("ranks")
    seen: list[Any] = []
    lines: list[str] = []
    log.addFilter(lambda record: bool(lines.append(record.getMessage())))
    log.setLevel(logging.INFO)
    launch.run_process([sys.executable, "-c", code], env, "ranks", seen.append, log)
    assert sorted(lines) == ["[rank1] another", "[rank1] no end", "[rank1] one line", "[rank1] two"]
    assert [(event["stage"], event["total"]) for event in seen] == [("train", 3)]
