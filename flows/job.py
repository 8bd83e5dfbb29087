"""The flow `job`: one stage for the customers of one job, as a flow run of its own on a work pool. The fleet flow starts it there and waits for it
(`flows.dispatch`); nobody else has to.

The machine that takes it needs this package, and PREFIXFLEET_HOME and the base under the same paths as the fleet: a shared file system.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from prefect import flow

from flows import dispatch, tasks
from flows.jobs import PlannedJob
from pipeline.config import LaunchSettings
from pipeline.errors import ConfigError
from pipeline.home import Home
from pipeline.training.job import read_job


@flow(name="job", persist_result=False)  # its runs are named by whoever starts them
def job(job_file: Path, stage: Literal["train", "evaluate"], launch: LaunchSettings, tries: int = 2) -> None:
    """Train or evaluate whoever of a job still needs it.

    Args:
        job_file: `PREFIXFLEET_HOME/jobs/<job>/job.yaml`, as the fleet flow writes it.
        stage: `train` or `evaluate`.
        launch: how to start the processes, as in the fleet file.
        tries: how often the processes are started if they crash.

    Raises:
        ProcessCrash, TrainingError, EvaluationError: see `flows.launch.run_module`. What a single customer fails with stands in its result.
        ConfigError: the job's file cannot be read here.
    """
    try:
        if not job_file.is_absolute() or not job_file.is_file():
            raise ConfigError(
                f"{job_file}: is not on machine {os.uname().nodename}. A work pool's machines need PREFIXFLEET_HOME on a file system that they "
                "share with the flow, under the same path."
            )
        home = Home(job_file.parents[2])
        # The worker was started without it, or for another fleet.
        os.environ["PREFIXFLEET_HOME"] = str(home.root)
        with _alive(job_file.with_name(dispatch.ALIVE)):
            planned = PlannedJob(read_job(job_file), launch, job_file)
            tasks.run_job.with_options(retries=tries - 1)(planned, stage)
    except Exception as error:
        with contextlib.suppress(Exception):
            dispatch.note_end(job_file, error)
        raise


@contextlib.contextmanager
def _alive(file: Path) -> Iterator[None]:
    """Touch a file now and then, so that the fleet can tell a long job from a machine that is gone."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(dispatch.ALIVE_SECONDS):
            with contextlib.suppress(OSError):
                file.touch()

    file.touch()
    thread = threading.Thread(target=touch, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
