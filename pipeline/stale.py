"""Files on this machine that nobody needs any more: checkpoints of jobs long over, prefixes and evaluations that were superseded, what is left of
customers who are gone, temporary files of processes that were killed.

In: the layout of `PREFIXFLEET_HOME` (docs/files.md), the digests that are still in use, the retention rule. Out: `Removal`s. Age is that of the
youngest file in a folder, and whatever is removed can be made again from the customer's data or fetched from the registry. Knows nothing of MLflow.
"""

import contextlib
import functools
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.errors import ConfigError, PrefixFleetError, StorageError
from pipeline.files import read_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.leftovers import NOT_BY_CUSTOMER, delete
from pipeline.removal import Removal

_DAY = 86_400.0
# A file is written within minutes; a temporary one as old as this was left by a process that was killed.
_ABANDONED_DAYS = 1.0
_OTHERS = ("mlartifacts", "prefect")


@dataclass(frozen=True)
class InUse:
    """What must stay, whatever its age.

    Attributes:
        digests: of each customer of the fleet, the prefixes that its settings and data ask for now or that the registry may ask for.
        gone: customers who were in the fleet and are in none of this machine now.
        shared: customers whom another fleet of this machine has too, whose settings may ask for any prefix that is here.
    """

    digests: Mapping[CustomerKey, Collection[str]]
    gone: Collection[CustomerKey]
    shared: Collection[CustomerKey] = ()


def stale_files(home: Home, in_use: InUse, days: float, checkpoints_days: float, now: float) -> Iterator[Removal]:
    """What may go.

    Args:
        home: whose files.
        in_use: what must stay.
        days: how long all but jobs stay.
        checkpoints_days: how long the folder of a job stays after it was last written to.
        now: seconds since the epoch.
    """
    known = set(in_use.digests) | set(in_use.gone)
    yield from _jobs(home, known, checkpoints_days, now)
    for key in sorted(in_use.digests):
        if key not in in_use.shared:
            yield from _superseded(home, key, in_use.digests[key], days, now)
        for inner, what in ((Home(home.sweep(key)), "sweep"), (Home(home.drift(key)), "drift check")):
            yield from _jobs(inner, None, checkpoints_days, now, key)
            yield from _inner(inner, key, what, days, now)
    for key in sorted(in_use.gone):
        yield from _gone(home, key, days, now)
    yield from _temporary(home, now)


def _jobs(
    home: Home, known: Collection[CustomerKey] | None, days: float, now: float, owner: CustomerKey | None = None
) -> Iterator[Removal]:
    """Folders of jobs, if all their customers are known here: another fleet may have its jobs in the same home."""
    for folder in sorted((home.root / "jobs").glob("*/")):
        keys = {owner} if owner is not None else job_members(folder)
        if known is None or (keys and keys <= set(known)):
            yield from _old(home, folder, "checkpoint", f"job {folder.name}", keys, days, now, "was last written to")


def job_members(folder: Path) -> set[CustomerKey]:
    """The customers of a job: those whom its files name, who may wait for a place yet, and those of whom there is a folder."""
    members = set()
    for place in folder.glob("*/*/"):
        with contextlib.suppress(ConfigError):
            members.add(CustomerKey(place.parent.name, place.name))
    wrong = (PrefixFleetError, OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError)
    if (folder / "part.json").is_file():
        with contextlib.suppress(*wrong):
            members |= {CustomerKey.parse(key) for key, _ in read_json(folder / "part.json", 1)["members"]}
    else:  # which names those alone who were due last, and takes long to read
        with contextlib.suppress(*wrong):
            content = yaml.safe_load((folder / "job.yaml").read_text(encoding="utf-8"))
            members |= {CustomerKey(one["customer"], one["task"]) for one in content["customers"]}
    return members


def _superseded(home: Home, key: CustomerKey, digests: Collection[str], days: float, now: float) -> Iterator[Removal]:
    """Prefixes that are not in use, and evaluations of such."""
    short = {digest[:16] for digest in digests}
    for folder in sorted(key.below(home.root / "prefixes").glob("[0-9a-f]*/")):
        if folder.name not in short:
            yield from _old(
                home, folder, "prefix", f"prefix {folder.name} of {key}", {key}, days, now, "superseded, and was made"
            )
    for folder in sorted(key.below(home.root / "evaluations").glob("[0-9a-f]*/")):
        try:
            judged = str(read_json(folder / "metrics.json", 1)["prefix_digest"])
        except (StorageError, KeyError):
            judged = ""  # damaged: whoever needs it makes it anew
        if judged not in digests:
            what = f"evaluation {folder.name} of {key}"
            yield from _old(home, folder, "evaluation", what, {key}, days, now, "of a prefix that was superseded, and was made")


def _inner(home: Home, key: CustomerKey, what: str, days: float, now: float) -> Iterator[Removal]:
    """Prefixes and evaluations in a home that a sweep or a drift check has to itself. Its reports stay."""
    for kind, room in (("prefix", "prefixes"), ("evaluation", "evaluations"), ("data", "prepared")):
        for folder in sorted((home.root / room).glob("*/*/*/" if room != "prepared" else "*/*/")):
            yield from _old(home, folder, kind, f"{room} {folder.name} of a {what} of {key}", {key}, days, now, "was made")


def _gone(home: Home, key: CustomerKey, days: float, now: float) -> Iterator[Removal]:
    """All that stages keep of one who is in no fleet any more. What is registered stays, and serves on, from the cache."""
    rooms = [room for room in sorted(home.root.glob("*/")) if room.name not in NOT_BY_CUSTOMER]
    places = [place for room in rooms for place in (key.below(room), key.below(room).with_suffix(".json"))]
    for place in places:
        if place.exists():
            what = f"{place.relative_to(home.root)}"
            yield from _old(
                home, place, "data", what, {key}, days, now, f"{key} is in no fleet file here any more, and it was written"
            )


def _temporary(home: Home, now: float) -> Iterator[Removal]:
    for folder, folders, files in os.walk(home.root):
        if Path(folder) == home.root:
            folders[:] = [name for name in folders if name not in _OTHERS]
        found = [name for name in (*folders, *files) if name.startswith(".") and name.endswith((".tmp", ".old"))]
        folders[:] = [name for name in folders if name not in found]
        for name in found:
            place = Path(folder) / name
            what = str(place.relative_to(home.root))
            yield from _old(
                home, place, "temporary", what, set(), _ABANDONED_DAYS, now, "left by a process that was killed, and was written"
            )


def _old(
    home: Home, place: Path, kind: str, name: str, keys: Collection[CustomerKey | None], days: float, now: float, why: str
) -> Iterator[Removal]:
    """`place`, if its youngest file is older than `days`."""
    try:
        youngest, size = _measured(place)
    except OSError:
        return  # removed under us
    age = (now - youngest) / _DAY
    if age >= days:
        whose = frozenset(key for key in keys if key is not None)
        yield Removal(kind, name, f"{why} {age:.1f} days ago", whose, home, functools.partial(_remove, place, youngest), size)


def _measured(place: Path) -> tuple[float, int]:
    """The time of the last change in a file or folder, and its size in bytes."""
    files = [place, *place.rglob("*")] if place.is_dir() else [place]
    found = [file.lstat() for file in files]
    return max(stat.st_mtime for stat in found), sum(stat.st_size for stat in found)


def _remove(place: Path, youngest: float) -> str | None:
    with contextlib.suppress(OSError):
        if _measured(place)[0] > youngest:
            return f"{place}: was written to since it was found."
    delete(place)
    return None
