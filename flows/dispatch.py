"""Where the jobs of a run are worked on: in the flow's own process one after another, or as flow runs of the deployment `job/<pool>` on a work pool,
as many at once as the pool lets through.

In: planned jobs, and what a stage does to one. Out: every job through its stages; a job whose process crashes is started again, then cut in two until
the customer that causes it is alone. Must run inside a flow. Knows nothing of what a stage is.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelling, Crashed, State

from flows import events, jobs, tasks, work
from flows.launch import ProcessCrash, told_to_workers
from flows.prefect_api import pages
from pipeline.errors import ConfigError, PrefixFleetError, TrainingError
from pipeline.files import digest_of, read_json, write_json
from pipeline.training.job import JobCustomer

STAGES = ("train", "evaluate")
# Tags of the flow runs of `job`.
TAG, OF_JOB, OF_RUN = "prefixfleet-job", "job:{}", "fleet-run:{}"
ENDED, ALIVE = "ended.json", "alive"  # in the job's folder: how its run ended, and a file whose time says that it is under way
ALIVE_SECONDS = 15.0
_POLL_SECONDS = 2.0
_SILENT_SECONDS = 240.0  # after which a run that was at work and touches its file no more is taken for dead: its machine is gone
_PENDING_SECONDS = 900.0  # the same for one that a worker took and that does not begin; an image may have to be pulled first
_LATE_SECONDS = 60.0  # after which it is said that nobody takes a run
_SERVER_AWAY_SECONDS = 900.0


class _RunLost(ProcessCrash):
    """A flow run ended without a word of its process: its machine is gone, or somebody killed or deleted it. Its customers may be blameless."""


@dataclass
class _Piece:
    """A job, or some customers of one, in one stage."""

    whole: jobs.PlannedJob
    job: jobs.PlannedJob
    stage: str
    members: list[JobCustomer] = field(default_factory=list)
    started: float = 0.0
    run: UUID | None = None
    adopted: bool = False
    heard: tuple[float, float] = (0.0, 0.0)  # the time of its file, and when that was seen to change
    told: bool = False
    lost: bool = False  # whether a run of it was lost before

    @property
    def tries(self) -> int:
        """A whole job is started again once, for what killed it may have been chance. Of its halves only one with a single customer is: who is blamed
        was then tried twice."""
        return 2 if self.job is self.whole or len(self.members) == 1 else 1


def work_through(todo: work.Work, planned: list[jobs.PlannedJob], evaluated: Callable[[jobs.PlannedJob], None]) -> None:
    """Train and evaluate the customers of jobs; notes in `todo` who failed and why.

    Args:
        todo: the run's work.
        planned: the jobs.
        evaluated: called with each job as soon as it is through.
    """
    waiting = deque(_Piece(job, job, STAGES[0]) for job in planned)
    running: list[_Piece] = []
    try:
        while waiting or running:
            here: _Piece | None = None
            fresh, waiting = waiting, deque()
            while fresh:
                piece = fresh.popleft()
                others = [*fresh, *waiting, *running, *([here] if here else [])]
                piece.members = jobs.due_in(piece.job, piece.stage)
                piece.started = time.monotonic()
                if not piece.members:
                    waiting.extend(_after(todo, piece, None, others, evaluated))
                elif piece.job.launch.work_pool is not None:
                    try:
                        _start(piece, todo.fleet.deploy.env)
                        running.append(piece)
                    except Exception as refused:  # the server's, or there is no such deployment: the other jobs go on
                        waiting.extend(_after(todo, piece, refused, others, evaluated))
                elif here is None:
                    here = piece
                else:
                    waiting.append(piece)
            if here is not None:
                # In the flow's own thread, where signals arrive: that is how a cancelled flow ends its children.
                task = tasks.run_job.with_options(retries=here.tries - 1)
                ended = task(here.job, here.stage, return_state=True).result(raise_on_failure=False)
                crash = ended if isinstance(ended, BaseException) else None
                waiting.extend(_after(todo, here, crash, [*waiting, *running], evaluated))
            elif running and not waiting:
                time.sleep(_POLL_SECONDS)
            for piece, error in list(_ended(running)):
                running.remove(piece)
                waiting.extend(_after(todo, piece, error, [*waiting, *running], evaluated))
    except BaseException as error:
        # Of a run that fails, what it found under way goes on without it, as it did before; of one that is cancelled nothing does.
        ours = [piece.run for piece in running if not (piece.adopted and isinstance(error, Exception))]
        with contextlib.suppress(Exception):
            cancel([run for run in ours if run is not None])
        raise


def _after(
    todo: work.Work,
    piece: _Piece,
    error: BaseException | None,
    others: list[_Piece],
    evaluated: Callable[[jobs.PlannedJob], None],
) -> list[_Piece]:
    """What is to be done now that a piece has ended, with `error` if its process did not come to its end."""
    if piece.members:
        todo.stage_seconds[piece.stage] = todo.stage_seconds.get(piece.stage, 0.0) + time.monotonic() - piece.started
    left = jobs.due_in(piece.job, piece.stage)
    if piece.adopted and left and error is None:
        return [
            _Piece(piece.whole, piece.job, piece.stage)
        ]  # what an earlier run of the fleet had asked for is not all that is due now
    if isinstance(error, _RunLost) and left and not piece.lost:
        get_run_logger().warning("%s. It is asked for once more.", error)
        return [_Piece(piece.whole, piece.job, piece.stage, lost=True)]
    if isinstance(error, ProcessCrash) and len(left) > 1:
        half = len(left) // 2
        get_run_logger().warning(
            "%s of job %s crashed. Its %s customers that are left are tried in two halves, to find who causes it.",
            piece.stage, piece.job.job.name, len(left),
        )  # fmt: skip
        blamed = {member.key for member in left}
        todo.finished(piece.job, [member for member in piece.members if member.key not in blamed], piece.stage)
        return [_Piece(piece.whole, jobs.only(piece.job, some), piece.stage) for some in (left[:half], left[half:])]
    todo.finished(piece.job, piece.members, piece.stage, error)
    if any(other.whole is piece.whole for other in others):
        return []  # the last of the halves goes on with the whole
    following = STAGES[STAGES.index(piece.stage) + 1 :]
    if following:
        return [_Piece(piece.whole, piece.whole, following[0])]
    evaluated(piece.whole)
    return []


def _start(piece: _Piece, environment: Mapping[str, str]) -> None:
    """Have a piece worked on by the pool, or find the flow run that is at it already: one that outlived the run of the fleet that started it. A job's
    name is that of its home and fleet file, so no other fleet's run is taken for it.

    Args:
        piece: what is to be done.
        environment: the fleet's `deploy.env`.

    Raises:
        ConfigError: the pool has no deployment.
    """
    job, launch = piece.job, piece.job.launch
    with get_client(sync_client=True) as client:
        tags = FlowRunFilterTags(all_=[TAG, OF_JOB.format(job.job.name)])
        before = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=tags), sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=50
        )
        living = [run for run in before if run.state is not None and not run.state.is_final()]
        if living:
            piece.run, piece.adopted = living[0].id, True
            get_run_logger().info("job %s is under way already, as flow run %s", job.job.name, living[0].name)
            return
    job.path.with_name(ENDED).unlink(missing_ok=True)
    jobs.write(job, piece.stage)
    names = [str(member.key) for member in piece.members]
    asked = digest_of([names, [member.train_digest for member in piece.members]])[:16]
    try:
        run: Any = run_deployment(  # synchronous here, which its type does not say
            f"job/{launch.work_pool}",
            parameters={
                "job_file": str(job.path),
                "stage": piece.stage,
                "launch": launch.model_dump(mode="json", exclude_unset=True),
                "tries": piece.tries,
            },
            timeout=0,
            # The deployment is shared with other fleets, so the environment goes along with each run; Prefect lays it over the deployment's.
            job_variables={"env": {**told_to_workers(job.path.parents[2]), **environment}},
            tags=[TAG, OF_JOB.format(job.job.name), OF_RUN.format(this_run.id)],
            flow_run_name=f"{job.job.name} · {piece.stage} · {names[0] if len(names) == 1 else f'{len(names):,} customers'}",
            # The same request, sent twice because its answer was lost, makes one run; one made after that has ended makes another.
            idempotency_key=f"{job.job.name}-{piece.stage}-{asked}-{before[0].id if before else 0}",
        )
    except ObjectNotFound as error:
        raise ConfigError(
            f"launch.work_pool: there is no deployment job/{launch.work_pool}. `prefixfleet deploy FLEET.yaml` makes it, and "
            f"`prefect worker start --pool {launch.work_pool}` on a machine with the devices takes its runs."
        ) from error
    piece.run = run.id


def _ended(running: list[_Piece]) -> Iterator[tuple[_Piece, BaseException | None]]:
    """The pieces whose flow runs have come to an end, and the error of those that did not come to a good one."""
    if not running:
        return
    for piece, run in zip(running, _runs([piece.run for piece in running if piece.run is not None]), strict=True):
        if run is None:
            yield piece, _RunLost(f"the flow run of job {piece.job.job.name} was deleted in Prefect")
        elif run.state is None:
            continue
        elif run.state.is_final():
            yield piece, _error(piece, run)
        elif (limit := _patience(run.state)) is not None and _is_silent(piece, limit):
            text = f"nothing was heard of its process for {limit:.0f} seconds; its machine may be gone"
            with contextlib.suppress(Exception), get_client(sync_client=True) as client:
                client.set_flow_run_state(run.id, Crashed(message=text), force=True)
            yield piece, _RunLost(f"job {piece.job.job.name}: {text}")
        else:
            _tell(piece, run)


def _runs(ids: list[UUID]) -> list[FlowRun | None]:
    """The flow runs of these ids; waits a while for a server that is away."""
    since = time.monotonic()
    while True:
        try:
            with get_client(sync_client=True) as client:
                found: dict[UUID, FlowRun] = {}
                for start in range(0, len(ids), 100):
                    some = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + 100]))
                    found.update((run.id, run) for run in client.read_flow_runs(flow_run_filter=some, limit=100))
            return [found.get(one) for one in ids]
        except Exception as error:
            if time.monotonic() - since > _SERVER_AWAY_SECONDS:
                raise
            get_run_logger().warning("Prefect's server does not answer (%s); trying again", type(error).__name__)
            time.sleep(_POLL_SECONDS * 5)


def _patience(state: State[Any]) -> float | None:
    """How long a run in this state may be silent; for ever while no worker has taken it. A worker that is killed leaves its runs as they are."""
    if state.is_running():
        return _SILENT_SECONDS
    return _PENDING_SECONDS if state.is_pending() else None


def _is_silent(piece: _Piece, seconds: float) -> bool:
    """Whether the process that works on a piece has not touched its file for so long, by our clock: that of its machine may be wrong."""
    now = time.monotonic()
    try:
        at = piece.job.path.with_name(ALIVE).stat().st_mtime
    except OSError:
        at = 0.0
    if piece.heard[1] == 0.0 or at != piece.heard[0]:
        piece.heard = (at, now)
    return now - piece.heard[1] > seconds


def _tell(piece: _Piece, run: FlowRun) -> None:
    """How far a piece is, and once that nobody takes it."""
    if run.state is not None and run.state.is_running():
        left = len(jobs.due_in(piece.job, piece.stage))
        total = len(piece.members)
        events.emit({"stage": piece.stage, "done": total - left, "total": total, "unit": "customers"})
    elif not piece.told and time.monotonic() - piece.started > _LATE_SECONDS:
        piece.told = True
        pool = piece.job.launch.work_pool
        get_run_logger().warning(
            "job %s waits for work pool %s: its slots are taken, or no worker is there (`prefect worker start --pool %s`)",
            piece.job.job.name, pool, pool,
        )  # fmt: skip


def _error(piece: _Piece, run: FlowRun) -> BaseException | None:
    """What the end of a flow run of `job` means."""
    assert run.state is not None
    if run.state.is_completed():
        return None
    if run.state.is_cancelled():
        return TrainingError(
            f"the flow run {run.name} was cancelled in Prefect. Run the same command again: what is finished is kept."
        )
    try:
        ended = read_json(piece.job.path.with_name(ENDED), 1)
        if ended.get("run") == str(run.id):
            kind = ProcessCrash if ended["kind"] == "crash" else TrainingError
            return kind(str(ended["text"]))
    except (PrefixFleetError, KeyError):
        pass  # it did not come to writing one
    return _RunLost(f"the flow run {run.name} ended as {run.state.name}: {run.state.message or 'without a message'}")


def note_end(job_file: Path, error: BaseException) -> None:
    """Write beside a job's file what its flow run ended with, for the fleet that waits: Prefect's message says no kind."""
    kind = "crash" if isinstance(error, ProcessCrash) else "refused"
    text = str(error) if isinstance(error, PrefixFleetError) else f"{type(error).__name__}: {error}"
    write_json(job_file.with_name(ENDED), {"format": 1, "run": str(this_run.id), "kind": kind, "text": text})


def cancel(runs: list[UUID]) -> None:
    """Have Prefect cancel flow runs: their workers end them and all their children."""
    with get_client(sync_client=True) as client:
        for run in runs:
            client.set_flow_run_state(run, Cancelling(message="the run of the fleet that asked for this job has ended"))


def cancel_jobs_of(flow: Any, flow_run: FlowRun, state: Any) -> None:
    """A hook for the cancelling of a fleet's run: cancel the jobs that it has on work pools. The run itself may be dead by now."""
    with get_client(sync_client=True) as client:
        cancel([job.id for job in _living_jobs(client, flow_run.id)])


def _living_jobs(client: SyncPrefectClient, run: UUID) -> list[FlowRun]:
    ended = FlowRunFilterStateType(not_any_=list(TERMINAL_STATES))
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[TAG, OF_RUN.format(run)]), state=FlowRunFilterState(type=ended))
    return pages(client.read_flow_runs, flow_run_filter=wanted)
