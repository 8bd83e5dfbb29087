"""Train the customers of a job, many at once on one loaded base: the queue, what is written, and what survives a kill.

In: a job. Out: a prefix and a result for each customer, metrics, and checkpoints on the way. One customer's failure is that customer's. How a step
is computed is in `pipeline.training.mixed`, what a customer is in `pipeline.training.resident`.
"""

import json
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from pipeline.data import Record, read_card, read_split
from pipeline.data.prompt import load_tokenizer
from pipeline.errors import ConfigError, DataError, PrefixFleetError, StorageError, TrainingError
from pipeline.keys import CustomerKey
from pipeline.prefix import FrozenBase, load_base, save_prefix
from pipeline.prefix.base import choose_dtype
from pipeline.prefix.parameterise import parameterise
from pipeline.process import code_version, peak_memory_bytes
from pipeline.progress import Progress
from pipeline.training.batches import tokens_of
from pipeline.training.checkpoint import (
    Checkpoint,
    State,
    delete_checkpoint,
    note_budget,
    noted_budget,
    read_checkpoint,
    write_checkpoint,
)
from pipeline.training.engines import Engine, chosen
from pipeline.training.job import Job, JobCustomer
from pipeline.training.mixed import Interrupted, Mixed, OutOfMemoryAlone, Report
from pipeline.training.plan import refuse_what_cannot_fit
from pipeline.training.resident import Resident
from pipeline.training.results import PREFIX_FILES, is_whole, write_result
from pipeline.training.tracking import Run

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
        run_id = None if self.run is None else self.run.id
        return tensors, {"train_digest": self.customer.train_digest, "parent": self.parent, "run_id": run_id, **plain}

    def close(self, status: str | None) -> None:
        """End its metrics; None leaves the MLflow run open for whoever goes on."""
        if self.metrics is not None:
            self.metrics.close()
        if self.run is not None:
            if status is None:
                self.run.pause()
            else:
                self.run.close(status)


def run_job(job: Job, asked_to_stop: Callable[[], bool] = lambda: False) -> int:
    """Train every customer whose prefix does not exist yet, and write a result for each.

    Args:
        job: what to do.
        asked_to_stop: looked at between micro-batches.

    Returns:
        the number of customers that failed.

    Raises:
        Paused: see there.
        StorageError: a checkpoint cannot be written or read. The last good one stays.
        BaseModelError, ConfigError: nothing of the job can be done.
    """
    # With a GPU-less machine Accelerate would otherwise look for one when the launcher's config names several processes.
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=_PATIENCE_SECONDS))]
    )
    folder = Path(job.folder)
    saved = read_checkpoint(folder)
    # What the first process sees holds for all: another one may look when a file has just come.
    trained = _of_first([is_whole(Path(c.prefix_dir), PREFIX_FILES) for c in job.customers], accelerator)
    due = [customer for customer, done in zip(job.customers, trained, strict=True) if not done]
    if accelerator.is_main_process:
        for customer, done in zip(job.customers, trained, strict=True):
            if done:
                write_result(job, customer, "train", time.monotonic())
    if not due:
        if accelerator.is_main_process and saved is not None:
            delete_checkpoint(folder, saved.states)
        return 0
    if job.base.quantization == "int8" and job.mixing.slots > 1:
        raise ConfigError(
            f"{folder}: slots is {job.mixing.slots}, but LLM.int8 treats a column as large that is large in any row of a batch, so that customers "
            "would touch one another. Set launch.slots: 1, or quantization: int4."
        )
    dtype = choose_dtype(job.base.dtype, accelerator.device)
    engine = chosen(accelerator, dtype)
    if accelerator.device.type == "cuda" and Path(job.base.path).is_dir() and job.base.quantization is None:
        memory = torch.cuda.get_device_properties(accelerator.device).total_memory
        refuse_what_cannot_fit(Path(job.base.path), dtype, engine.name, accelerator.num_processes, memory)
    base = load_base(job.base, accelerator.device, engine.place)
    with ExitStack() as stack:
        training = _Training(job, due, base, accelerator, engine, asked_to_stop, saved, stack)
        return training.work()


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
        self.sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        stack.callback(self.sender.shutdown)
        self.progress = (
            stack.enter_context(Progress("train", sum(c.training.max_steps for c in due), "steps")) if self.main else None
        )
        self.members: dict[CustomerKey, _Member] = {}  # of those in a slot
        self.finished: list[_Member] = []  # done, not yet committed
        self.failed: dict[CustomerKey, str] = {}
        self.done = 0
        self.unwritten = 0
        self.rate = _Rate()
        self.tick = 0 if saved is None else saved.tick
        self.mixed = Mixed(
            base,
            max(job.mixing.slots, 0 if saved is None else sum(key is not None for key in saved.slots)),
            max([c.prefix.length for c in due] + ([] if saved is None else [saved.length])),
            self.tokenizer.pad_token_id,
            self._budget(saved),
            accelerator,
            asked_to_stop,
            self._say,
            engine,
        )
        self.metrics: _MetricsFile | None = None
        self.run: Run | None = None
        if self.main:
            self.metrics = _MetricsFile(self.folder / "metrics.jsonl", keep_until=self.tick)
            stack.callback(self.metrics.close)
            tags = {"prefixfleet.job": job.name, "prefixfleet.base_digest": job.base.digest}
            self.run = Run(job.experiment, f"job {job.name}", asdict(job.mixing), tags, self.sender)
        self.queue = deque(due)
        self.last_checkpoint = time.monotonic()
        if saved is not None:
            self._go_on(saved)
        # Nobody may write files that another process has yet to read.
        accelerator.wait_for_everyone()

    def work(self) -> int:
        """Until the queue is empty and every slot is free; returns the number of failed customers."""
        status = "FAILED"
        try:
            self._publish()
            while True:
                self._seat()
                judged = self.mixed.judge()
                if judged.losses or judged.failed:
                    self._give_up(judged)
                    self._finish()
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
            if self.main and not self.unwritten:
                delete_checkpoint(self.folder, self.saved_keys)
            status = "FINISHED"
        except OutOfMemoryAlone:
            # The others wait inside a pass, so that no checkpoint of this moment can be had: the last one holds, with the smaller budget.
            note_budget(self.folder, self.job.mixing.max_tokens_per_micro_batch, self.mixed.budget)
            raise Paused(
                f"{self.job.name}: out of device memory in process {self.accelerator.process_index}. Run the same command again: it goes on from its "
                f"last checkpoint with micro-batches of {self.mixed.budget} tokens."
            ) from None
        except Interrupted:
            self._checkpoint()
            for member in self.members.values():
                member.close(None)
            raise Paused(
                f"{self.job.name}: stopped at a checkpoint with {len(self.members)} customers in training and {len(self.queue)} waiting. "
                "Run the same command again to go on."
            ) from None
        finally:
            if self.run is not None:
                self.run.close(status)
        return len(self.failed) + self.unwritten

    def _budget(self, saved: Checkpoint | None) -> int:
        """Tokens of a micro-batch: as asked for, or what was left of that when memory ran out before."""
        asked = self.job.mixing.max_tokens_per_micro_batch
        found = [asked]
        if saved is not None and saved.asked_budget == asked:
            found.append(saved.budget)
        if (noted := _of_first(noted_budget(self.folder, asked), self.accelerator)) is not None:
            found.append(noted)
        return min(found)

    def _seat(self) -> None:
        """Let the next customers of the queue into the free slots."""
        while self.queue and (slot := self.mixed.free_slot()) is not None:
            customer = self.queue.popleft()
            try:
                member = self._open(customer, None)
            except PrefixFleetError as error:
                self._fail(customer, str(error))
            except Exception as error:  # whatever it is, it is this customer's; the others go on
                if self.accelerator.num_processes > 1:
                    # The other processes may be waiting in an exchange of gradients: going on here would mix two customers'. The launcher
                    # ends them all, and the flow starts the job again.
                    raise
                traceback.print_exc()
                self._fail(
                    customer,
                    f"{type(error).__name__}: {error}. The traceback is in the log; this is a bug or the machine is out of memory.",
                )
            else:
                self.mixed.residents[slot] = member.resident
                self.members[customer.key] = member

    def _open(self, customer: JobCustomer, saved: State | None) -> _Member:
        """A customer ready for its next step: the first one, or the one that follows a checkpoint.

        Raises:
            PrefixFleetError: on every process, what any of them failed with.
        """
        # What one process alone may fail at comes first, and all hear of it before any of them runs the base or exchanges gradients.
        error: PrefixFleetError | None = None
        try:
            card, train_rows, dev_rows = _read(customer)
            _check_lengths(self.base, customer, [*train_rows, *dev_rows], mixed=len(self.mixed.residents) > 1)
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
                member.metrics = _MetricsFile(customer.key.below(self.folder) / "metrics.jsonl")
                for entry in resident.history:
                    member.metrics.write(entry)
                run_id = None if saved is None else saved[1]["run_id"]
                member.run = Run(
                    self.job.experiment, str(customer.key), _params(customer), _tags(self.job, customer), self.sender, run_id
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
        for key, state in saved.states.items():
            if key in waiting and state[1].get("train_digest") != waiting[key].train_digest:
                raise StorageError(
                    f"{self.folder}: its checkpoint is of {key} with other settings or data. Delete {self.folder / 'checkpoint.json'} to train "
                    "the job's unfinished customers from their beginning."
                )
        steps = 0
        seats = saved.slots if len(saved.slots) == len(self.mixed.residents) else [key for key in saved.slots if key is not None]
        for slot, seat in enumerate(seats):
            if seat is not None and seat in waiting:
                member = self._open(waiting.pop(seat), saved.states[seat])
                self.mixed.residents[slot] = member.resident
                self.members[seat] = member
                steps += member.resident.step
        for key in saved.finished:
            if key in waiting:
                member = self._open(waiting.pop(key), saved.states[key])
                self.finished.append(member)
                self.done += 1
                steps += member.customer.training.max_steps
        for key, reason in saved.failed.items():
            if key in waiting:
                self._fail(waiting.pop(key), reason)
        self.queue = deque(customer for customer in self.queue if customer.key in waiting)
        if self.progress is not None:
            self.progress.skip(steps)
            self.progress.message(self.job.name, "resumed", f"from the checkpoint at tick {saved.tick}")

    def _finish(self) -> None:
        """Take those out of their slots who are through."""
        for slot, member in self._seats():
            if not member.resident.finished:
                continue
            self._leave(slot, member)
            # Steps that early stopping saved count as done.
            self._skip_steps(member)
            if member.resident.best:
                self.finished.append(member)
                self.done += 1
            else:
                self._fail(member.customer, "no dev loss was finite. Lower training.lr or look at the data.", member)

    def _give_up(self, report: Report) -> None:
        """Free the slots of those who failed in a pass."""
        seats = dict(self._seats())
        for slot, reason in report.failed.items():
            self._leave(slot, seats[slot])
            self._skip_steps(seats[slot])
            self._fail(seats[slot].customer, reason, seats[slot])

    def _seats(self) -> list[tuple[int, _Member]]:
        of = {id(member.resident): member for member in self.members.values()}
        return [(slot, of[id(resident)]) for slot, resident in self.mixed.seated]

    def _leave(self, slot: int, member: _Member) -> None:
        self.mixed.leave(slot)
        del self.members[member.key]

    def _skip_steps(self, member: _Member) -> None:
        if self.progress is not None:
            self.progress.update(member.customer.training.max_steps - member.resident.step)

    def _fail(self, customer: JobCustomer, reason: str, member: _Member | None = None) -> None:
        self.failed[customer.key] = reason
        if member is not None:
            member.close("FAILED")
        elif self.progress is not None:
            self.progress.update(customer.training.max_steps)
        if self.main:
            write_result(self.job, customer, "train", time.monotonic() - (member.resident.seconds if member else 0.0), reason)
        if self.progress is not None:
            self.progress.message(str(customer.key), "failed", reason)

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
        checkpoint = Checkpoint(
            self.tick,
            self.mixed.budget,
            self.job.mixing.max_tokens_per_micro_batch,
            self.mixed.bank.length,
            [None if resident is None else of[id(resident)] for resident in self.mixed.residents],
            [member.key for member in self.finished],
            dict(self.failed),
            {member.key: member.state() for member in [*self.members.values(), *self.finished]},
        )
        write_checkpoint(self.folder, checkpoint, self.saved_keys)
        self.saved_keys = set(checkpoint.states)
        self._publish()

    def _publish(self) -> None:
        """Write the prefixes of the finished."""
        if self.finished and self.base.versions() != self.untouched:
            raise TrainingError(
                "the weights of the base changed during training. This is a bug; nothing of these customers was kept."
            )
        finished, self.finished = self.finished, []
        if not self.main:
            return
        for member in finished:
            reason = None
            try:
                config = _config(self.job, member, self.base)
                save_prefix(Path(member.customer.prefix_dir), member.resident.best, config)
            except PrefixFleetError as error:  # it stays finished in the checkpoint, so a second try has only this left to do
                reason = str(error)
                self.unwritten += 1
                if self.progress is not None:
                    self.progress.message(str(member.key), "failed", reason)
            member.close("FINISHED" if reason is None else "FAILED")
            write_result(self.job, member.customer, "train", time.monotonic() - member.resident.seconds, reason)

    def _tell(self, report: Report) -> None:
        """Log a step of everybody, and show it."""
        if self.progress is None or self.metrics is None or self.run is None:
            return
        seats = dict(self._seats())
        for slot, note in report.notes.items():
            self.progress.message(str(seats[slot].key), "warning", note)
        self.rate.add(report.tokens, report.seconds)
        counts = {"resident": len(self.members), "queued": len(self.queue), "done": self.done, "failed": len(self.failed)}
        losses = {str(seats[slot].key): loss for slot, loss in report.losses.items()}
        entry = {
            "step": float(self.tick),
            **{name: float(count) for name, count in counts.items()},
            **({"loss": sum(losses.values()) / len(losses)} if losses else {}),
            "tokens_per_second": self.rate.tokens_per_second,
            "padding_share": 1 - report.tokens / max(1, report.padded),
            "micro_batch_tokens": float(self.mixed.budget),
            "memory_bytes": float(_memory_bytes()),
        }
        self.metrics.write(entry)
        self.run.log(entry)
        steps = len(report.losses) + len(report.notes) + len(report.failed)
        self.progress.update(steps, customers=counts, tokens_per_second=self.rate.tokens_per_second, losses=losses)

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.message(self.job.name, "warning", text)


class _Rate:
    """Real tokens a second over the last steps."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=20)

    def add(self, tokens: int, seconds: float) -> None:
        self._last.append((tokens, seconds))

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for tokens, _ in self._last) / max(1e-9, sum(seconds for _, seconds in self._last))


def _read(customer: JobCustomer) -> tuple[dict[str, Any], list[Record], list[Record]]:
    """Card, training rows and dev rows of a customer."""
    prepared = Path(customer.prepared)
    card = read_card(prepared)
    if card["fingerprint"] != customer.data_fingerprint:
        raise DataError(f"{prepared}: the data was prepared anew since the job was written. Run `prefixfleet train` again.")
    return card, read_split(prepared, "train"), read_split(prepared, "dev")


def _check_lengths(base: FrozenBase, customer: JobCustomer, rows: list[Record], mixed: bool) -> None:
    """Refuse rows that the base has no positions for, or that would change how it turns the positions of other rows.

    Raises:
        PrefixError: too long for the base.
        TrainingError: too long to share a batch.
    """
    length = customer.prefix.length
    longest = 0 if base.is_encoder_decoder else max(map(tokens_of, rows))
    base.check_length(length, longest)
    limit = base.rotary_limit
    if mixed and limit is not None and length + longest > limit:
        raise TrainingError(
            f"prefix of {length} and a row of {longest} tokens pass {limit} positions, from where on this base turns the positions of all rows of "
            "a batch by its longest one, so that customers would touch one another. Shorten the input, or give the customer launch.slots: 1."
        )


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

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        """Begin the file; with `keep_until`, its lines up to that step stay."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_until(path, keep_until) if keep_until else []
            self._file: TextIO | None = path.open("w", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}). Check the folder and its permissions.") from error
        for entry in kept:
            self.write(entry)

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
    }


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
