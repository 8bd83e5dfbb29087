"""One run of `maintain` over a fleet: what is registered that was left behind, which champions have fallen, what is removed that nobody needs.

In: a fleet file. Out: an `Upkeep` that says all of it. Everything is done under the locks of the customers whom it concerns: whoever is at work
on one keeps what it has. Knows nothing of Prefect, imports no torch.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import fleets, jobs, locks, work
from pipeline.config import Customer, PromptSettings
from pipeline.errors import ConfigError, PrefixFleetError, StorageError
from pipeline.evaluation.drift import Drop, drop_between
from pipeline.evaluation.metrics import METRICS
from pipeline.files import digest_of, read_json, whole_folder, write_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.leftovers import delete
from pipeline.queued import queue, unqueue
from pipeline.registry import ensure_store, lookup
from pipeline.registry.retention import (
    Registered,
    checked_backend,
    read_registered,
    recorded_score,
    surplus_runs,
    surplus_versions,
)
from pipeline.removal import Removal
from pipeline.stale import InUse, job_members, stale_files
from pipeline.training.job import JobCustomer, JobGate

Logger = logging.Logger | logging.LoggerAdapter[Any]
_BUSY = "a run is at work on this customer; the next maintain looks again."


@dataclass
class Drift:
    """What the rows that arrived since say of a customer's champion. Scores are in the unit of `metric`.

    `status` is `fallen` (queued for training), `holds`, `to judge` (of a dry run) or `failed`.
    """

    customer: str
    rows: int
    metric: str
    status: str
    recorded: float | None = None
    now: float | None = None
    drop: Drop | None = None
    error: str | None = None


@dataclass
class Upkeep:
    """What a run of `maintain` did, or would do.

    Attributes:
        registered: customer -> version, of prefixes that were left behind while MLflow was away; None in a dry run.
        drift: of every customer with enough new rows.
        removed: what is gone, or would be.
        left: what is not, and why.
        failed: what could not be done, and why.
    """

    fleet: str
    dry_run: bool
    registered: dict[str, int | None] = field(default_factory=dict)
    drift: list[Drift] = field(default_factory=list)
    removed: list[Removal] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        kept = ("kind", "name", "why", "size")
        return {
            "format": 1,
            "fleet": self.fleet,
            "dry_run": self.dry_run,
            "ok": not self.failed,
            "registered": self.registered,
            "drift": [dataclasses.asdict(one) for one in self.drift],
            "removed": [{name: getattr(one, name) for name in kept} for one in self.removed],
            "left": self.left,
            "failed": self.failed,
        }


def run_maintain(fleet_file: Path, logger: Logger, *, dry_run: bool = False) -> Upkeep:
    """Bring a fleet's stores into order.

    Args:
        fleet_file: see `pipeline.config`.
        logger: gets what the children print.
        dry_run: only say what would be done; writes nothing.

    Raises:
        ConfigError, BaseModelError: fleet file or base are unusable.
        RegistryError: MLflow does not answer.
    """
    home = Home.current()
    ensure_store(home)
    todo = work.open_work(fleet_file, None, home)
    work.survey(todo)
    done = Upkeep(todo.fleet.name, dry_run)
    _register_left_behind(todo, done)
    registered = read_registered()
    _judge_champions(todo, registered, done, logger)
    _remove(todo, registered, fleet_file, done)
    return done


# --- prefixes left behind


def _register_left_behind(todo: work.Work, done: Upkeep) -> None:
    """Those that lack nothing but their registration."""
    waiting = [key for key, due in todo.due.items() if tuple(due) == ("register",) and key in todo.members]
    if done.dry_run:
        done.registered = dict.fromkeys(map(str, waiting))
        return
    for key in waiting:
        with locks.holding(todo.home, [key]) as busy:
            if busy:
                done.left.append(f"{key}: is not registered yet: {_BUSY}")
                continue
            try:
                # Since everybody was looked at, somebody may have registered it, or something newer.
                now = work.look_again(todo, key)
                if tuple(now.due[key]) == ("register",) and key in now.members:
                    done.registered[str(key)] = work.register(now.members[key], todo.home).version
            except PrefixFleetError as error:
                done.failed.append(str(error))


# --- champions on rows that arrived since


@dataclass(frozen=True)
class _Judged:
    """A champion to judge, as a customer of a job, on the new rows of its own customer."""

    customer: Customer
    member: JobCustomer
    rows: int
    recorded: dict[str, float]


def _judge_champions(todo: work.Work, registered: Registered, done: Upkeep, logger: Logger) -> None:
    judged: dict[CustomerKey, _Judged] = {}
    with contextlib.ExitStack() as stack:  # of those who are judged, who are held until they are
        for customer in todo.customers:
            if customer.key in todo.forgotten or customer.retrain.when == "never":
                continue
            with contextlib.ExitStack() as own:
                if own.enter_context(locks.holding(todo.home, [customer.key])):
                    continue
                try:
                    found = _to_judge(todo, customer, registered, done)
                except PrefixFleetError as error:
                    done.drift.append(Drift(str(customer.key), 0, customer.evaluation.gate.metric, "failed", error=str(error)))
                    continue
                if found is not None:
                    judged[customer.key] = found
                    stack.enter_context(own.pop_all())
        if not judged:
            return
        work.say_where(todo, "the judging of champions", logger)
        # Beside the fleet's own jobs, whose checkpoints may be needed yet.
        fleet = todo.fleet.model_copy(update={"name": f"drift {todo.fleet.name}"})
        chosen = [one.customer for one in judged.values()]
        for planned in jobs.plan(fleet, chosen, {key: one.member for key, one in judged.items()}, todo.base, todo.home):
            members = jobs.due_in(planned, "evaluate")
            crash: str | None = None
            if members:
                try:
                    work.run_job(planned, "evaluate", logger)
                except PrefixFleetError as error:
                    crash = str(error)
            for member in planned.job.customers:
                one = judged[member.key]
                reason, _ = jobs.result_of(planned, member, "evaluate")
                done.drift.append(_verdict(todo.home, one, crash or reason if reason else None))
    done.failed += [f"{one.customer}: its champion could not be judged: {one.error}" for one in done.drift if one.error]


def _to_judge(todo: work.Work, customer: Customer, registered: Registered, done: Upkeep) -> _Judged | None:
    """The champion with the rows that it does not know; None if there is no champion, or too few of them."""
    from pipeline.data import is_prepared, prepare_fresh

    key, metric, known = customer.key, customer.evaluation.gate.metric, todo.home.prepared(customer.key)
    if "champion" not in registered.aliases.get(key, {}) or not (known / "card.json").is_file():
        return None
    if is_prepared(customer, todo.base, known):
        return None  # not a row has changed
    recorded = recorded_score(key, registered, metric)
    if recorded is None:
        return None  # imported, or judged by another metric: there is nothing to compare with
    champion = lookup(key, fresh=True)
    prefix = read_json(champion.prefix_dir / "prefix.json", 1)
    if prefix["base"]["digest"] != todo.base.digest:
        return None  # a new base makes everybody due
    own = Home(todo.home.drift(key))
    asked = customer.model_copy(
        update={
            "prompt": PromptSettings(**prefix["prompt"]),
            "prefix": customer.prefix.model_copy(update={"length": prefix["prefix"]["length"]}),
        }
    )
    if done.dry_run:
        with tempfile.TemporaryDirectory() as place:
            fresh = prepare_fresh(asked, todo.base, known, Path(place) / "prepared", customer.retrain.min_rows)
        if fresh is not None:
            rows = fresh.card["counts"]["test"]
            done.drift.append(Drift(str(key), rows, metric, "to judge", recorded["score"]))
        return None
    fresh = prepare_fresh(asked, todo.base, known, own.prepared(key), customer.retrain.min_rows)
    if fresh is None:
        return None
    member = _member(asked, fresh.card, prefix, champion.prefix_dir, todo, own)
    return _Judged(customer, member, fresh.card["counts"]["test"], recorded)


def _member(
    customer: Customer, card: dict[str, Any], prefix: dict[str, Any], folder: Path, todo: work.Work, own: Home
) -> JobCustomer:
    """The champion as evaluation takes a prefix, decoded as it is served; judged by the one metric that decides, against nothing."""
    model = todo.fleet.base_model
    member = jobs.job_customer(customer, card, todo.base, model.dtype, own, model.quantization)
    metric = customer.evaluation.gate.metric
    evaluation = dataclasses.replace(
        member.evaluation,
        **prefix.get("generation", {}),
        metrics=[metric],
        slices=[],
        prompt_baseline=False,
        gate=JobGate(metric, 0.0, None, None, None, None),
    )
    digest = digest_of([prefix["digest"], card["fingerprint"], dataclasses.asdict(evaluation), jobs.EVALUATION_VERSION])
    place = own.prefix(customer.key, prefix["digest"])
    if not (place / "prefix.json").is_file():
        with whole_folder(place) as temporary:
            shutil.copyfile(folder / "prefix.safetensors", temporary / "prefix.safetensors")
            # The scores on new rows are not those of the run that trained it.
            write_json(temporary / "prefix.json", {**prefix, "run_id": None})
    return dataclasses.replace(
        member,
        train_digest=prefix["digest"],
        evaluate_digest=digest,
        prepared=str(own.prepared(customer.key)),
        prefix_dir=str(place),
        evaluation_dir=str(own.evaluation(customer.key, digest)),
        evaluation=evaluation,
    )


def _verdict(home: Home, judged: _Judged, error: str | None) -> Drift:
    """What the scores say; whoever has fallen is queued, and whoever was queued and holds no longer is."""
    key, metric = judged.customer.key, judged.customer.evaluation.gate.metric
    drift = Drift(str(key), judged.rows, metric, "failed", judged.recorded["score"], error=error)
    if error is not None:
        return drift
    now = read_json(Path(judged.member.evaluation_dir) / "metrics.json", 1)["scores"]["prefix"][metric]
    drift.now, drift.drop = now["score"], drop_between(judged.recorded, now, METRICS[metric].better)
    drift.status = "fallen" if drift.drop.low > judged.customer.retrain.max_drop else "holds"
    if drift.status == "fallen":
        figures = {
            "metric": metric,
            "rows": judged.rows,
            "recorded": judged.recorded,
            "now": now,
            "drop": dataclasses.asdict(drift.drop),
        }
        queue(home, key, {**figures, "found": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    else:
        unqueue(home, key)
    return drift


# --- what nobody needs


def _remove(todo: work.Work, registered: Registered, fleet_file: Path, done: Upkeep) -> None:
    rule, now = todo.fleet.retention, time.time()
    backend = checked_backend(os.environ.get("MLFLOW_BACKEND_STORE_URI") or None)
    keys = [customer.key for customer in todo.customers if customer.key not in todo.forgotten]
    others = fleets.neighbours(todo.home, todo.fleet, fleet_file, rule.days, now)
    gone = others.gone
    members = {key: {member.train_digest} for key, member in todo.members.items()}
    in_use = InUse({key: registered.digests(key) | members.get(key, set()) for key in keys}, gone, others.shared)
    whose = {*keys, *gone}
    plan = [
        *surplus_versions(registered, whose, rule.versions, rule.days, now, todo.home, backend),
        *surplus_runs(registered, whose, _members_of(todo), _named_runs(todo.home, in_use), rule.days, now, todo.home, backend),
        *stale_files(todo.home, in_use, rule.days, rule.checkpoints_days, now),
    ]
    if done.dry_run:
        done.removed = plan
        return
    count = work.Counter("maintain", len(plan))
    for removal in plan:
        # A job on another machine outlives the run that asked for it.
        with locks.holding(removal.home, removal.keys) as busy, locks.holding(removal.home, removal.keys, "jobs") as at_work:
            if busy | at_work:
                done.left.append(f"{removal.name}: {_BUSY}")
            else:
                _carry_out(removal, done)
        count.step()
    fleets.note(todo.home, todo.fleet, fleet_file, todo.forgotten, gone)
    for note in others.ended:
        delete(note)


def _carry_out(removal: Removal, done: Upkeep) -> None:
    try:
        left = removal.remove()
    except PrefixFleetError as error:
        done.failed.append(f"{removal.name}: {error}")
        return
    if left is None:
        done.removed.append(removal)
    else:
        done.left.append(left)


def _members_of(todo: work.Work) -> Callable[[str], set[CustomerKey] | None]:
    """See `pipeline.registry.retention.surplus_runs`."""
    return lambda job: set(job_members(todo.home.job(job))) if jobs.is_of(todo.fleet.name, job) else None


def _named_runs(home: Home, in_use: InUse) -> set[str]:
    """The MLflow runs of prefixes on this machine that may yet be registered."""
    runs = set()
    for key, digests in in_use.digests.items():
        folders = []
        for digest in digests:
            with contextlib.suppress(ConfigError):  # a version of somebody else has no digest
                folders.append(home.prefix(key, digest))
        if key in in_use.shared:  # all, for the other fleet's settings are not known here
            folders += key.below(home.root, "prefixes").glob("*/")
        for folder in folders:
            with contextlib.suppress(StorageError):
                runs.add(str(read_json(folder / "prefix.json", 1).get("run_id")))
    return runs
