"""Train every customer of a job, one after another on one loaded base. One customer's failure is that customer's."""

import dataclasses
import json
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.data import read_card, read_split
from pipeline.data.prompt import load_tokenizer
from pipeline.errors import DataError, PrefixFleetError, TrainingError
from pipeline.prefix import FrozenBase, Prefix, load_base, save_prefix
from pipeline.prefix.initialise import from_random, from_text, from_zeros
from pipeline.process import code_version, peak_memory_bytes
from pipeline.progress import Progress
from pipeline.training.batches import TokenRow
from pipeline.training.job import Job, JobCustomer
from pipeline.training.loop import Trained, train
from pipeline.training.results import write_result
from pipeline.training.tracking import Run


def run_job(job: Job) -> int:
    """Train every customer whose prefix does not exist yet, and write a result for each.

    Returns:
        the number of customers that failed.
    """
    started = time.monotonic()
    due = []
    for customer in job.customers:
        if (Path(customer.prefix_dir) / "prefix.json").exists():
            write_result(job, customer, "train", started)
        else:
            due.append(customer)
    if not due:
        return 0
    # With a GPU-less machine Accelerate would otherwise look for one when the launcher's config names several processes.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
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
    prepared = Path(customer.prepared)
    card = read_card(prepared)
    if card["fingerprint"] != customer.data_fingerprint:
        raise DataError(f"{prepared}: the data was prepared anew since the job was written. Run `prefixfleet train` again.")
    train_rows, dev_rows = read_split(prepared, "train"), read_split(prepared, "dev")
    tokenizer, _ = load_tokenizer(base.folder)
    initial = initial_prefix(base, customer, tokenizer, train_rows)
    done = 0
    main = accelerator.is_main_process
    with ExitStack() as stack:
        if main:
            folder = customer.key.below(Path(job.folder))
            folder.mkdir(parents=True, exist_ok=True)
            metrics = stack.enter_context((folder / "metrics.jsonl").open("w", encoding="utf-8"))
            run = stack.enter_context(Run(job.experiment, key, _params(customer), _tags(job, customer)))

        def on_log(entry: dict[str, float]) -> None:
            nonlocal done
            if not main:
                return
            metrics.write(json.dumps(entry) + "\n")
            run.log(entry)
            if progress is not None and "loss" in entry:
                done += 1
                progress.update(1, customer=key, loss=entry["loss"])

        try:
            trained = train(base, initial, train_rows, dev_rows, customer.training, tokenizer.pad_token_id, accelerator, on_log)
        finally:
            # Steps that early stopping or a failure saved count as done.
            if progress is not None:
                progress.update(customer.training.max_steps - done, customer=key)
        if main:
            save_prefix(Path(customer.prefix_dir), trained.prefix, _config(job, customer, base, trained, card, run.id))


def initial_prefix(base: FrozenBase, customer: JobCustomer, tokenizer: Any, rows: list[Any]) -> Prefix:
    """The untrained prefix that the customer's settings ask for."""
    settings, seed = customer.prefix, customer.training.seed
    base.check_length(settings.length, 0)
    if settings.init == "zeros":
        return from_zeros(base, settings.length)
    if settings.init == "random":
        return from_random(base, settings.length, seed)
    if settings.init_text is not None:
        return from_text(base, tokenizer(settings.init_text, add_special_tokens=False)["input_ids"], settings.length)
    return from_text(base, _sampled_text(rows, settings.length, seed), settings.length)


def _sampled_text(rows: list[TokenRow], length: int, seed: int) -> list[int]:
    """Whole training rows, drawn with the seed, until they fill the prefix."""
    ids: list[int] = []
    for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        ids += rows[i].prompt_ids + rows[i].target_ids
        if len(ids) >= length:
            break
    return ids


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
    job: Job, customer: JobCustomer, base: FrozenBase, trained: Trained, card: dict[str, Any], run_id: str | None
) -> dict[str, Any]:
    """The content of prefix.json: everything that serving, evaluation and registration need to know of a prefix."""
    return {
        "customer": customer.customer,
        "task": customer.task,
        "digest": customer.train_digest,
        "prefix": {
            **dataclasses.asdict(customer.prefix),
            "sites": {name: dataclasses.asdict(site) for name, site in base.sites.items()},
            "parameters": sum(key.numel() + value.numel() for key, value in trained.prefix.values()),
        },
        "prompt": dataclasses.asdict(customer.prompt),
        "chat": card["prompt"]["chat"],
        "base": {
            "id": job.base.id,
            "path": job.base.path,
            "revision": job.base.revision,
            "digest": job.base.digest,
            "model_type": base.model.config.model_type,
            "is_encoder_decoder": base.is_encoder_decoder,
            "tokenizer_digest": card["tokenizer_digest"],
            "dtype": str(base.model.dtype).removeprefix("torch."),
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
            "data_fingerprint": customer.data_fingerprint,
            "config_digest": customer.config_digest,
            "seed": customer.training.seed,
            "code_version": code_version(),
            "parent": None,
            "counts": card["counts"],
        },
        "run_id": run_id,
    }
