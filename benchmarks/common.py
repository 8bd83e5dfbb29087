"""What every benchmark here does alike: say where it ran, let alternatives take turns, keep the spread, print lines of JSON and a table.

Lines of JSON go to standard output, one for each row, each with the machine, the versions and the seed, so that a line can be read by itself; bars
and the table go to standard error. Needs the standard library and tqdm alone; torch and what else is measured is looked up where it is loaded.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SEED = 0
PAGE = ROOT / "docs" / "benchmarks.md"

# What makes matrix products fast or slow.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "mlflow", "prefect", "deepspeed")

# Values of one measurement by name, all of them numbers.
Run = dict[str, float]
# Heading, and what of a row stands below it.
Column = tuple[str, Callable[[dict[str, Any]], str]]


def machine() -> dict[str, Any]:
    """What has to be known to compare a figure with another machine's. `load` is of the last minute: others at work make wall-clock seconds long."""
    cpu = platform.processor() or platform.machine()
    features: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
        named = {name.strip(): value.strip() for name, _, value in reversed(lines)}
        cpu, features = named.get("model name", cpu), set(named.get("flags", "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = sys.modules.get("torch")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu, "features": [name for name in _FEATURES if name in features], "cores": cores,
        "threads": torch.get_num_threads() if torch is not None else None, "memory_gib": round(memory, 1), "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that are measured and are installed, and of Python."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Bench:
    """The rows of one run."""

    def __init__(self, name: str, arguments: argparse.Namespace, **setting: Any) -> None:
        """Begin.

        Args:
            name: of the script.
            arguments: of `parser`: `json`, a file that the lines are appended to, and `docs`, whether the table is for docs/benchmarks.md.
            setting: what holds for all rows, such as dtype and rounds.
        """
        self.name, self.json_file, self.docs = name, arguments.json, arguments.docs
        self.setting = {**setting, "seed": SEED, "machine": machine(), "versions": versions()}
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row, and print it."""
        self.rows.append(row)
        line = json.dumps({**row, **self.setting})
        print(line, flush=True)
        if self.json_file is not None:
            with self.json_file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        return row

    def where(self) -> str:
        """The machine, the versions and the settings, in words."""
        of = self.setting["machine"]
        told = [
            of["gpu"],
            of["cpu"],
            " ".join(of["features"]),
            f"{of['cores']} cores",
            f"{of['memory_gib']} GiB",
            f"load {of['load']} at the start",
        ]
        told.append("OMP_NUM_THREADS=" + os.environ.get("OMP_NUM_THREADS", "unset"))
        packages = ", ".join(f"{name} {version}" for name, version in self.setting["versions"].items())
        settings = ", ".join(f"{name} {value}" for name, value in self.setting.items() if name not in ("machine", "versions"))
        return f"{', '.join(filter(None, told))}; {packages}; {settings}"

    def show(self, columns: Sequence[Column], part: str = "") -> None:
        """Print where it ran and a table of all rows; with --docs write both between the marks of docs/benchmarks.md.

        Args:
            columns: of the table.
            part: of a script that has several tables there.
        """
        print(f"\n{self.where()}\n{aligned(columns, self.rows)}", file=sys.stderr)
        if self.docs:
            # Paths of this machine are nobody's business.
            words = [word for before, word in pairwise(sys.argv) if "--json" not in (before, word) and word != "--docs"]
            given = " ".join(words).replace(f"{SHARED}/", "../shared/")
            told = self.where().replace(f"{SHARED}/", "../shared/")
            text = f"`python benchmarks/{self.name}.py {given}".rstrip() + f"`: {told}.\n\n{markdown(columns, self.rows)}"
            write_between(PAGE, f"benchmarks/{self.name}.py{part}", text)


def aligned(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    cells = [[name for name, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def markdown(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """The same for a page."""
    lines = [
        [name for name, _ in columns],
        ["---", *["---:"] * (len(columns) - 1)],
        *([show(row) for _, show in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_between(page: Path, marker: str, text: str) -> list[str]:
    """Put `text` between `<!-- marker -->` and `<!-- end -->` of a page; returns the lines that change, behind - and +.

    Raises:
        SystemExit: the page has no such place.
    """
    begin, end = f"<!-- {marker} -->\n", "<!-- end -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    old, ended, after = rest.partition(end)
    if not (found and ended):
        sys.exit(f"{page}: has no lines {begin.strip()} and {end.strip()}, between which the figures would stand")
    changed = [f"-{line}\n" for line in old.splitlines() if line not in text.splitlines()]
    changed += [f"+{line}\n" for line in text.splitlines() if line not in old.splitlines()]
    if old != text:
        page.write_text(before + begin + text + end + after, encoding="utf-8")
    return changed


def timed(measure: Callable[[], Run | None]) -> Run:
    """What `measure` found, with the wall-clock and CPU seconds that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = measure() or {}
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, **found}


def in_turn(kinds: Mapping[str, Callable[[], Run]], rounds: int, what: str = "") -> dict[str, list[Run]]:
    """What each kind measured, A B A B …, for a machine's speed drifts and others may be at work on it."""
    found: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for kind, measure in bar([pair for _ in range(rounds) for pair in kinds.items()], what):
        found[kind].append(measure())
    return found


def bar(todo: Sequence[Any], what: str) -> Iterator[Any]:
    """`todo`, with a bar."""
    yield from tqdm(todo, desc=what, file=sys.stderr, disable=None, leave=False)


def spread(runs: Sequence[Run]) -> dict[str, Any]:
    """The median of each figure, and as `<name>_range` the least and the most."""
    names = list(runs[0])
    medians: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in names}
    return medians | {f"{name}_range": [min(run[name] for run in runs), max(run[name] for run in runs)] for name in names}


def parser(doc: str | None, *, rounds: int | None = 3) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="append the lines of JSON to this file too")
    made.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    if rounds is not None:
        text = f"how often all alternatives are measured in turn (default: {rounds})"
        made.add_argument("--rounds", type=int, default=rounds, help=text)
    return made


def child_environment(**more: str) -> dict[str, str]:
    """That of the processes that PrefixFleet starts for training and evaluation, and what those set by themselves (`prepare_process`), for peers."""
    from flows.launch import environment
    from pipeline.config import LaunchSettings
    from pipeline.process import as_environment

    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    ours = ("PREFIXFLEET_PROGRESS", "PREFIXFLEET_EXIT_WITH_PARENT")  # those two are about talking to the flow
    found = {name: value for name, value in environment(LaunchSettings()).items() if name not in ours}
    return {**as_environment(found), **found, **quiet, **more}


def in_child_environment() -> None:
    """Start this script again in `child_environment`, unless it is: OpenMP looks at its own only once."""
    if os.environ.get("PREFIXFLEET_BENCHMARK") is None:
        os.execve(sys.executable, [sys.executable, *sys.argv], child_environment(PREFIXFLEET_BENCHMARK="1"))
