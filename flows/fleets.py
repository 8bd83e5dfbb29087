"""Who is in which fleet of a home: a note for each fleet file, `fleets/<fleet>-<digest>.json`, written whenever the fleet is run or maintained.

In: the home folder, a fleet and its file. Out: customers who were in the fleet and are in none of this home now, and those whom another fleet has
too. A note tells of a fleet whose file this machine cannot read; where it can, the file counts. Knows nothing of what is done about it.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.jobs import readable
from pipeline.config import Fleet, load_fleet
from pipeline.errors import PrefixFleetError
from pipeline.files import digest_of, read_json, write_json
from pipeline.home import Home
from pipeline.keys import CustomerKey


@dataclass(frozen=True)
class Neighbours:
    """What the fleets of a home have to do with one of them.

    Attributes:
        gone: customers who were in the fleet, and are in no fleet of this home now.
        shared: customers of the fleet whom another has too.
        ended: notes of fleets whose file is gone and that nobody has run for long; `gone` has their customers.
    """

    gone: set[CustomerKey]
    shared: set[CustomerKey]
    ended: list[Path]


def neighbours(home: Home, fleet: Fleet, fleet_file: Path, days: float, now: float) -> Neighbours:
    """Read the notes, and the files of the other fleets.

    Args:
        home: in which.
        fleet: as its file says.
        fleet_file: that file.
        days: a note whose file is not there is believed so long after it was written: the file may have another name now, or be on another machine.
        now: seconds since the epoch.

    Raises:
        StorageError: a note is damaged.
    """
    own = {customer.key for customer in fleet.customers}
    gone: set[CustomerKey] = set()
    others: set[CustomerKey] = set()
    ended = []
    for note in _notes(home):
        content = read_json(note, 1)
        file = Path(content["fleet_file"])
        if file == fleet_file.resolve():  # also of a name that the fleet had before
            gone |= _keys([*content["customers"], *content["gone"]])
        elif file.is_file():
            try:
                others |= {customer.key for customer in load_fleet(file).customers}
            except PrefixFleetError:  # somebody is at it
                others |= _keys(content["customers"])
        elif now - note.stat().st_mtime < days * 86_400:
            others |= _keys(content["customers"])
        else:
            ended.append(note)
            gone |= _keys([*content["customers"], *content["gone"]])
    return Neighbours(gone - own - others, own & others, ended)


def note(home: Home, fleet: Fleet, fleet_file: Path, forgotten: Iterable[CustomerKey], more: Iterable[CustomerKey] = ()) -> None:
    """Note who is in the fleet now, and who was and has files here yet.

    Args:
        forgotten: customers of whom nothing is to be written.
        more: customers of fleets that have ended, of whom this one takes care.

    Raises:
        StorageError: the note cannot be written.
    """
    file = home.root / "fleets" / f"{readable(fleet.name)}-{digest_of(str(fleet_file.resolve()))[:8]}.json"
    now = {customer.key for customer in fleet.customers} - set(forgotten)
    before: dict[str, Any] = {"customers": [], "gone": []}
    with contextlib.suppress(PrefixFleetError):  # none, or damaged
        before = read_json(file, 1)
    gone = (_keys([*before["customers"], *before["gone"]]) | set(more)) - now
    left = [key for key in gone if any(home.root.glob(f"*/{key.customer}/{key.task}"))]
    content = {"customers": sorted(map(str, now)), "gone": sorted(map(str, left))}
    write_json(file, {"format": 1, "fleet_file": str(fleet_file.resolve()), **content})


def _notes(home: Home) -> list[Path]:
    return sorted((home.root / "fleets").glob("*.json"))


def _keys(names: Iterable[str]) -> set[CustomerKey]:
    return {CustomerKey.parse(name) for name in names}
