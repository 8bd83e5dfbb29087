"""One customer in training: all that belongs to it and to nobody else.

In: its rows, the parameterisation of its prefix, its settings. Out: the rows of its next step, its prefix as it stands, its best prefix; and its
whole state as tensors and plain values, from which it goes on as if nothing had happened. Knows nothing of slots, neighbours, files or the base.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import TrainingError
from pipeline.prefix.bank import Flat, Prefix
from pipeline.training.batches import TokenRow, grouped
from pipeline.training.job import JobTraining

# Called with {"step": …, "loss": …, …} after every step and {"step": …, "dev_loss": …} after every dev loss.
OnLog = Callable[[dict[str, float]], None]

MOST_DIVERGED = 3  # steps in a row that are not finite, after which a customer is given up


class Resident:
    """A customer while it is trained.

    Attributes:
        step: optimiser steps taken, those skipped for a loss or gradient that is not finite included.
        drawn: training rows drawn so far, epoch after epoch: the data cursor.
        lr_factor: what the scheduled learning rate is multiplied with; halved by every skipped step.
        diverged: steps skipped in a row.
        dev_step: the step of the newest dev loss; -1 before the first.
        best, best_step, best_dev_loss: the prefix with the lowest dev loss; step 0 is the initial one.
        without_improvement: dev losses in a row that were no better.
        train_loss: of the last step, mean cross-entropy per target token in nats.
        history: every entry that `on_log` was given.
        seconds: time spent on it, as its share of what was computed.
    """

    def __init__(
        self,
        method: nn.Module,
        infix: bool,
        train_rows: Sequence[TokenRow],
        dev_rows: Sequence[TokenRow],
        settings: JobTraining,
        on_log: OnLog | None = None,
    ) -> None:
        """Take the customer up before its first step.

        Args:
            method: gives the keys and values of each site, [2, heads_kv, P, head_dim], from its parameters; it begins as the untrained prefix.
            infix: whether the columns stand between prompt and target.
            train_rows: what is learned from.
            dev_rows: what decides which step was best.
            settings: of the optimiser and the loop.
            on_log: see `OnLog`.
        """
        self.method, self.infix, self.train_rows, self.dev_rows, self.settings = method, infix, train_rows, dev_rows, settings
        self.on_log = on_log
        self.parameters = list(method.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self._schedule = _schedule(settings)
        self.step = 0
        self.drawn = 0
        self.lr_factor = 1.0
        self.diverged = 0
        self.dev_step = -1
        self.best: Prefix = {}
        self.best_step = 0
        self.best_dev_loss = math.inf
        self.without_improvement = 0
        self.train_loss = math.nan
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.dev_tokens = sum(len(row.target_ids) for row in dev_rows)
        self._orders: dict[int, list[int]] = {}

    @property
    def effective_batch(self) -> int:
        """Rows per optimiser step."""
        return self.settings.batch_size * self.settings.gradient_accumulation_steps

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.settings.lr * self._schedule(self.step) * self.lr_factor

    @property
    def needs_dev_loss(self) -> bool:
        """Whether the prefix as it stands has to be judged before training goes on."""
        last = self.step == self.settings.max_steps
        return self.dev_step != self.step and (self.step % self.settings.eval_every == 0 or last)

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to train. True only after the dev loss that belongs to it."""
        if self.needs_dev_loss:
            return False
        patience = self.settings.early_stopping
        return self.step >= self.settings.max_steps or (patience is not None and self.without_improvement >= patience)

    def next_rows(self) -> list[TokenRow]:
        """The effective batch of the next step. The same until `take_step` moves the cursor.

        Every epoch has an order of its own, drawn from the seed; batches run on over the ends of epochs.
        """
        size = len(self.train_rows)
        return [self.train_rows[self._order(i // size)[i % size]] for i in range(self.drawn, self.drawn + self.effective_batch)]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.settings.seed)
            # The epochs before are drawn again after a restart only, and thrown away.
            order = [self._drawn_order(each, generator) for each in range(epoch + 1)][-1]
            self._orders = {epoch: order} | {e: o for e, o in self._orders.items() if e == epoch - 1}
        return self._orders[epoch]

    def _drawn_order(self, epoch: int, generator: torch.Generator) -> list[int]:
        order: list[int] = torch.randperm(len(self.train_rows), generator=generator).tolist()
        if self.settings.train_sampling_strategy == "random":
            return order
        batch = self.effective_batch
        return grouped(self.train_rows, order, batch, -epoch * len(order) % batch, generator)

    def flat(self) -> Flat:
        """The prefix as it stands, with gradients to its parameters."""
        flat: Flat = self.method()
        return flat

    def backward(self, flat: Flat, gradients: Flat) -> torch.Tensor:
        """Bring the gradients of keys and values to the parameters, and clip them.

        Args:
            flat: what `flat()` gave for this step.
            gradients: of the loss with respect to it, same sites and shapes.

        Returns:
            the norm before clipping, a scalar.
        """
        self.optimizer.zero_grad()
        sites = list(flat)
        torch.autograd.backward([flat[site] for site in sites], [gradients[site] for site in sites])
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)

    def take_step(self, loss: float, norm: float, facts: dict[str, float]) -> str | None:
        """Apply the clipped gradients; or, where loss or gradient is not finite, skip the step and halve the learning rate.

        Args:
            loss: mean cross-entropy per target token of the effective batch.
            norm: of its gradient, before clipping.
            facts: more for the log entry.

        Returns:
            what to tell about a skipped step, or None.

        Raises:
            TrainingError: `MOST_DIVERGED` steps in a row were not finite.
        """
        lr = self.lr
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.drawn += self.effective_batch
        if finite:
            self.diverged, self.train_loss = 0, loss
            self._log({"step": self.step, "loss": loss, "lr": lr, "grad_norm": norm, **facts})
            return None
        self.lr_factor /= 2
        self.diverged += 1
        self._log({"step": self.step, "lr": lr, "skipped": 1.0, **facts})
        what = f"step {self.step}: loss {loss:g} and gradient norm {norm:g} are not finite"
        if self.diverged >= MOST_DIVERGED:
            raise TrainingError(
                f"{what}, for the {MOST_DIVERGED}rd time in a row. Lower training.lr (now {self.settings.lr:g}) or look at the data."
            )
        return f"{what}: step skipped, learning rate halved to {self.settings.lr * self.lr_factor:g}"

    def judge(self, loss: float, take: Callable[[], Prefix]) -> None:
        """Take note of the dev loss of the prefix as it stands; `take` gives a copy of that prefix."""
        self.dev_step = self.step
        if loss < self.best_dev_loss:
            self.best_dev_loss, self.best_step, self.best, self.without_improvement = loss, self.step, take(), 0
        elif self.step > 0:
            self.without_improvement += 1
        self._log({"step": self.step, "dev_loss": loss} if math.isfinite(loss) else {"step": self.step, "dev_skipped": 1.0})

    def _log(self, entry: dict[str, float]) -> None:
        self.history.append(entry)
        if self.on_log is not None:
            self.on_log(entry)

    _COUNTERS = ("step", "drawn", "lr_factor", "diverged", "dev_step", "best_step", "without_improvement", "history", "seconds")

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that is not given to `__init__`: tensors, and plain values that JSON can hold (None stands for no number yet).

        The random state is the seed and the cursor: nothing else is drawn during training.
        """
        tensors = {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{i}.{name}"] = value
        for site, (key, value) in self.best.items():
            tensors[f"best.{site}.key"], tensors[f"best.{site}.value"] = key, value
        plain = {name: getattr(self, name) for name in self._COUNTERS}
        for name in ("best_dev_loss", "train_loss"):
            number = getattr(self, name)
            plain[name] = number if math.isfinite(number) else None
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, plain

    def restore(self, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Go back to what `state` gave."""
        method = {name.removeprefix("method."): tensor for name, tensor in tensors.items() if name.startswith("method.")}
        self.method.load_state_dict(method)
        for i, parameter in enumerate(self.parameters):
            held = {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"adam.{i}.")}
            # The step count stays on the CPU, as AdamW itself keeps it.
            self.optimizer.state[parameter] = {
                n: t.clone() if n == "step" else t.to(parameter.device, copy=True) for n, t in held.items()
            }
        sites = [n.removeprefix("best.").removesuffix(".key") for n in tensors if n.startswith("best.") and n.endswith(".key")]
        self.best = {site: (tensors[f"best.{site}.key"], tensors[f"best.{site}.value"]) for site in sites}
        for name in self._COUNTERS:
            setattr(self, name, plain[name])
        self.best_dev_loss = math.inf if plain["best_dev_loss"] is None else plain["best_dev_loss"]
        self.train_loss = math.nan if plain["train_loss"] is None else plain["train_loss"]


def _schedule(settings: JobTraining) -> Callable[[int], float]:
    """The share of `lr` as a function of the steps taken, so that there is no state to keep: transformers' schedules of the same names.

    Not taken from there: importing `transformers.get_scheduler` imports PEFT and what that imports, a second of every start.
    """
    warmup, last = settings.warmup_steps, settings.max_steps

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        if settings.schedule == "constant":
            return 1.0
        span = max(1, last - warmup)
        if settings.schedule == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / span)))
        return max(0.0, (last - step) / span)

    return factor
