"""What the fleet makes of the flow runs that work on its jobs: living ones of an earlier run, silent ones, refused ones. Prefect's server and the
worker are played here, by a clock that this file sets; `test_pools` has the real ones."""

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from flows import jobs, work
from pipeline.home import Home
from pipeline.training.job import read_job
from pipeline.training.results import write_result

from .fake_stage import write_evaluation, write_prefix
from .test_dispatch import write_fleet

# Prefect reads its settings when it is imported, and other tests of this session set them first: nothing here imports it at the top.
if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import State


class Pool:
    """A server with the deployment `job/gpu`, and a worker: `works` is called for each living run every two seconds of `now`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.runs: dict[UUID, FlowRun] = {}
        self.asked: dict[UUID, dict[str, Any]] = {}
        self.works: Callable[[FlowRun, dict[str, Any]], None] = lambda run, asked: finish(self, run, asked)
        self.forced: list[tuple[UUID, str]] = []

    @contextmanager
    def client(self, sync_client: bool) -> Iterator["Pool"]:
        yield self

    def read_flow_runs(self, flow_run_filter: Any, sort: Any = None, limit: int = 200) -> "list[FlowRun]":
        ids, tags = flow_run_filter.id, flow_run_filter.tags
        found = [run for run in self.runs.values() if ids is None or run.id in ids.any_]
        return [run for run in reversed(found) if tags is None or set(tags.all_) <= set(run.tags)]

    def set_flow_run_state(self, run: UUID, state: "State", force: bool = False) -> None:
        self.forced.append((run, str(state.message)))
        self.runs[run].state = state

    def run_deployment(
        self, name: str, parameters: dict[str, Any], tags: list[str], idempotency_key: str, **_more: Any
    ) -> "FlowRun":
        assert name == "job/gpu"
        known = [run for run in self.runs.values() if run.idempotency_key == idempotency_key]
        return known[0] if known else self.add(parameters, tags, idempotency_key)

    def add(self, parameters: dict[str, Any], tags: list[str], key: str) -> "FlowRun":
        from prefect.client.schemas.objects import FlowRun
        from prefect.states import Pending

        members = read_job(Path(parameters["job_file"])).customers  # the file is written anew for every request
        run = FlowRun(id=uuid4(), flow_id=uuid4(), name=key, tags=tags, idempotency_key=key, state=Pending())
        self.runs[run.id], self.asked[run.id] = run, {**parameters, "members": members, "at": self.now}
        return run

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 10_000, "nothing more happens"
        for run in list(self.runs.values()):
            if run.state is not None and not run.state.is_final():
                self.works(run, self.asked[run.id])

    def names(self) -> list[tuple[str, str]]:
        """What was asked for: stage and customers."""
        return [(one["stage"], "".join(member.customer for member in one["members"])) for one in self.asked.values()]


def finish(pool: Pool, run: "FlowRun", asked: dict[str, Any], only: str = "") -> None:
    """The stage, for all that it was asked for or `only` some."""
    from prefect.states import Completed

    job = read_job(Path(asked["job_file"]))
    for member in asked["members"]:
        if not only or member.customer in only:
            write_prefix(job, member) if asked["stage"] == "train" else write_evaluation(member)
            write_result(job, member, "train" if asked["stage"] == "train" else "eval", 0.0)
    run.state = Completed()


@pytest.fixture
def pool(prefect_session: Home, monkeypatch: pytest.MonkeyPatch) -> Pool:
    from flows import dispatch

    made = Pool()
    monkeypatch.setattr(dispatch, "get_client", made.client)
    monkeypatch.setattr(dispatch, "run_deployment", made.run_deployment)
    monkeypatch.setattr(dispatch, "get_run_logger", lambda: logging.getLogger("dispatch"))
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: made.now, sleep=made.sleep))
    return made


def planned(home: Home, folder: Path, base: Path, names: list[str], each: int) -> tuple[work.Work, list[jobs.PlannedJob]]:
    more = f"launch: {{work_pool: gpu, customers_per_job: {each}}}\nwork_pools: {{gpu: {{concurrency_limit: 2}}}}\n"
    todo = work.open_work(write_fleet(folder, base, names, more), None, home)
    for customer in todo.customers:
        todo.due[customer.key] = jobs.STAGES
        todo.prepared(customer.key, work.prepare(customer, todo.base, home))
    plan = todo.plan()
    for job in plan:
        jobs.keep(job)
    return todo, plan


def test_a_run_whose_machine_is_gone_is_given_up_after_four_minutes_of_silence_and_one_that_is_heard_of_never(
    home: Home, tmp_path: Path, example_base: Path, pool: Pool
) -> None:
    from prefect.states import Running

    from flows import dispatch

    todo, plan = planned(home, tmp_path, example_base, ["a", "b"], each=1)
    ticks = itertools.count(1)
    silent: set[UUID] = set()

    def works(run: "FlowRun", asked: dict[str, Any]) -> None:
        first = asked["stage"] == "train" and not run.state.is_running()  # type: ignore[union-attr]
        who = asked["members"][0].customer
        alive = Path(asked["job_file"]).with_name(dispatch.ALIVE)
        if first:
            run.state = Running()
            alive.parent.mkdir(parents=True, exist_ok=True)
            alive.touch()
            if who == "b" and not silent:
                silent.add(run.id)
        elif run.id in silent:
            pass  # its machine is gone: the file's time stays as it is
        elif who == "a" and asked["stage"] == "train" and pool.now - asked["at"] < 1000:
            os.utime(alive, (1e9 + 15 * next(ticks),) * 2)  # by a clock that is years behind
        else:
            finish(pool, run, asked)

    pool.works = works
    evaluated: list[jobs.PlannedJob] = []
    dispatch.work_through(todo, plan, evaluated.append)
    assert todo.errors == {} and len(evaluated) == 2
    assert [one for one, _ in pool.forced] == list(silent) and "240 seconds" in pool.forced[0][1]
    trained = [
        (who, asked["at"]) for (stage, who), asked in zip(pool.names(), pool.asked.values(), strict=True) if stage == "train"
    ]
    assert sorted(who for who, _ in trained) == ["a", "b", "b"], "a's run was left alone for 1,000 s"
    first, second = (at for who, at in trained if who == "b")
    assert 240 < second - first < 260


def test_a_run_that_a_worker_took_and_never_began_is_given_up_and_one_that_waits_for_a_worker_is_not(
    home: Home, tmp_path: Path, example_base: Path, pool: Pool
) -> None:
    from prefect.states import Scheduled

    from flows import dispatch

    todo, plan = planned(home, tmp_path, example_base, ["a"], each=1)

    def works(run: "FlowRun", asked: dict[str, Any]) -> None:
        if len(pool.runs) == 1:
            pass  # the worker was killed between taking it and starting its process
        elif pool.now - asked["at"] < 3000 and asked["stage"] == "train":
            run.state = Scheduled()
        else:
            finish(pool, run, asked)

    pool.works = works
    dispatch.work_through(todo, plan, lambda _: None)
    assert todo.errors == {} and pool.names() == [("train", "a"), ("train", "a"), ("evaluate", "a")]
    assert [one for one, _ in pool.forced] == [next(iter(pool.runs))] and "900 seconds" in pool.forced[0][1]


def test_a_run_that_outlived_its_fleet_is_waited_for_and_what_it_was_not_asked_for_is_asked_for_after_it(
    home: Home, tmp_path: Path, example_base: Path, pool: Pool
) -> None:
    from prefect.states import Running

    from flows import dispatch

    _, plan = planned(home, tmp_path, example_base, ["a", "b", "c"], each=8)
    (job,) = plan
    # What a fleet left that was killed: a run for a and b, under way.
    jobs.write(job, "train")
    tags = [dispatch.TAG, dispatch.OF_JOB.format(job.job.name), dispatch.OF_RUN.format(uuid4())]
    left = pool.add({"job_file": str(job.path), "stage": "train"}, tags, "of the fleet that was killed")
    pool.asked[left.id]["members"] = [member for member in job.job.customers if member.customer in "ab"]
    left.state = Running()

    todo, plan = planned(home, tmp_path, example_base, ["a", "b", "c"], each=8)
    dispatch.work_through(todo, plan, lambda _: None)
    assert todo.errors == {} and all(jobs.is_evaluated(member) for member in todo.members.values())
    assert pool.names() == [("train", "ab"), ("train", "c"), ("evaluate", "abc")], "nothing is trained twice"


def test_a_run_that_somebody_cancels_fails_its_customers_with_words_and_what_is_finished_is_kept(
    home: Home, tmp_path: Path, example_base: Path, pool: Pool
) -> None:
    from prefect.states import Cancelled

    from flows import dispatch

    todo, plan = planned(home, tmp_path, example_base, ["a", "b"], each=8)

    def works(run: "FlowRun", asked: dict[str, Any]) -> None:
        finish(pool, run, asked, only="a")
        if asked["stage"] == "train":
            run.state = Cancelled()

    pool.works = works
    dispatch.work_through(todo, plan, lambda _: None)
    assert {str(key): "was cancelled in Prefect" in error for key, error in todo.errors.items()} == {"b": True}
    assert pool.names() == [("train", "ab"), ("evaluate", "a")]
    assert json.loads(plan[0].path.with_name("part.json").read_text())["members"][0][0] == "a"


def test_a_job_of_another_run_that_is_at_work_on_a_customer_fails_that_customer_alone(
    home: Home, tmp_path: Path, example_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second lock: that of the job, which may be on another machine and outlive the run that asked for it."""
    import subprocess
    import sys

    from flows import launch

    todo, (job,) = planned(home, tmp_path, example_base, ["a", "b"], each=8)
    trained: list[str] = []

    def run_module(module: str, path: Path, *_rest: Any) -> None:
        whole = read_job(path)
        for member in whole.customers:
            trained.append(member.customer)
            write_prefix(whole, member)
            write_result(whole, member, "train", 0.0)

    monkeypatch.setattr(launch, "run_module", run_module)
    hold = (
        "import sys\nfrom pathlib import Path\nfrom flows.locks import holding\nfrom pipeline.home import Home\n"
        "from pipeline.keys import CustomerKey\n"
        "with holding(Home(Path(sys.argv[1])), [CustomerKey('a')], 'jobs') as busy:\n    print(busy, flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(home.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "set()\n"
    try:
        work.run_job(job, "train", logging.getLogger("job"))
    finally:
        other.communicate()
    todo.finished(job, job.job.customers, "train")
    assert trained == ["b"]
    assert {str(key): error for key, error in todo.errors.items()} == {"a": work._BUSY}
    work.run_job(job, "train", logging.getLogger("job"))
    assert trained == ["b", "a"], "the lock went with its holder"
