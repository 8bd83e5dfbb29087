"""Seconds of the commands that answer at once, from starting the process to its end, CPU seconds and wall-clock.

    make run && python benchmarks/startup.py

`status` is asked about the home that `make run` fills, or another one that has registered customers (--home).
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common

COMMANDS = (("--help",), ("run", "--help"), ("status",), ("status", "--json"))


def took(command: Sequence[str], home: Path) -> common.Run:
    """One start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_TRACKING", "PREFECT_"))}
    before, since = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *command], env={**environment, "PREFIXFLEET_HOME": str(home)}, cwd=common.ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    seconds, after = time.perf_counter() - since, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"prefixfleet {' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = common.parser(__doc__, rounds=7)
    parser.add_argument(
        "--home",
        type=Path,
        default=common.ROOT / ".prefixfleet",
        help="with registered customers (default: .prefixfleet of the checkout)",
    )
    arguments = parser.parse_args(argv)
    home = arguments.home.resolve()
    if not (home / "mlflow.db").is_file():
        parser.error(f"{home}: has no registry; `make run` makes one with five customers, or give another home with --home")
    for command in COMMANDS:  # files are read into memory, bytecode is written
        took(command, home)
    bench = common.Bench("startup", arguments, rounds=arguments.rounds)
    kinds = {" ".join(command): partial(took, command, home) for command in COMMANDS}
    for name, runs in common.in_turn(kinds, arguments.rounds, "startup").items():
        bench.add({"command": name, **common.spread(runs)})
    bench.show(COLUMNS)


COLUMNS: list[common.Column] = [
    ("command", lambda row: f"prefixfleet {row['command']}"),
    ("seconds", lambda row: f"{row['seconds']:.2f}"),
    ("least to most", lambda row: "{:.2f} to {:.2f}".format(*row["seconds_range"])),
    ("CPU seconds", lambda row: f"{row['cpu_seconds']:.2f}"),
]


if __name__ == "__main__":
    main()
