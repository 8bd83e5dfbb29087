"""Train every customer of a job, one after another on one loaded base. One customer's failure is that customer's."""

import dataclasses
import json
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pipeline.data import Record, read_card, read_split
from pipeline.data.prompt import load_tokenizer
from pipeline.errors import DataError, PrefixFleetError, StorageError, TrainingError
from pipeline.prefix import FrozenBase, load_base, save_prefix
from pipeline.prefix.parameterise import parameterise
from pipeline.process import code_version, peak_memory_bytes
from pipeline.progress import Progress
from pipeline.training.job import Job, JobCustomer
from pipeline.training.loop import Trained, train
from pipeline.training.results import PREFIX_FILES, is_whole, write_result
from pipeline.training.tracking import Run


def run_job(job: Job) -> int:
    """Train every customer whose prefix does not exist yet, and write a result for each.

    Returns:
        the number of customers that failed.
    """
    started = time.monotonic()
    # With a GPU-less machine Accelerate would otherwise look for one when the launcher's config names several processes.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    due = []
    # What the first process sees holds for all: another one may look when a file has just come.
    trained = _of_first([is_whole(Path(c.prefix_dir), PREFIX_FILES) for c in job.customers], accelerator)
    for customer, done in zip(job.customers, trained, strict=True):
        if not done:
            due.append(customer)
        elif accelerator.is_main_process:
            write_result(job, customer, "train", started)
    if not due:
        return 0
    base = load_base(job.base, accelerator.device)
    digest = base.digest()
    failed = 0
    with ExitStack() as stack:
        progress = (
            stack.enter_context(Progress("train", sum(c.training.max_steps for c in due), "steps"))
            if accelerator.is_main_process
            else None
        )
        for customer in due:
            started = time.monotonic()
            reason = None
            try:
                _train_customer(job, customer, base, accelerator, progress)
                if base.digest() != digest:
                    raise TrainingError(
                        "the weights of the base changed during training. This is a bug; nothing of this customer was kept."
                    )
            except PrefixFleetError as error:
                reason = str(error)
            except Exception as error:  # whatever it is, it is this customer's; the others go on
                if accelerator.num_processes > 1:
                    # The other processes may be waiting in an exchange of gradients: going on to the next customer here would mix
                    # two customers' gradients. The launcher ends them all, and the flow starts the job again.
                    raise
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}. The traceback is in the log; this is a bug or the machine is out of memory."
            failed += reason is not None
            if accelerator.is_main_process:
                write_result(job, customer, "train", started, reason)
                if progress is not None and reason is not None:
                    progress.message(str(customer.key), "failed", reason)
    return failed


def _train_customer(
    job: Job, customer: JobCustomer, base: FrozenBase, accelerator: Accelerator, progress: Progress | None
) -> None:
    key = str(customer.key)
    steps = customer.training.max_steps
    done = 0
    main = accelerator.is_main_process
    with ExitStack() as stack:
        # What one process alone may fail at comes first, and all hear of it before gradients are exchanged.
        error: PrefixFleetError | None = None
        try:
            tokenizer, card, train_rows, dev_rows = _open(customer, base)
            base.check_length(customer.prefix.length, 0)
            method, parent = parameterise(base, job.base.digest, customer, tokenizer, train_rows)
            if main:
                metrics = stack.enter_context(_MetricsFile(customer.key.below(Path(job.folder)) / "metrics.jsonl"))
                run = stack.enter_context(Run(job.experiment, key, _params(customer), _tags(job, customer)))
        except PrefixFleetError as found:
            error = found
        _agree(error, accelerator)

        def on_log(entry: dict[str, float]) -> None:
            nonlocal done
            if not main:
                return
            metrics.write(entry)
            run.log(entry)
            if progress is not None and "loss" in entry:
                done += 1
                progress.update(1, customer=key, loss=entry["loss"])

        try:
            trained = train(
                base,
                method,
                customer.prefix.placement == "infix",
                train_rows,
                dev_rows,
                customer.training,
                tokenizer.pad_token_id,
                accelerator,
                on_log,
            )
        finally:
            # Steps that early stopping or a failure saved count as done.
            if progress is not None:
                progress.update(steps - done, customer=key)
        if main:
            save_prefix(Path(customer.prefix_dir), trained.prefix, _config(job, customer, base, trained, parent, card, run.id))


def _open(customer: JobCustomer, base: FrozenBase) -> tuple[Any, dict[str, Any], list[Record], list[Record]]:
    """Tokenizer, card, training rows and dev rows of a customer."""
    prepared = Path(customer.prepared)
    card = read_card(prepared)
    if card["fingerprint"] != customer.data_fingerprint:
        raise DataError(f"{prepared}: the data was prepared anew since the job was written. Run `prefixfleet train` again.")
    tokenizer, _ = load_tokenizer(base.folder)
    return tokenizer, card, read_split(prepared, "train"), read_split(prepared, "dev")


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


class _MetricsFile:
    """`metrics.jsonl`, line by line. Training does not end for it: what cannot be written any more is left out, and that is said once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO | None = path.open("w", encoding="utf-8")
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

    def __enter__(self) -> "_MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _params(customer: JobCustomer) -> dict[str, Any]:
    sections: dict[str, Any] = {"prefix": customer.prefix, "training": customer.training, "prompt": customer.prompt}
    return {f"{name}.{k}": v for name, section in sections.items() for k, v in dataclasses.asdict(section).items()}


def _tags(job: Job, customer: JobCustomer) -> dict[str, str]:
    return {
        "prefixfleet.customer": customer.customer,
        "prefixfleet.task": customer.task,
        "prefixfleet.fingerprint": customer.train_digest,
        "prefixfleet.data_fingerprint": customer.data_fingerprint,
        "prefixfleet.base_digest": job.base.digest,
        "prefixfleet.job": job.name,
    }


def _config(
    job: Job,
    customer: JobCustomer,
    base: FrozenBase,
    trained: Trained,
    parent: str | None,
    card: dict[str, Any],
    run_id: str | None,
) -> dict[str, Any]:
    """The content of prefix.json: everything that serving, evaluation and registration need to know of a prefix."""
    return {
        "customer": customer.customer,
        "task": customer.task,
        "digest": customer.train_digest,
        "prefix": {
            **dataclasses.asdict(customer.prefix),
            "sites": {name: dataclasses.asdict(base.sites[name]) for name in trained.prefix},
            "parameters": sum(key.numel() + value.numel() for key, value in trained.prefix.values()),
        },
        "prompt": dataclasses.asdict(customer.prompt),
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
            **dataclasses.asdict(customer.training),
            "steps": trained.steps,
            "best_step": trained.best_step,
            "best_dev_loss": trained.best_dev_loss,
            "train_loss": trained.train_loss,
            "seconds": round(trained.seconds, 3),
            "history": [{k: v for k, v in entry.items() if k in ("step", "loss", "dev_loss")} for entry in trained.history],
            "peak_memory_bytes": peak_memory_bytes(),
        },
        "lineage": {
            "data_fingerprint": card["train_fingerprint"],
            "config_digest": customer.config_digest,
            "seed": customer.training.seed,
            "code_version": code_version(),
            "parent": parent,
            "counts": card["counts"],
        },
        "run_id": run_id,
    }
