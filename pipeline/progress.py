"""Progress of a stage, for a person or for the process above.

A stage that runs as a child of a flow prints one line of JSON a step, which the flow turns into bars (`PREFIXFLEET_PROGRESS=json`). Run by hand
it draws a bar on a terminal and prints plain lines elsewhere. Standard library and tqdm (which transformers needs anyway).
"""

import json
import os
import sys
import time
from typing import Any

MARK = "@prefixfleet "


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
        self._bar: Any = None
        if not self._as_json and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=stage, unit=f" {unit}", dynamic_ncols=True)
        self._emit(force=True)

    def update(self, n: int = 1, **info: Any) -> None:
        """Count `n` more units; `info` (say `customer="acme", loss=2.1`) is shown behind the bar."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in info.items()}, refresh=False)
            self._bar.update(n)
        else:
            self._emit(info, force=self.done >= self.total)

    def message(self, customer: str, status: str, text: str) -> None:
        """Say that something happened to a customer, e.g. `("acme", "failed", "loss is NaN")`."""
        if self._as_json:
            self._print_json({"stage": self.stage, "customer": customer, "status": status, "text": text})
        elif self._bar is not None:
            self._bar.write(f"{self.stage} {customer}: {status}: {text}")
        else:
            print(f"{self.stage} {customer}: {status}: {text}", flush=True)

    def _emit(self, info: dict[str, Any] | None = None, force: bool = False) -> None:
        # A line a step floods a log: JSON at most five times a second, plain lines every five seconds.
        now = time.monotonic()
        if self._bar is not None or (not force and now - self._last_line < (0.2 if self._as_json else 5.0)):
            return
        self._last_line = now
        if self._as_json:
            self._print_json({"stage": self.stage, "done": self.done, "total": self.total, "unit": self.unit, **(info or {})})
        else:
            shown = "".join(f" {k}={v:.3f}" if isinstance(v, float) else f" {k}={v}" for k, v in (info or {}).items())
            print(f"{self.stage}: {self.done}/{self.total} {self.unit}{shown}", flush=True)

    @staticmethod
    def _print_json(content: dict[str, Any]) -> None:
        print(MARK + json.dumps(content), flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
