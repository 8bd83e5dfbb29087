"""Progress of a stage, for a person or for the process above.

A stage that runs as a child of a flow prints one line of JSON a step, which the flow turns into bars (`PREFIXFLEET_PROGRESS=json`). Run by hand
it draws a bar on a terminal and prints plain lines elsewhere. Standard library and tqdm (which transformers needs anyway).
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

MARK = "@prefixfleet "


def described(info: Mapping[str, Any], most: int = 4) -> str:
    """What an event says beside its count, in a line: `3 done, 10 resident, 5 queued  8,123 tokens/s  loss acme 2.13, bistro 1.98, … 8 more`.

    Args:
        info: `customers` (name of a state -> how many), `tokens_per_second`, `losses` (customer -> loss), or anything else, shown by its name.
        most: how many customers' losses are shown.
    """
    parts = []
    for name, value in info.items():
        if name == "customers" and isinstance(value, Mapping):
            parts.append(", ".join(f"{count} {state}" for state, count in value.items()))
        elif name == "tokens_per_second":
            parts.append(f"{value:,.0f} tokens/s")
        elif name == "losses" and isinstance(value, Mapping):
            shown = [f"{customer} {loss:.2f}" for customer, loss in list(value.items())[:most]]
            more = [f"… {len(value) - most} more"] if len(value) > most else []
            if shown:
                parts.append("loss " + ", ".join([*shown, *more]))
        else:
            parts.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(parts)


def time_left(seconds: float, done: int, left: int) -> str:
    """`about 2:05 left`, from what took `seconds` so far; empty while nothing can be said."""
    if done <= 0 or left <= 0:
        return ""
    minutes, rest = divmod(round(seconds * left / done), 60)
    hours, minutes = divmod(minutes, 60)
    return f"about {hours}:{minutes:02d}:{rest:02d} left" if hours else f"about {minutes}:{rest:02d} left"


def _say(line: str) -> None:
    """Print a line. Whoever read it may be gone: a flow that was killed must not keep us from writing a last checkpoint."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


class Progress:
    """One bar: `stage` of `total` units. Use as a context manager.

    Args:
        stage: `prepare`, `train`, `evaluate` or `register`.
        total: number of units.
        unit: what is counted, in the plural (`steps`, `rows`, `customers`).
    """

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, 0
        self._as_json = os.environ.get("PREFIXFLEET_PROGRESS") == "json"
        self._last_line = 0.0
        self._started = time.monotonic()
        self._skipped = 0
        self._bar: Any = None
        if not self._as_json and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=stage, unit=f" {unit}", dynamic_ncols=True)
        self._emit(force=True)

    def update(self, n: int = 1, **info: Any) -> None:
        """Count `n` more units; `info` is shown behind the bar, see `described`."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix_str(described(info), refresh=False)
            self._bar.update(n)
        else:
            self._emit(info, force=self.done >= self.total)

    def expect(self, total: int) -> None:
        """Correct the number of units, once it is known."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def skip(self, n: int) -> None:
        """Note that `n` units, counted or about to be, were or will be no work of this process: they say nothing about the time that is left."""
        self._skipped += n
        if self._bar is not None:
            self._bar.initial += n

    def reach(self, done: int, skipped: int = 0, **info: Any) -> None:
        """As `update`, with the number of units done in all; `skipped` of them see `skip`."""
        if skipped:
            self.skip(skipped)
        self.update(done - self.done, **info)

    def message(self, customer: str, status: str, text: str) -> None:
        """Say that something happened to a customer, e.g. `("acme", "failed", "loss is NaN")`."""
        if self._as_json:
            self._print_json({"stage": self.stage, "customer": customer, "status": status, "text": text})
        elif self._bar is not None:
            self._bar.write(f"{self.stage} {customer}: {status}: {text}")
        else:
            _say(f"{self.stage} {customer}: {status}: {text}")

    def _emit(self, info: dict[str, Any] | None = None, force: bool = False) -> None:
        # A line a step floods a log: JSON at most five times a second, plain lines every five seconds.
        now = time.monotonic()
        if self._bar is not None or (not force and now - self._last_line < (0.2 if self._as_json else 5.0)):
            return
        self._last_line = now
        skipped = {"skipped": self._skipped} if self._skipped else {}
        if self._as_json:
            self._print_json(
                {"stage": self.stage, "done": self.done, "total": self.total, "unit": self.unit, **skipped, **(info or {})}
            )
        else:
            left = time_left(now - self._started, self.done - self._skipped, self.total - self.done)
            _say("  ".join(filter(None, [f"{self.stage}: {self.done}/{self.total} {self.unit}", left, described(info or {})])))

    @staticmethod
    def _print_json(content: dict[str, Any]) -> None:
        _say(MARK + json.dumps(content))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
