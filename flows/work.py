"""One run over a fleet: whose stages are due, what became of them, and the table at the end.

The stages themselves are in `pipeline`; the Prefect flows and the stage commands both drive a `Work`. Knows nothing of Prefect, imports no torch.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import events, fleets, jobs, launch, locks, notes, reasons
from pipeline.base import BaseModelInfo, resolve_base
from pipeline.config import Customer, Fleet, load_fleet
from pipeline.errors import ConfigError, EvaluationError, PrefixFleetError
from pipeline.files import digest_of, read_json, write_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.queued import is_queued, unqueue
from pipeline.training.job import JobCustomer

if TYPE_CHECKING:
    from pipeline.registry import Held

log = logging.getLogger(__name__)
# How often a job that stopped at a checkpoint is started again: halved so many times, any budget of tokens is one.
_RESUMPTIONS = 14

_FEW = 50
_UNKNOWN = "is not in the fleet file. If it was removed there, `prefixfleet deploy FLEET.yaml` takes it out of the schedules. If not, correct it"
_BUSY = "another run is at work on this customer, or `maintain` is judging its champion; wait for it or stop it"

_preparing = threading.Lock()


@dataclass
class Row:
    """One customer in the table at the end. Scores are in the unit of `metric`; the champion is the one that this prefix was compared with.

    `status` is `done` (something was done), `unchanged`, `waiting` (for an hour of its own), `failed` or `forgotten`; `why` is why something was due;
    `seconds` are those of this run; `score` holds `score`, `low` and `high`; `signature` says how it was computed.
    `overlap` counts the inputs that stand in two ready-made splits, as `train/test`: only those that are not zero.
    """

    key: str
    rows_used: int | None = None
    quarantined: int | None = None
    metric: str = ""
    signature: str = ""
    base_score: float | None = None
    champion_score: float | None = None
    score: dict[str, float] | None = None
    decision: str | None = None
    reasons: list[str] = field(default_factory=list)
    version: int | None = None
    alias: str | None = None
    report: Path | None = None
    seconds: float = 0.0
    status: str = "unchanged"
    why: str = ""
    error: str | None = None
    overlap: dict[str, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a run came to."""

    fleet: str
    rows: list[Row]
    stage_seconds: dict[str, float]
    report: Path | None
    home: Path

    @property
    def failed(self) -> list[Row]:
        """The customers that did not get through."""
        return [row for row in self.rows if row.status == "failed"]


@dataclass(frozen=True)
class Prepared:
    """What stage 1 gave for one customer."""

    card: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Registered:
    """What stage 4 gave for one customer."""

    version: int
    alias: str | None
    seconds: float


class Counter:
    """The bar of a stage that goes through customers one by one."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, -1
        self.step()

    def step(self) -> None:
        """One more customer is through."""
        self.done += 1
        if self.total:
            events.emit({"stage": self.stage, "done": self.done, "total": self.total, "unit": "customers"})


@dataclass
class Work:
    """The customers of one run and what is known of them so far.

    Attributes:
        due: the stages that must run, for each customer.
        why: why they must, in words (see `flows.reasons`).
        waiting: customers with an hour of their own that has not come, and that hour. Nothing is due for them.
        members: settings with digests and folders, for customers whose data is prepared.
        errors: why a customer went no further.
        forgotten: customers that are not to be trained again, with the time when they were forgotten.
        named: whether somebody asked for these customers by name, and not for the fleet.
        scheduled: whether that somebody was a schedule, which may be older than the fleet file.
        unknown: names asked for that are not in the fleet file.
        seconds: time spent on a customer.
        file: the fleet file.
    """

    fleet: Fleet
    customers: tuple[Customer, ...]
    base: BaseModelInfo
    home: Home
    named: bool = False
    scheduled: bool = False
    unknown: tuple[str, ...] = ()
    due: dict[CustomerKey, tuple[str, ...]] = field(default_factory=dict)
    why: dict[CustomerKey, str] = field(default_factory=dict)
    waiting: dict[CustomerKey, datetime] = field(default_factory=dict)
    forgotten: dict[CustomerKey, str] = field(default_factory=dict)
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    cards: dict[CustomerKey, dict[str, Any]] = field(default_factory=dict)
    members: dict[CustomerKey, JobCustomer] = field(default_factory=dict)
    errors: dict[CustomerKey, str] = field(default_factory=dict)
    seconds: dict[CustomerKey, float] = field(default_factory=dict)
    versions: dict[CustomerKey, tuple[int | None, str | None]] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    file: Path = Path()

    def __post_init__(self) -> None:
        self._by_key = {customer.key: customer for customer in self.customers}

    def is_due(self, stage: str) -> list[Customer]:
        """The customers for whom `stage` is due and who have not failed yet."""
        return [c for c in self.customers if stage in self.due.get(c.key, ()) and c.key not in self.errors]

    def fail(self, key: CustomerKey, stage: str, error: BaseException | str) -> None:
        """Note that a customer goes no further."""
        text = str(error) if isinstance(error, PrefixFleetError | str) else f"{type(error).__name__}: {error}"
        if isinstance(error, BaseException) and not isinstance(error, PrefixFleetError):
            log.error("%s of %s failed", stage, key, exc_info=error)
        self.errors[key] = text
        events.emit({"stage": stage, "customer": str(key), "status": "failed", "text": text})

    def took(self, key: CustomerKey, seconds: float) -> None:
        """Add to a customer's time."""
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time meanwhile to the stage's."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + time.monotonic() - start

    def prepared(self, key: CustomerKey, result: Prepared) -> None:
        """Note that a customer's data is prepared: now it is known what its prefix and evaluation depend on."""
        self.took(key, result.seconds)
        self.cards[key] = result.card
        model = self.fleet.base_model
        self.members[key] = jobs.job_customer(
            self._by_key[key], result.card, self.base, model.dtype, self.home, model.quantization
        )

    def registered(self, key: CustomerKey, result: Registered) -> None:
        """Note that a customer's prefix is in the registry."""
        self.took(key, result.seconds)
        self.versions[key] = (result.version, result.alias)

    def plan(self) -> list[jobs.PlannedJob]:
        """The jobs for everybody who must be trained or evaluated."""
        due = {
            key: member
            for key, member in self.members.items()
            if self.due.get(key) and key not in self.errors and not (jobs.is_trained(member) and jobs.is_evaluated(member))
        }
        return jobs.plan(self.fleet, self.customers, due, self.base, self.home)

    def finished(
        self, planned: jobs.PlannedJob, members: list[JobCustomer], stage: str, crash: BaseException | None = None
    ) -> None:
        """Note what became of the customers of a job in `train` or `evaluate`; `crash` is the error of the whole process."""
        for member in members:
            reason, seconds = jobs.result_of(planned, member, stage)
            self.took(member.key, seconds)
            if reason is not None:
                self.fail(member.key, stage, crash if crash is not None else reason)

    def name(self) -> str:
        """What a run of this work is called, once it is known what is due."""
        did = {str(key): (reasons.action(due, self._known(key)), self.why.get(key, "")) for key, due in self.due.items() if due}
        who = str(self.customers[0].key) if len(self.customers) == 1 else self.fleet.name
        return reasons.run_name(who, date.today().isoformat(), did, len(self.customers))

    def _known(self, key: CustomerKey) -> bool:
        return (self.home.root / "prefixes" / key.customer / key.task).is_dir() or key in self.versions

    def ready_to_register(self, among: Iterable[JobCustomer] | None = None) -> list[JobCustomer]:
        """Those evaluated whose version is not in the registry as it should be."""
        members = [self.members[c.key] for c in self.customers if c.key in self.members] if among is None else among
        due = [member for member in members if "register" in self.due.get(member.key, ()) and member.key not in self.errors]
        return [member for member in due if jobs.is_evaluated(member)]


def open_work(
    fleet_file: Path | str,
    wanted: list[str] | None = None,
    home: Home | None = None,
    change: Callable[[Fleet], Fleet] | None = None,
    strict: bool = True,
) -> Work:
    """Read the fleet file and find the base; `change` is made to the fleet in between. Unless `strict`, names that are not in the file are noted as
    long as one is.

    Raises:
        ConfigError: the fleet file is wrong, or names no customer of `wanted`.
        BaseModelError: there is no such base.
    """
    fleet = load_fleet(fleet_file)
    if change is not None:
        fleet = change(fleet)
    known = wanted or []
    unknown: tuple[str, ...] = ()
    if not strict:
        names = {name for customer in fleet.customers for name in (customer.id, f"{customer.id}/{customer.task}")}
        if found := [name for name in known if name in names]:
            known, unknown = found, tuple(dict.fromkeys(name for name in known if name not in names))
    customers = fleet.select(known)
    for config in {customer.launch.model_dump_json(exclude_unset=True): customer.launch for customer in customers}.values():
        launch.config_file(config)
    home = home or Home.current()
    base = resolve_base(fleet.base_model.path, fleet.base_model.revision, home.root / "cache" / "base_digests.json")
    home.identity()  # which training marks its MLflow runs with
    return Work(fleet, customers, base, home, named=bool(wanted), unknown=unknown, file=Path(fleet_file))


def open_one(fleet_file: Path | str, customer: str, home: Home | None = None) -> tuple[Work, Customer]:
    """`open_work` for what is about one task of one customer.

    Raises:
        ConfigError: as `open_work`, or the customer has several tasks, or was forgotten.
        BaseModelError: there is no such base.
    """
    todo = open_work(fleet_file, [customer], home)
    if len(todo.customers) > 1:
        raise ConfigError(f"{customer} has {len(todo.customers)} tasks; name one as {customer}/TASK.")
    (one,) = todo.customers
    leave_forgotten(todo)
    if one.key in todo.errors:
        raise ConfigError(todo.errors[one.key])
    return todo, one


def survey(work: Work) -> None:
    """Fill `work.due` from what lies on disk and in the registry, which must be set up (`ensure_store`). Changes nothing.

    Raises:
        RegistryError: MLflow failed.
    """
    from pipeline.data import prepared_card

    known = _registered_versions(work)
    leave_forgotten(work)
    for customer in work.customers:
        key, folder = customer.key, work.home.prepared(customer.key)
        if key in work.forgotten:
            continue
        work.due[key] = jobs.STAGES
        # What is wrong with the data is said in full by the stage itself, which is the one to fail.
        with contextlib.suppress(Exception):
            card = prepared_card(customer, work.base, folder)
            if card is not None:
                work.prepared(key, Prepared(card, 0.0))
        receipt = _read_receipt(work.home, key)
        if key in work.members:
            work.due[key] = _due(work, key, known.get(key), receipt)
        elif _leaves_new_data(work, customer, known.get(key)):
            _as_before(work, key, known.get(key), receipt)
        if not work.due[key]:
            continue
        if key in work.members:
            work.why[key] = reasons.unmade(work.members[key], work.base, work.home, receipt, key in known)
        else:
            work.why[key] = reasons.unprepared(customer, work.base, work.home, receipt)
        hour = None if work.named else notes.hour_to_come(work.home, customer, work.began)
        if hour is not None:
            work.due[key], work.waiting[key] = (), hour


def say_where(work: Work, what: str, logger: "logging.Logger | logging.LoggerAdapter[Any]") -> None:
    """Say so if customers name a work pool for their jobs and what is about to start runs in this process all the same."""
    pools = sorted({customer.launch.work_pool for customer in work.customers if customer.launch.work_pool is not None})
    if pools:
        logger.warning(
            "launch.work_pool: %s runs on this machine and not on %s, which is for jobs of a fleet", what, ", ".join(pools)
        )


def look_again(work: Work, key: CustomerKey) -> Work:
    """One customer of `work`, surveyed anew: what is due may have changed before its lock was held.

    Raises:
        RegistryError: MLflow failed.
    """
    (customer,) = (customer for customer in work.customers if customer.key == key)
    one = Work(work.fleet, (customer,), work.base, work.home, file=work.file)
    survey(one)
    return one


def _leaves_new_data(work: Work, customer: Customer, known: "Held | None") -> bool:
    """Whether changed data alone is no reason to train this customer, who has a champion: its `retrain` says so, and nothing has fallen."""
    if customer.retrain.when == "data" or known is None or known.champion_version is None:
        return False
    return customer.retrain.when == "never" or not is_queued(work.home, customer.key)


def _as_before(work: Work, key: CustomerKey, known: "Held | None", receipt: dict[str, Any] | None) -> None:
    """Take a customer's data as it was when it was prepared, if then nothing is due. If anything else has changed too, it is prepared anew."""
    from pipeline.data import read_card

    with contextlib.suppress(PrefixFleetError):
        work.prepared(key, Prepared(read_card(work.home.prepared(key)), 0.0))
        if not _due(work, key, known, receipt):
            work.due[key] = ()
            return
        del work.cards[key], work.members[key]
        work.versions.pop(key, None)


def leave_forgotten(work: Work) -> None:
    """Note who was forgotten: of a fleet or a schedule they are left out and reported, but who asks for one by name is told that it failed.

    Raises:
        RegistryError: MLflow failed.
    """
    from pipeline.registry import forgotten_customers
    from pipeline.registry.tombstones import sentence

    forgotten = forgotten_customers()
    for customer in work.customers:
        if customer.id in forgotten:
            work.due[customer.key] = ()
            work.forgotten[customer.key] = forgotten[customer.id]
            if work.named and not work.scheduled:
                work.fail(customer.key, jobs.STAGES[0], sentence(customer.id, forgotten[customer.id]))


@contextlib.contextmanager
def alone(work: Work, again: str | None = None) -> Iterator[None]:
    """Keep other runs from the customers of this one meanwhile, and `survey` them. Those that another run holds and that are due here fail.

    Args:
        work: the run's work.
        again: the id of a run that trains them all again although nothing has changed, but for those who fail here and the forgotten.

    Raises:
        StorageError, RegistryError: see `flows.locks.holding` and `survey`.
    """
    with locks.holding(work.home, [customer.key for customer in work.customers]) as busy:
        if again is not None:
            from pipeline.registry import forgotten_customers

            forgotten = forgotten_customers()
            for customer in work.customers:
                if customer.key not in busy and customer.id not in forgotten:
                    notes.ask_again(work.home, customer.key, again)
        survey(work)
        fleets.note(work.home, work.fleet, work.file, work.forgotten)
        for key in sorted(busy):
            if work.due[key] or (again is not None and key not in work.forgotten):
                work.fail(key, (work.due[key] or jobs.STAGES)[0], _BUSY)
        yield


def _due(work: Work, key: CustomerKey, known: "Held | None", receipt: dict[str, Any] | None) -> tuple[str, ...]:
    """The stages due for a customer whose data is prepared; `known` is its newest registered version, `receipt` what was registered last."""
    member = work.members[key]
    due = [stage for stage, done in (("train", jobs.is_trained(member)), ("evaluate", jobs.is_evaluated(member))) if not done]
    version = None if due else _registered_version(member, known, receipt)
    if version is None or known is None:
        return (*due, "register")
    held = {known.challenger_version: "challenger", known.champion_version: "champion"}
    work.versions[key] = (version, held.get(version))
    return ()


def _registered_versions(work: Work) -> "dict[CustomerKey, Held]":
    from pipeline.registry import held

    # One question for the whole fleet, or one for each of a few customers.
    everybody = len(work.customers) == len(work.fleet.customers) or len(work.customers) > _FEW
    return held(None if everybody else [c.key for c in work.customers])


def _registered_version(member: JobCustomer, known: "Held | None", receipt: dict[str, Any] | None) -> int | None:
    """The version that stage 4 has made of this evaluation in the store in use, if that was the last thing it did for this customer.

    The receipt tells a registration that was interrupted before its alias was set from one whose alias somebody has moved since; the store tells
    whether the version still is where the receipt says.
    """
    from pipeline.registry import find

    if known is None or receipt is None:
        return None
    version = receipt.get("version")
    wanted = _receipt_content(member, version)
    if {name: receipt.get(name) for name in wanted} != wanted:
        return None
    newest = known.fingerprint == member.train_digest
    return version if version == (known.version if newest else find(member.key, member.train_digest)) else None


def _receipt(home: Home, key: CustomerKey) -> Path:
    """What was registered last for a customer. One, so that it says which of two settings between which somebody goes back and forth."""
    return key.below(home.root, "registered").with_suffix(".json")


def _read_receipt(home: Home, key: CustomerKey) -> dict[str, Any] | None:
    try:
        return read_json(_receipt(home, key), 1)
    except PrefixFleetError:  # none, or damaged
        return None


def _receipt_content(member: JobCustomer, version: Any) -> dict[str, Any]:
    from pipeline.registry.store import shown_uri

    return {
        "format": 1,
        "store": shown_uri(),
        "name": member.key.model_name,
        "version": version,
        "train_digest": member.train_digest,
        "evaluate_digest": member.evaluate_digest,
    }


def prepare(customer: Customer, base: BaseModelInfo, home: Home) -> Prepared:
    """Stage 1 for one customer."""
    from pipeline.data import prepare as prepare_data

    # Two threads that import transformers at once fail (lazy modules, 5.23), and a tokenizer in use by another raises "Already borrowed". It
    # spreads over the cores by itself.
    with _preparing:
        start = time.monotonic()
        card = prepare_data(customer, base, home.prepared(customer.key)).card
        return Prepared(card, time.monotonic() - start)


def run_job(
    planned: jobs.PlannedJob,
    stage: str,
    logger: "logging.Logger | logging.LoggerAdapter[Any]",
    on_event: Callable[[dict[str, Any]], None] = events.emit,
) -> None:
    """Stage 2 or 3 for the customers of one job, in a child process. Nothing is launched if nobody is due any more.

    A customer on whom the job of another run is at work (on another machine, or of a run that was killed) fails. Who was forgotten since the job was
    asked for leaves it without a trace.

    Raises:
        ProcessPaused, ProcessCrash, TrainingError, EvaluationError: see `flows.launch.run_module`.
    """
    keys = [member.key for member in jobs.due_in(planned, stage)]
    # Below the home that the job is in, which may be that of a sweep.
    with locks.holding(Home(planned.path.parents[2]), keys, "jobs") as busy:
        # Asked under the lock that `forget` takes: nobody is forgotten from here on.
        _run_job(_without_forgotten(planned, logger), stage, dict.fromkeys(busy, _BUSY), logger, on_event)


def _without_forgotten(planned: jobs.PlannedJob, logger: "logging.Logger | logging.LoggerAdapter[Any]") -> jobs.PlannedJob:
    from pipeline.registry import forgotten_customers

    try:
        forgotten = forgotten_customers()
    except PrefixFleetError as error:  # MLflow is away: training needs nothing of it, and nobody forgotten is registered
        logger.warning("whether somebody of the job was forgotten is not known: %s", error)
        return planned
    left = [member for member in planned.job.customers if member.customer not in forgotten]
    if len(left) == len(planned.job.customers):
        return planned
    logger.warning("%s customers of the job were forgotten since and leave it", len(planned.job.customers) - len(left))
    return dataclasses.replace(planned, job=dataclasses.replace(planned.job, customers=left))


def _run_job(
    planned: jobs.PlannedJob,
    stage: str,
    busy: dict[CustomerKey, str],
    logger: "logging.Logger | logging.LoggerAdapter[Any]",
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    module = "pipeline.training" if stage == "train" else "pipeline.evaluation"
    for left in reversed(range(_RESUMPTIONS)):
        members = jobs.due_in(planned, stage)
        champions, failed = _champions([member for member in members if member.key not in busy], stage)
        failed |= {member.key: busy[member.key] for member in members if member.key in busy}
        if members:
            jobs.write(planned, stage, champions, failed)
        if len(members) == len(failed):
            return
        try:
            launch.run_module(module, planned.path, planned.launch, on_event, logger)
            return
        except launch.ProcessPaused as paused:
            if not left:
                raise
            logger.info("%s Starting it again.", paused)


def _champions(members: list[JobCustomer], stage: str) -> tuple[dict[CustomerKey, Path], dict[CustomerKey, str]]:
    """The prefixes that customers with `init_prefix: champion` start from or all are compared with, and why those fail whose champion cannot
    be had.

    Whoever has no champion yet is in neither.
    """
    from pipeline.registry import lookup, status
    from pipeline.registry.versions import CHAMPION

    keys = [member.key for member in members if stage == "evaluate" or member.prefix.init_prefix == CHAMPION]
    found: dict[CustomerKey, Path] = {}
    failed: dict[CustomerKey, str] = {}
    try:
        held = [known.key for known in status(keys) if known.champion_version is not None] if keys else []
    except PrefixFleetError as error:  # MLflow is away: those who need nothing of it go on
        return {}, dict.fromkeys(keys, str(error))
    for key in held:
        try:
            found[key] = lookup(key, fresh=True).prefix_dir
        except Exception as error:  # of whatever kind: the other customers are not to suffer
            if not isinstance(error, PrefixFleetError):
                log.error("looking up the champion of %s failed", key, exc_info=error)
            reason = str(error) if isinstance(error, PrefixFleetError) else f"{type(error).__name__}: {error}"
            # Who starts from a champion has asked for it; that it is compared with one must be said.
            failed[key] = reason if stage == "train" else f"its champion cannot be had: {reason}"
    return found, failed


def register(member: JobCustomer, home: Home) -> Registered:
    """Stage 4 for one customer."""
    from pipeline.registry import register as register_prefix

    start = time.monotonic()
    receipt = _receipt(home, member.key)
    # From here on the old one may be untrue: the alias moves before the new one is written.
    with contextlib.suppress(OSError):
        receipt.unlink(missing_ok=True)
    registration = register_prefix(Path(member.prefix_dir), Path(member.evaluation_dir))
    write_json(receipt, {**_receipt_content(member, registration.version), **reasons.receipt_words(member, home)})
    unqueue(home, member.key)
    return Registered(registration.version, registration.alias, time.monotonic() - start)


def run_stage(work: Work, stage: str, logger: logging.Logger) -> None:
    """One stage for everybody for whom it is due, one after another. Needs what the stage before wrote.

    Customers for whom an earlier stage is due fail, and are told so.
    """
    before = jobs.STAGES[: jobs.STAGES.index(stage)]
    for customer in work.customers:
        missing = [name for name in before if name in work.due[customer.key]]
        if missing and customer.key not in work.errors:
            work.fail(
                customer.key,
                stage,
                f"{missing[0]} has not been done for what the fleet file says now. `prefixfleet {missing[0]}` does it.",
            )
    with work.timed(stage):
        if stage in ("prepare", "register"):
            _one_by_one(work, stage)
        else:
            for planned in work.plan():
                members = jobs.due_in(planned, stage)
                crash: BaseException | None = None
                try:
                    run_job(planned, stage, logger)
                except PrefixFleetError as error:
                    crash = error
                work.finished(planned, members, stage, crash)
    if stage in ("evaluate", "register"):
        log_evaluations(work)


def log_evaluations(work: Work) -> None:
    """Log to MLflow what evaluations it does not have: their process was killed before it did, or MLflow was away."""
    from pipeline.evaluation.tracking import is_logged, log_evaluation

    for key, member in work.members.items():
        folder = Path(member.evaluation_dir)
        if key in work.errors or not jobs.is_evaluated(member) or is_logged(folder):
            continue
        try:
            run_id = read_json(Path(member.prefix_dir) / "prefix.json", 1)["run_id"]
            if run_id is not None:
                log_evaluation(run_id, read_json(folder / "metrics.json", 1), folder)
        except EvaluationError as error:
            log.warning("%s: %s", key, error)
        except Exception as error:  # of whatever kind: the evaluation stands, and the next run tries again
            log.warning("%s: its evaluation could not be logged: %s. No more are logged by this run.", key, error)
            return


def _one_by_one(work: Work, stage: str) -> None:
    customers = work.is_due(stage)
    count = Counter(stage, len(customers))
    for customer in customers:
        try:
            if stage == "prepare":
                work.prepared(customer.key, prepare(customer, work.base, work.home))
            else:
                work.registered(customer.key, register(work.members[customer.key], work.home))
        except Exception as error:  # of whatever kind: the other customers are not to suffer
            work.fail(customer.key, stage, error)
        count.step()


def outcome(work: Work) -> Outcome:
    """The table, and the fleet's report as a page. Notes who has been looked at and left in order."""
    for customer in work.customers:
        through = not work.due.get(customer.key) or customer.key in work.versions
        if through and customer.key not in work.errors and customer.key not in work.waiting:
            notes.looked(work.home, customer, work.began)
            if is_queued(work.home, customer.key):  # its data is what its prefix was made of: there is nothing to retrain it on
                unqueue(work.home, customer.key)
    rows = [_row(work, customer) for customer in work.customers]
    page = _page(work)
    report: Path | None = page
    try:
        from pipeline.evaluation.report import fleet_report

        of_file = None if work.fleet.file is None else str(work.fleet.file)
        fleet_report([vars(row) for row in rows if row.status != "forgotten"], page, of_file)
    except PrefixFleetError as error:
        # The work is done and registered: a page that could not be written must not make it look otherwise.
        log.warning("the fleet report could not be written: %s", error)
        report = None
    # Not on the page, which keeps to keys that are customers'.
    rows += [Row(name, status="failed", error=_UNKNOWN) for name in work.unknown]
    return Outcome(work.fleet.name, rows, work.stage_seconds, report, work.home.root)


def _page(work: Work) -> Path:
    """The page of the fleet's report: another fleet file of the same name has its own."""
    page = work.home.root / "reports" / f"{jobs.distinct(work.fleet.name)}.html"
    with contextlib.suppress(PrefixFleetError):  # none yet, or damaged
        before = read_json(page.with_suffix(".json"), 1).get("fleet_file")
        if before not in (None, str(work.fleet.file)):
            return page.with_name(f"{page.stem}-{digest_of(str(work.fleet.file))[:6]}.html")
    return page


def _row(work: Work, customer: Customer) -> Row:
    key = customer.key
    row = Row(str(key), metric=customer.evaluation.gate.metric, seconds=work.seconds.get(key, 0.0), error=work.errors.get(key))
    row.status = "failed" if row.error else "done" if work.seconds.get(key) else "unchanged"
    row.why = work.why.get(key, "")
    if key in work.waiting and not row.error:
        row.status, row.why = "waiting", f"{row.why}, at {work.waiting[key]:%Y-%m-%d %H:%M %Z}"
    if key in work.forgotten and not row.error:
        row.status = "forgotten"
    row.version, row.alias = work.versions.get(key, (None, None))
    card, member = work.cards.get(key), work.members.get(key)
    if card is not None:
        row.rows_used, row.quarantined = card["counts"]["used"], card["counts"]["quarantined"]
        row.overlap = {splits: count for splits, count in card.get("overlap", {}).items() if count}
    if member is not None and jobs.is_evaluated(member):
        try:
            _judge(row, Path(member.evaluation_dir))
        except (PrefixFleetError, KeyError, TypeError) as error:
            named = isinstance(error, PrefixFleetError)
            reason = str(error) if named else f"{member.evaluation_dir}: is damaged ({error!r}). Delete it and run again."
            row.status, row.error = "failed", row.error or reason
    return row


def _judge(row: Row, folder: Path) -> None:
    """Put the scores and the decision of the evaluation in `folder` into `row`."""
    metrics, decision = read_json(folder / "metrics.json", 1), read_json(folder / "decision.json", 1)
    base, score = metrics["scores"]["base"][row.metric]["score"], metrics["scores"]["prefix"][row.metric]
    champion = metrics["scores"].get("champion")
    row.champion_score = None if champion is None else champion[row.metric]["score"]
    row.base_score, row.score = base, {name: score[name] for name in ("score", "low", "high")}
    row.signature = str(metrics["signatures"].get(row.metric, ""))
    row.decision, row.reasons, row.report = decision["decision"], list(decision["reasons"]), folder / "report.html"
