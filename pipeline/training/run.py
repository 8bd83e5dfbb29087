"""Train the customers of a job, many at once on one loaded base: the queue, what is written, and what survives a kill.

In: a job. Out: a prefix and a result for each customer, metrics, and checkpoints on the way. One customer's failure is that customer's. How a step
is computed is in `pipeline.training.mixed`, what a customer is in `pipeline.training.resident`.
"""

import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout

from pipeline.data import Record, read_card, read_split
from pipeline.data.prompt import load_tokenizer
from pipeline.errors import ConfigError, DataError, PrefixFleetError, StorageError, TrainingError
from pipeline.files import is_whole, write_text
from pipeline.home import identity_above
from pipeline.keys import CustomerKey
from pipeline.prefix import FrozenBase, load_base, save_prefix
from pipeline.prefix.base import choose_dtype
from pipeline.prefix.parameterise import parameterise
from pipeline.process import code_version, peak_memory_bytes
from pipeline.progress import Progress
from pipeline.sizes import gib
from pipeline.training.batches import tokens_of
from pipeline.training.checkpoint import (
    Checkpoint,
    Shortage,
    State,
    delete_checkpoint,
    note_shortage,
    noted_shortage,
    read_checkpoint,
    sweep,
    write_checkpoint,
)
from pipeline.training.engines import Engine, chosen, processes
from pipeline.training.fit import fit
from pipeline.training.job import Job, JobCustomer
from pipeline.training.mixed import Interrupted, Mixed, OutOfMemoryAlone, Report
from pipeline.training.plan import refuse_what_cannot_fit
from pipeline.training.resident import Resident
from pipeline.training.results import PREFIX_FILES, write_result
from pipeline.training.tracking import Run, Tracker

_WAIT_SECONDS = 30.0  # for another process on the same job to end
_FLUSH_SECONDS = 30.0  # for the last metrics to reach MLflow at the end of a job
_PAUSE_SECONDS = 3.0  # and when it was asked to stop: whoever asked will not wait long

# How long a process waits for the others in an exchange before it gives the job up: longer than the first one takes to write a checkpoint or to read
# a base from a slow disk while the others are through with theirs.
_PATIENCE_SECONDS = 900.0


class Paused(Exception):
    """The job was asked to stop, or ran out of memory beside other processes: its checkpoint is written, and the same command goes on from it."""


@dataclass
class _Member:
    """A customer while it is in the job, with its files; `metrics` and `run` exist in the first process only."""

    customer: JobCustomer
    resident: Resident
    card: dict[str, Any]
    parent: str | None
    metrics: "_MetricsFile | None" = None
    run: Run | None = None

    @property
    def key(self) -> CustomerKey:
        return self.customer.key

    def state(self) -> State:
        tensors, plain = self.resident.state()
        where = {"train_digest": self.customer.train_digest, "prefix_dir": self.customer.prefix_dir}
        return tensors, {**where, "parent": self.parent, **plain}

    def close(self, status: str | None) -> None:
        """End its metrics; None leaves the MLflow run open for whoever goes on."""
        if self.metrics is not None:
            self.metrics.close()
        if self.run is not None:
            self.run.close(status)


def run_job(job: Job, asked_to_stop: Callable[[], bool] = lambda: False, device_memory: int | None = None) -> int:
    """Train every customer whose prefix does not exist yet, and write a result for each.

    Args:
        job: what to do.
        asked_to_stop: looked at between micro-batches.
        device_memory: bytes of each device, into which the job is made to fit before the base is loaded; by default nothing is planned.

    Returns:
        the number of customers that failed.

    Raises:
        Paused: see there.
        StorageError: a checkpoint cannot be written or read. The last good one stays.
        BaseModelError, ConfigError: nothing of the job can be done.
    """
    _join_after_restart(os.environ)
    accelerator = processes(timedelta(seconds=_PATIENCE_SECONDS))
    with ExitStack() as stack:
        folder = Path(job.folder)
        if accelerator.is_main_process:
            stack.enter_context(_only_one(folder))
        accelerator.wait_for_everyone()
        saved = read_checkpoint(folder)
        # What the first process sees holds for all: another one may look when a file has just come.
        trained = _of_first([is_whole(Path(c.prefix_dir), PREFIX_FILES) for c in job.customers], accelerator)
        due = [customer for customer, done in zip(job.customers, trained, strict=True) if not done]
        if accelerator.is_main_process:
            sweep(folder, saved)
            for customer, done in zip(job.customers, trained, strict=True):
                if done:
                    write_result(job, customer, "train", time.monotonic())
        if not due:
            if accelerator.is_main_process and saved is not None and all(key is None for key in saved.slots) and not saved.parked:
                delete_checkpoint(folder)
            return 0
        if job.base.quantization == "int8" and job.mixing.slots > 1:
            raise ConfigError(
                f"{folder}: slots is {job.mixing.slots}, but LLM.int8 treats a column as large that is large in any row of a batch, so "
                "customers would touch one another. Set slots to 1 (launch.slots in a fleet file), or quantization: int4."
            )
        dtype = choose_dtype(job.base.dtype, accelerator.device)
        engine = chosen(accelerator, dtype)
        _refuse_too_small_devices(job, engine, accelerator, dtype)
        refused: dict[CustomerKey, str] = {}
        if device_memory is not None:
            job, due, refused = _fitted(job, due, engine, accelerator, device_memory)
            if not due:
                return len(refused)
        base = load_base(job.base, accelerator.device, engine.place)
        return _Training(job, due, base, accelerator, engine, asked_to_stop, saved, stack).work() + len(refused)


def _fitted(
    job: Job, due: list[JobCustomer], engine: Engine, accelerator: Accelerator, memory: int
) -> tuple[Job, list[JobCustomer], dict[CustomerKey, str]]:
    """The job and those due, made to fit the devices; the others have a result that says why not. All processes come to the same."""
    name = "zero3_offload" if engine.offload else engine.name
    fitting, refused = fit(
        replace(job, customers=due), name, accelerator.num_processes, memory, accelerator.device.type == "cuda"
    )
    if accelerator.is_main_process:
        for customer in due:
            if customer.key in refused:
                write_result(job, customer, "train", time.monotonic(), refused[customer.key])
        if fitting.mixing != job.mixing:
            print(
                f"to fit {gib(memory)}: slots {fitting.mixing.slots}, max_tokens_per_micro_batch {fitting.mixing.max_tokens_per_micro_batch}",
                flush=True,
            )
    return replace(job, mixing=fitting.mixing), fitting.customers, refused


def _refuse_too_small_devices(job: Job, engine: Engine, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Stop before loading if the part of the base that a GPU would keep cannot fit there."""
    # Parts that wait off the device are gathered on it block by block only.
    if (
        accelerator.device.type != "cuda"
        or engine.offload
        or job.base.quantization is not None
        or not Path(job.base.path).is_dir()
    ):
        return
    memory = torch.cuda.get_device_properties(accelerator.device).total_memory
    parts = engine.parts if engine.name == "tp" else accelerator.num_processes
    refuse_what_cannot_fit(Path(job.base.path), dtype, engine.name, parts, memory)


def _join_after_restart(environment: Mapping[str, str]) -> None:
    """Meet the other processes under a name of this attempt, if the launcher has started them all again (`--max_restarts`).

    torch (2.13) keeps the store of a static rendezvous, which is Accelerate's default, over restarts: the processes would find the addresses of those
    that are dead.
    """
    attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or torch.distributed.is_initialized():
        return
    world, patience = int(environment["WORLD_SIZE"]), timedelta(seconds=_PATIENCE_SECONDS)
    store = torch.distributed.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), world, False, patience)
    named = torch.distributed.PrefixStore(f"attempt-{attempt}", store)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    # Parts of the base that wait in the machine's memory are exchanged there.
    backend = "cuda:nccl,cpu:gloo" if gpu else "gloo"
    torch.distributed.init_process_group(backend, store=named, rank=int(environment["RANK"]), world_size=world, timeout=patience)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the job, so that no two processes write its files.

    The trainer of a flow that was killed may still be writing its last checkpoint.

    Raises:
        StorageError: another one is at work on it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=_WAIT_SECONDS):
            yield
    except Timeout as error:
        raise StorageError(f"{folder}: another process is training this job. Wait for it or stop it.") from error
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(folder)):
            raise
        raise StorageError(f"{folder}: cannot be written ({error.strerror}). Check the folder and its permissions.") from error


class _Training:
    """A job under way."""

    def __init__(
        self,
        job: Job,
        due: list[JobCustomer],
        base: FrozenBase,
        accelerator: Accelerator,
        engine: Engine,
        asked_to_stop: Callable[[], bool],
        saved: Checkpoint | None,
        stack: ExitStack,
    ) -> None:
        self.job, self.base, self.accelerator = job, base, accelerator
        self.folder = Path(job.folder)
        self.main = accelerator.is_main_process
        self.tokenizer, _ = load_tokenizer(base.folder)
        self.untouched = base.versions()
        if job.mixing.gradient_checkpointing:
            base.checkpoint_gradients()
        self.saved_keys = set() if saved is None else set(saved.states)
        self.tracker = Tracker()
        self.members: dict[CustomerKey, _Member] = {}  # of those in a slot
        self.finished: list[_Member] = []  # done, but their prefixes are not written yet
        self.unwritten: set[CustomerKey] = set()  # of those, whom that was told of
        self.parked: dict[CustomerKey, State] = {}
        self.failed: dict[CustomerKey, str] = {}
        self.untold: StorageError | None = None  # why a failure could not even be noted
        self.done = len(job.customers) - len(due) if saved is None else saved.done
        self.settled = 0  # steps of those who have left, all that they might have taken
        self.shortage = _of_first(noted_shortage(self.folder, job.mixing.max_tokens_per_micro_batch), accelerator)
        self.rate = _Rate()
        self.tick = 0 if saved is None else saved.tick
        self.mixed = Mixed(
            base,
            max(job.mixing.slots, 0 if saved is None else sum(key is not None for key in saved.slots)),
            _of_first(max(_width(base, due), 0 if saved is None else saved.length), accelerator),
            self.tokenizer.pad_token_id,
            self._budget(saved),
            accelerator,
            asked_to_stop,
            self._say,
            engine,
        )
        self.progress: Progress | None = None
        self.metrics: _MetricsFile | None = None
        self.run: Run | None = None
        if self.main:
            self.progress = stack.enter_context(Progress("train", sum(c.training.max_steps for c in due), "steps"))
            kept = [] if saved is None else _lines_until(self.folder / "metrics.jsonl", self.tick)
            self.metrics = _MetricsFile(self.folder / "metrics.jsonl", kept)
            stack.callback(self.metrics.close)
            tags = {"prefixfleet.job": job.name, "prefixfleet.base_digest": job.base.digest, **_tag_of_home(job)}
            note = self.folder / "mlflow_run.json"
            self.run = Run(self.tracker, job.experiment, f"job {job.name}", asdict(job.mixing), tags, note)
        self.queue = deque(due)
        self.last_checkpoint = time.monotonic()
        for key, reason in self.shortage.given_up.items():
            for customer in [customer for customer in self.queue if customer.key == key]:
                self.queue.remove(customer)
                self._fail(customer, reason)
        if saved is not None:
            self._go_on(saved)
        # Nobody may write files that another process has yet to read.
        accelerator.wait_for_everyone()

    def work(self) -> int:
        """Until the queue is empty and every slot is free; returns the number of failed customers.

        Raises:
            StorageError: a checkpoint, or why a customer failed, cannot be written.
        """
        status: str | None = "FAILED"
        patience = _FLUSH_SECONDS
        try:
            self._publish()
            while True:
                self._seat()
                judged = self.mixed.judge()
                if judged.losses or judged.failed:
                    self._give_up(judged)
                    self._finish()
                    self._show()
                    continue
                if not self.members:
                    break
                if time.monotonic() - self.last_checkpoint >= self.job.mixing.checkpoint_every_seconds:
                    self._checkpoint()
                report = self.mixed.step()
                self.tick += 1
                self._tell(report)
                self._give_up(report)
            self._checkpoint()
            if self.main and not self.finished and not self.parked:
                delete_checkpoint(self.folder)
            status = "FINISHED"
        except OutOfMemoryAlone as alone:
            # The others wait inside a pass, so that no checkpoint of this moment can be had: the last one holds, with the smaller budget.
            of = {id(member.resident): key for key, member in self.members.items()}
            given_up = {of[id(self.mixed.residents[slot])]: reason for slot, reason in alone.given_up.items()}
            known = Shortage(
                self.job.mixing.max_tokens_per_micro_batch, self.mixed.budget, {**self.shortage.given_up, **given_up}
            )
            note_shortage(self.folder, known)
            status, patience = None, _PAUSE_SECONDS
            how = f"with micro-batches of {self.mixed.budget} tokens"
            if given_up:
                how = f"without {', '.join(map(str, given_up))}, who had a row that does not fit"
            raise Paused(
                f"{self.job.name}: out of device memory in process {self.accelerator.process_index}. Run the same command again: it goes on from its "
                f"last checkpoint {how}."
            ) from None
        except Interrupted:
            self._checkpoint()
            for member in self.members.values():
                member.close(None)
            status, patience = None, _PAUSE_SECONDS
            raise Paused(
                f"{self.job.name}: stopped at a checkpoint with {len(self.members)} customers in training and {len(self.queue)} waiting. "
                "Run the same command again to go on."
            ) from None
        finally:
            if self.run is not None:
                self.run.close(status)
            self.tracker.close(patience)
        if self.untold is not None:
            raise self.untold  # otherwise whoever started us would find no word about these customers
        return len(self.failed) + len(self.finished)

    def _budget(self, saved: Checkpoint | None) -> int:
        """Tokens of a micro-batch: as asked for, or what was left of that when memory ran out before."""
        asked = self.job.mixing.max_tokens_per_micro_batch
        found = [asked]
        if saved is not None and saved.asked_budget == asked:
            found.append(saved.budget)
        return min([*found, self.shortage.budget])

    def _seat(self) -> None:
        """Let the next customers of the queue into the free slots."""
        while self.queue and (slot := self.mixed.free_slot()) is not None:
            customer = self.queue.popleft()
            member = self._opened(customer, None)
            if member is not None:
                self.mixed.residents[slot] = member.resident
                self.members[customer.key] = member

    def _opened(self, customer: JobCustomer, saved: State | None) -> _Member | None:
        """As `_open`; a customer that cannot be opened fails alone."""
        try:
            return self._open(customer, saved)
        except PrefixFleetError as error:
            self._fail(customer, str(error))
        except Exception as error:  # whatever it is, it is this customer's; the others go on
            if self.accelerator.num_processes > 1:
                # The other processes may be waiting in an exchange of gradients: going on here would mix two customers'. The launcher ends
                # them all, and the flow starts the job again.
                raise
            traceback.print_exc()
            self._fail(
                customer,
                f"{type(error).__name__}: {error}. The traceback is in the log; this is a bug or the machine is out of memory.",
            )
        return None

    def _open(self, customer: JobCustomer, saved: State | None) -> _Member:
        """A customer ready for its next step: the first one, or the one that follows a checkpoint.

        Raises:
            PrefixFleetError: on every process, what any of them failed with.
        """
        # What one process alone may fail at comes first, and all hear of it before any of them runs the base or exchanges gradients.
        error: PrefixFleetError | None = None
        try:
            card, train_rows, dev_rows = _read(customer)
            _check_rows(self.base, customer, train_rows, dev_rows)
            if customer.prefix.length > (width := self.mixed.bank.length):
                raise TrainingError(
                    f"its prefix of {customer.prefix.length} does not fit the job, which began with {width} columns because this customer's data "
                    "could not be read then. Run the same command again."
                )
        except PrefixFleetError as found:
            error = found
        _agree(error, self.accelerator)
        try:
            method, parent = parameterise(self.base, self.job.base.digest, customer, self.tokenizer, train_rows)
            resident = Resident(method, customer.prefix.placement == "infix", train_rows, dev_rows, customer.training)
            member = _Member(customer, resident, card, parent)
            if saved is not None:
                tensors, plain = saved
                member.parent = plain["parent"]
                resident.restore(tensors, plain)
            if self.main:
                place = customer.key.below(self.folder)
                member.metrics = _MetricsFile(place / "metrics.jsonl", resident.history)
                member.run = Run(
                    self.tracker,
                    self.job.experiment,
                    str(customer.key),
                    _params(customer),
                    _tags(self.job, customer),
                    place / "mlflow_run.json",
                )
        except PrefixFleetError as found:
            error = found
        _agree(error, self.accelerator)

        def on_log(entry: dict[str, float]) -> None:
            if member.metrics is not None and member.run is not None:
                member.metrics.write(entry)
                member.run.log(entry)

        resident.on_log = on_log
        return member

    def _go_on(self, saved: Checkpoint) -> None:
        """Put everybody back where the checkpoint has them."""
        waiting = {customer.key: customer for customer in self.queue}
        states = dict(saved.states)
        for key in list(states):
            if key in waiting and states[key][1].get("train_digest") != waiting[key].train_digest:
                self._message(
                    str(key), "warning", "its settings or data were changed since the checkpoint: trained from its beginning"
                )
                del states[key]
        seats = saved.slots if len(saved.slots) == len(self.mixed.residents) else [key for key in saved.slots if key is not None]
        done = 0
        for slot, seat in enumerate(seats):
            if seat in states and seat in waiting and (member := self._opened(waiting.pop(seat), states[seat])) is not None:
                self.mixed.residents[slot] = member.resident
                self.members[seat] = member
                done += member.resident.step
        for key in [*saved.finished, *saved.parked]:
            if key in states and key in waiting and (member := self._opened(waiting[key], states[key])) is not None:
                through = key in saved.finished or member.resident.finished
                free = self.mixed.free_slot()
                if not through and free is None:
                    member.close(None)  # another time: there are fewer slots now
                    self.parked[key] = states[key]
                    del waiting[key]
                    continue
                del waiting[key]
                if through:
                    self.finished.append(member)
                    self.settled += member.customer.training.max_steps
                    done += member.customer.training.max_steps
                else:
                    assert free is not None
                    self.mixed.residents[free] = member.resident
                    self.members[key] = member
                    done += member.resident.step
        for key, reason in saved.failed.items():
            if key in waiting and key not in self.failed:
                self._fail(waiting.pop(key), reason)
        # Whoever is not among those asked for this time keeps what was reached: the flow leaves out those it cannot ask about just now.
        asked = {customer.key for customer in self.queue}
        self.parked |= {
            key: state
            for key, state in states.items()
            if key not in asked and key not in self.failed and not is_whole(Path(state[1].get("prefix_dir", "")), PREFIX_FILES)
        }
        self.queue = deque(customer for customer in self.queue if customer.key in waiting and customer.key not in self.failed)
        if self.progress is not None:
            self.progress.reach(done, skipped=done)
        self._message(self.job.name, "resumed", f"from the checkpoint at tick {saved.tick}")

    def _finish(self) -> None:
        """Take those out of their slots who are through."""
        for slot, member in self._seats():
            if not member.resident.finished:
                continue
            self._leave(slot, member)
            if member.resident.best:
                self.finished.append(member)
            else:
                self._fail(member.customer, "no dev loss was finite. Lower training.lr or look at the data.", member)

    def _give_up(self, report: Report) -> None:
        """Free the slots of those who failed in a pass."""
        seats = dict(self._seats())
        for slot, reason in report.failed.items():
            self._leave(slot, seats[slot])
            self._fail(seats[slot].customer, reason, seats[slot])

    def _seats(self) -> list[tuple[int, _Member]]:
        of = {id(member.resident): member for member in self.members.values()}
        return [(slot, of[id(resident)]) for slot, resident in self.mixed.seated]

    def _leave(self, slot: int, member: _Member) -> None:
        self.mixed.leave(slot)
        del self.members[member.key]
        steps = member.customer.training.max_steps
        self.settled += steps
        if self.progress is not None:
            self.progress.skip(steps - member.resident.step)  # what early stopping or a failure saved is no work

    def _fail(self, customer: JobCustomer, reason: str, member: _Member | None = None) -> None:
        self.failed[customer.key] = reason
        if member is not None:
            member.close("FAILED")
        else:
            self.settled += customer.training.max_steps
            if self.progress is not None:
                self.progress.skip(customer.training.max_steps)
        self._note(customer, 0.0 if member is None else member.resident.seconds, reason)
        self._message(str(customer.key), "failed", reason)

    def _note(self, customer: JobCustomer, seconds: float, reason: str | None = None) -> None:
        """Write a customer's result. One that cannot be written stops nobody else."""
        if self.main:
            try:
                write_result(self.job, customer, "train", time.monotonic() - seconds, reason)
            except StorageError as error:
                self._message(str(customer.key), "warning", str(error))
                if reason is not None:
                    self.untold = error

    def _checkpoint(self) -> None:
        """Save where everybody stands, and only then write the prefixes of those who are through.

        In this order a prefix exists only if a checkpoint has its customer finished: a job that goes on never has to do without a neighbour that it
        had the first time.
        """
        self.last_checkpoint = time.monotonic()
        if not self.main:
            self.finished = []
            return
        of = {id(member.resident): member.key for member in self.members.values()}
        states = {member.key: member.state() for member in [*self.members.values(), *self.finished]}
        checkpoint = Checkpoint(
            tick=self.tick,
            budget=self.mixed.budget,
            asked_budget=self.job.mixing.max_tokens_per_micro_batch,
            length=self.mixed.bank.length,
            slots=[None if resident is None else of[id(resident)] for resident in self.mixed.residents],
            finished=[member.key for member in self.finished],
            parked=list(self.parked),
            failed=dict(self.failed),
            done=self.done,
            states={**states, **self.parked},
        )
        write_checkpoint(self.folder, checkpoint, self.saved_keys)
        self.saved_keys = set(checkpoint.states)
        self._publish()

    def _publish(self) -> None:
        """Write the prefixes of the finished. Who cannot be written stays finished, in this checkpoint and the next, until it can be."""
        if self.finished and self.base.versions() != self.untouched:
            raise TrainingError(
                "the weights of the base changed during training. This is a bug; nothing of these customers was kept."
            )
        finished, self.finished = self.finished, []
        if not self.main:
            return
        for member in finished:
            try:
                save_prefix(Path(member.customer.prefix_dir), member.resident.best, _config(self.job, member, self.base))
            except PrefixFleetError as error:
                self.finished.append(member)
                if member.key not in self.unwritten:
                    self.unwritten.add(member.key)
                    self._message(str(member.key), "failed", str(error))
                    self._note(member.customer, member.resident.seconds, str(error))
            else:
                self.done += 1
                member.close("FINISHED")
                self._note(member.customer, member.resident.seconds)
        self._show()

    def _tell(self, report: Report) -> None:
        """Log a step of everybody, and show it."""
        if self.progress is None or self.metrics is None or self.run is None:
            return
        seats = dict(self._seats())
        for slot, note in report.notes.items():
            self.progress.message(str(seats[slot].key), "warning", note)
        self.rate.add(report.tokens, report.seconds)
        losses = {str(seats[slot].key): loss for slot, loss in report.losses.items()}
        entry = {
            "step": float(self.tick),
            **{name: float(count) for name, count in self._counts().items()},
            **({"loss": sum(losses.values()) / len(losses)} if losses else {}),
            "tokens_per_second": self.rate.tokens_per_second,
            "padding_share": 1 - report.tokens / max(1, report.padded),
            "micro_batch_tokens": float(self.mixed.budget),
            "memory_bytes": float(_memory_bytes()),
        }
        self.metrics.write(entry)
        self.run.log(entry)
        self._show(losses)

    def _counts(self) -> dict[str, int]:
        through = self.done + len(self.finished)
        return {"resident": len(self.members), "queued": len(self.queue), "done": through, "failed": len(self.failed)}

    def _show(self, losses: dict[str, float] | None = None) -> None:
        if self.progress is not None:
            steps = self.settled + sum(member.resident.step for member in self.members.values())
            rate: dict[str, Any] = {"tokens_per_second": self.rate.tokens_per_second} if self.rate.tokens_per_second else {}
            self.progress.reach(steps, customers=self._counts(), **rate, losses=losses or {})

    def _message(self, who: str, status: str, text: str) -> None:
        if self.progress is not None:
            self.progress.message(who, status, text)

    def _say(self, text: str) -> None:
        self._message(self.job.name, "warning", text)


class _Rate:
    """Real tokens a second over the last steps."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=20)

    def add(self, tokens: int, seconds: float) -> None:
        self._last.append((tokens, seconds))

    @property
    def tokens_per_second(self) -> float:
        """0 before the first step."""
        return sum(tokens for tokens, _ in self._last) / max(1e-9, sum(seconds for _, seconds in self._last))


def _read(customer: JobCustomer) -> tuple[dict[str, Any], list[Record], list[Record]]:
    """Card, training rows and dev rows of a customer."""
    prepared = Path(customer.prepared)
    card = read_card(prepared)
    if card["fingerprint"] != customer.data_fingerprint:
        raise DataError(f"{prepared}: the data was prepared anew since the job was written. Run `prefixfleet train` again.")
    return card, read_split(prepared, "train"), read_split(prepared, "dev")


def _width(base: FrozenBase, due: Sequence[JobCustomer]) -> int:
    """Columns of the bank: the longest prefix of those who can train.

    Every row of every step is as wide as that, so one length that the base cannot take, and that is refused later, would slow down all others.
    Usually a single customer's rows are read for this.
    """
    for customer in sorted(due, key=lambda customer: -customer.prefix.length):
        try:
            _, train, dev = _read(customer)
            _check_rows(base, customer, train, dev)
        except Exception:  # told when its turn comes
            continue
        return customer.prefix.length
    return 1


def _check_rows(base: FrozenBase, customer: JobCustomer, train: list[Record], dev: list[Record]) -> None:
    """Refuse rows that the base cannot take.

    Raises:
        DataError: there are none, or of another vocabulary.
        PrefixError: too long for the base.
    """
    rows = [*train, *dev]
    if not train or not dev or not all(row.prompt_ids and row.target_ids for row in rows):
        raise DataError(
            f"{customer.prepared}: has no rows to train on, no dev rows, or empty ones. Run `prefixfleet prepare` again."
        )
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    if not all(0 <= token < vocabulary for row in rows for token in (*row.prompt_ids, *row.target_ids)):
        raise DataError(f"{customer.prepared}: has tokens that the base does not know. Run `prefixfleet prepare` again.")
    length = customer.prefix.length
    if base.is_encoder_decoder:
        base.check_length(0, max(len(row.prompt_ids) for row in rows))
    base.check_length(length, max(len(row.target_ids) if base.is_encoder_decoder else tokens_of(row) for row in rows))


def _of_first(value: Any, accelerator: Accelerator) -> Any:
    """What the first process has, on all of them."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def _agree(error: PrefixFleetError | None, accelerator: Accelerator) -> None:
    """Raise on every process what any of them failed with."""
    errors = [error] if accelerator.num_processes == 1 else gather_object([error])
    for found in errors:
        if found is not None:
            raise found


def _memory_bytes() -> int:
    """Peak memory of the device so far, or of this process where there is no GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory_bytes()


class _MetricsFile:
    """`metrics.jsonl`, line by line. Training does not end for it: what cannot be written any more is left out, and that is said once."""

    def __init__(self, path: Path, kept: Sequence[dict[str, float]] = ()) -> None:
        """Begin the file with the lines `kept`, all at once, so that a kill now loses none of them."""
        self._path = path
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        try:
            self._file: TextIO | None = path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}). Check the folder and its permissions.") from error

    def write(self, entry: dict[str, float]) -> None:
        """Add a line."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError as error:
            print(f"warning: {self._path}: {error.strerror}; the rest of the metrics is not written.", file=sys.stderr)
            self._file = None

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines_until(path: Path, step: int) -> list[dict[str, float]]:
    kept: list[dict[str, float]] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(entry)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # a line that a killed process left half written ends the file
    return kept


def _params(customer: JobCustomer) -> dict[str, Any]:
    sections: dict[str, Any] = {"prefix": customer.prefix, "training": customer.training, "prompt": customer.prompt}
    return {f"{name}.{k}": v for name, section in sections.items() for k, v in asdict(section).items()}


def _tags(job: Job, customer: JobCustomer) -> dict[str, str]:
    return {
        "prefixfleet.customer": customer.customer,
        "prefixfleet.task": customer.task,
        "prefixfleet.fingerprint": customer.train_digest,
        "prefixfleet.data_fingerprint": customer.data_fingerprint,
        "prefixfleet.base_digest": job.base.digest,
        "prefixfleet.job": job.name,
        **_tag_of_home(job),
    }


def _tag_of_home(job: Job) -> dict[str, str]:
    """Which home a run's files are in: others may share this MLflow, and must not take the run for one of theirs."""
    home = identity_above(Path(job.folder))
    return {} if home is None else {"prefixfleet.home": home}


def _config(job: Job, member: _Member, base: FrozenBase) -> dict[str, Any]:
    """The content of prefix.json: everything that serving, evaluation and registration need to know of a prefix."""
    customer, resident, card = member.customer, member.resident, member.card
    return {
        "customer": customer.customer,
        "task": customer.task,
        "digest": customer.train_digest,
        "prefix": {
            **asdict(customer.prefix),
            "sites": {name: asdict(base.sites[name]) for name in resident.best},
            "parameters": sum(key.numel() + value.numel() for key, value in resident.best.values()),
        },
        "prompt": asdict(customer.prompt),
        "chat": card["prompt"]["chat"],
        "generation": {"num_beams": customer.evaluation.num_beams, "max_new_tokens": customer.evaluation.max_new_tokens},
        "base": {
            "id": job.base.id,
            "path": job.base.path,
            "revision": job.base.revision,
            "digest": job.base.digest,
            "model_type": base.model.config.model_type,
            "is_encoder_decoder": base.is_encoder_decoder,
            "tokenizer_digest": card["tokenizer_digest"],
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "quantization": job.base.quantization,
        },
        "training": {
            **asdict(customer.training),
            "steps": resident.step,
            "best_step": resident.best_step,
            "best_dev_loss": resident.best_dev_loss,
            "train_loss": resident.train_loss,
            "seconds": round(resident.seconds, 3),
            "history": [{k: v for k, v in entry.items() if k in ("step", "loss", "dev_loss")} for entry in resident.history],
            "peak_memory_bytes": peak_memory_bytes(),
        },
        "lineage": {
            "data_fingerprint": card["train_fingerprint"],
            "config_digest": customer.config_digest,
            "seed": customer.training.seed,
            "code_version": code_version(),
            "parent": member.parent,
            "counts": card["counts"],
        },
        "run_id": None if member.run is None else member.run.id,
    }
