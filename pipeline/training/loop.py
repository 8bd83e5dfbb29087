"""Train the prefix of one customer on a frozen base.

In: prepared rows, a parameterisation of the prefix (`pipeline.prefix.parameterise`) and the customer's settings. Out: the best prefix by dev
loss as flat keys and values, and what happened on the way. Knows nothing of files, MLflow or other customers.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

from pipeline.errors import TrainingError
from pipeline.prefix import FrozenBase, Prefix, PrefixBank
from pipeline.training.batches import TokenRow, target_loss
from pipeline.training.job import JobTraining

# Called after every step and every dev loss with {"step": …, "loss": …, …} or {"step": …, "dev_loss": …}.
OnLog = Callable[[dict[str, float]], None]

DEV_BATCH = 32


@dataclass
class Trained:
    """Outcome for one customer.

    Attributes:
        prefix: the one with the lowest dev loss.
        steps: optimiser steps taken.
        best_step: the step after which `prefix` was taken; 0 means that training never improved on the initial prefix.
        best_dev_loss, train_loss: mean cross-entropy per target token, in nats.
        history: what `on_log` was given.
    """

    prefix: Prefix
    steps: int
    best_step: int
    best_dev_loss: float
    train_loss: float
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    base: FrozenBase,
    method: nn.Module,
    infix: bool,
    train_rows: Sequence[TokenRow],
    dev_rows: Sequence[TokenRow],
    settings: JobTraining,
    pad: int,
    accelerator: Accelerator,
    on_log: OnLog | None = None,
) -> Trained:
    """AdamW on the parameters of the prefix, dev loss every `eval_every` steps, early stopping, best prefix kept.

    With several processes each takes its share of every batch; the gradient, and so the prefix, is that of the whole batch.

    Args:
        base: the frozen base.
        method: gives the keys and values of each site, [2, heads_kv, P, head_dim], from its parameters; it begins as the untrained prefix.
        infix: whether the columns stand between prompt and target.
        train_rows: what is learned from.
        dev_rows: what decides which step was best.
        settings: of the optimiser and the loop.
        pad: the padding token.
        accelerator: knows of the other processes.
        on_log: see `OnLog`.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    started = time.monotonic()
    with torch.no_grad():
        length = next(iter(method().values())).shape[2]
    longest = max(len(r.prompt_ids) + len(r.target_ids) for r in (*train_rows, *dev_rows)) if not base.is_encoder_decoder else 0
    base.check_length(length, longest)
    optimizer = torch.optim.AdamW(method.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    # transformers calls the constant schedule that can warm up by another name.
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    scheduler: Any = get_scheduler(name, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.max_steps)
    history: list[dict[str, float]] = []

    def log(entry: dict[str, float]) -> None:
        history.append(entry)
        if on_log is not None:
            on_log(entry)

    def now() -> PrefixBank:
        """A bank of one slot with the prefix as it stands."""
        return PrefixBank.of(base.sites, [method()], [infix])

    with torch.no_grad():
        bank = now()
    best_loss = dev_loss(base, bank, dev_rows, pad, accelerator)
    best, best_step, without_improvement = bank.take(0), 0, 0
    log({"step": 0, "dev_loss": best_loss})
    loss = math.nan
    step = 0
    batches = _batches(train_rows, settings.batch_size, settings.seed)
    for step in range(1, settings.max_steps + 1):
        rows = next(batches)
        loss, norm = _step(base, now(), method, rows, pad, accelerator, settings.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {loss} and gradient norm {norm} are not finite. Lower training.lr (now {settings.lr}) or look at the data."
            )
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log(
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens": sum(len(r.prompt_ids) + len(r.target_ids) for r in rows),
            }
        )
        if step % settings.eval_every == 0 or step == settings.max_steps:
            with torch.no_grad():
                bank = now()
            current = dev_loss(base, bank, dev_rows, pad, accelerator)
            log({"step": step, "dev_loss": current})
            if current < best_loss:
                best_loss, best, best_step, without_improvement = current, bank.take(0), step, 0
            else:
                without_improvement += 1
                if settings.early_stopping is not None and without_improvement >= settings.early_stopping:
                    break
    return Trained(best, step, best_step, best_loss, loss, time.monotonic() - started, history)


def _step(
    base: FrozenBase,
    bank: PrefixBank,
    method: nn.Module,
    rows: Sequence[TokenRow],
    pad: int,
    accelerator: Accelerator,
    max_norm: float,
) -> tuple[float, float]:
    """One backward pass over a batch: leaves the clipped gradient in `method`; returns mean loss per target token and gradient norm."""
    tokens = sum(len(row.target_ids) for row in rows)  # known to every process, so that shares add up to the batch's own mean
    total = torch.zeros((), device=base.device)
    share = _share(rows, accelerator)
    if share:
        with base.prefixes(bank, torch.zeros(len(share), dtype=torch.int64, device=base.device)):
            loss, _ = target_loss(base, share, pad)
            (loss / tokens).backward()
        total = loss.detach()
    if accelerator.num_processes > 1:
        for parameter in method.parameters():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = accelerator.reduce(gradient, reduction="sum")
        total = accelerator.reduce(total, reduction="sum")
    norm = torch.nn.utils.clip_grad_norm_(method.parameters(), max_norm)
    return float(total) / tokens, float(norm)


@torch.no_grad()
def dev_loss(base: FrozenBase, bank: PrefixBank, rows: Sequence[TokenRow], pad: int, accelerator: Accelerator) -> float:
    """Mean cross-entropy per target token over all dev rows."""
    ordered = _share(sorted(rows, key=lambda r: len(r.prompt_ids) + len(r.target_ids)), accelerator)  # like lengths together
    total = torch.zeros((), device=base.device, dtype=torch.float64)
    for i in range(0, len(ordered), DEV_BATCH):
        batch = ordered[i : i + DEV_BATCH]
        with base.prefixes(bank, torch.zeros(len(batch), dtype=torch.int64, device=base.device)):
            total += target_loss(base, batch, pad)[0].double()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, reduction="sum")
    return float(total) / sum(len(r.target_ids) for r in rows)


def _share(rows: Sequence[TokenRow], accelerator: Accelerator) -> Sequence[TokenRow]:
    return rows[accelerator.process_index :: accelerator.num_processes]


def _batches(rows: Sequence[TokenRow], size: int, seed: int) -> Iterator[list[TokenRow]]:
    """Batches without end: every epoch in an order of its own, drawn from the seed; batches run on over epoch ends."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[TokenRow] = []
    while True:
        while len(waiting) < size:
            waiting += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]
