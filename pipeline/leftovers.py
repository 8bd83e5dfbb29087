"""What lies on this machine of one customer: found, and removed. Knows the layout of `PREFIXFLEET_HOME` (docs/files.md) and nothing of MLflow.

Every stage keeps a customer's files in `<stage>/<customer>/`, and jobs in `jobs/<job>/<customer>/`, so folders are found by that rule and not by a
list of stages. What customers share is written again without the one: job files, the manifest of a checkpoint, the pages of a fleet.
"""

import contextlib
import re
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError, StorageError
from pipeline.files import one_at_a_time, read_json, write_json, write_text
from pipeline.home import Home
from pipeline.keys import CustomerKey, validate_id

# What a fleet's page consists of. The JSON is written last and names everybody who is on the others.
_PAGES = (".html", ".md", ".json")
# A page is written within a second; a temporary file as old as this was left by a process that was killed.
_ABANDONED_SECONDS = 3600
# How long a database is waited for that another process is writing to.
_BUSY_SECONDS = 20.0
# Below the home, but not by customer: MLflow's and Prefect's own, locks, and what is treated apart.
NOT_BY_CUSTOMER = ("mlartifacts", "prefect", "locks", "reports", "jobs", "cache")


def tasks_on_disk(home: Home, customer: str) -> list[CustomerKey]:
    """The customer's tasks of which there is anything here."""
    names = {place.stem for folder in _folders(home, validate_id(customer)) for place in folder.iterdir()}
    keys = []
    for name in sorted(names):
        try:
            keys.append(CustomerKey(customer, name))
        except ConfigError:  # a temporary file of a process that was killed
            continue
    return keys


def remove_leftovers(home: Home, customer: str) -> list[str]:
    """Remove all that was made here from a customer's data; returns what was removed, in words. Nobody may be at work on the customer.

    Raises:
        StorageError: something cannot be deleted or written; run it again once it can.
    """
    removed = []
    # A service may be downloading the customer's prefix: it ends first, and the next finds nothing in MLflow.
    with one_at_a_time(home.cache_lock(customer), "Check PREFIXFLEET_HOME and its permissions."):
        for folder in _folders(home, validate_id(customer)):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            delete(folder)
            removed.append(f"{folder.relative_to(home.root)} ({size:,} bytes)")
    for job in sorted(home.root.glob("jobs/*")):
        removed += [f"{customer} in {file.relative_to(home.root)}" for file in _leave_job(job, customer)]
    for page in sorted({place.with_suffix("") for suffix in _PAGES for place in home.root.glob(f"reports/*{suffix}")}):
        if _leave_report(page.with_name(f"{page.name}.json"), customer):
            removed.append(f"{customer} in {page.relative_to(home.root)}.html")
    for note in sorted(home.root.glob("fleets/*.json")):
        if _leave_fleet(note, customer):
            removed.append(f"{customer} in {note.relative_to(home.root)}")
    for begun in home.root.glob("reports/.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            if time.time() - begun.stat().st_mtime > _ABANDONED_SECONDS:
                delete(begun)
    return removed


def give_up_free_pages(database: Path) -> str | None:
    """Have SQLite write a database anew without the pages that deleted rows lay on, where they can still be read, and empty its log.

    Returns:
        what could not be done and how to do it, or None. A database that somebody is at work on stays as it is.
    """
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as connection:
            connection.execute("VACUUM")
            # In the log (WAL) old pages outlive a VACUUM, and the new ones may still lie there alone.
            (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        reason = "somebody is reading it" if busy else None
    except sqlite3.Error as error:
        reason = str(error)
    if reason is None:
        return None
    return (
        f"{database}: free pages may hold traces of deleted rows ({reason}). Run the same command again when no run is under way and no "
        f"server has it open, or `sqlite3 '{database}' VACUUM`."
    )


def _folders(home: Home, customer: str) -> list[Path]:
    """A customer's own folders."""
    stages = [place for place in home.root.glob(f"*/{customer}") if place.parent.name not in NOT_BY_CUSTOMER]
    return sorted(
        place
        for place in [*stages, *home.root.glob(f"jobs/*/{customer}"), *home.root.glob(f"cache/*/{customer}")]
        if place.is_dir()
    )


def _leave_fleet(note: Path, customer: str) -> bool:
    """Take a customer out of the note of who is in a fleet; whether that was needed."""
    content = read_json(note, 1)
    try:
        rooms = {
            room: [name for name in content[room] if CustomerKey.parse(name).customer != customer]
            for room in ("customers", "gone")
        }
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise _damaged(note, error) from error
    if {**content, **rooms} == content:
        return False
    write_json(note, {**content, **rooms})
    return True


def _leave_job(folder: Path, customer: str) -> list[Path]:
    """Take a customer out of a job that others are in too, or remove the job; returns the files that named it."""
    changed = []
    nobody = False
    job, manifest = folder / "job.yaml", folder / "checkpoint.json"
    if job.is_file():
        try:
            content = yaml.safe_load(job.read_text(encoding="utf-8"))
            others = [one for one in content["customers"] if one["customer"] != customer]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise _damaged(job, error) from error
        nobody = not others
        if len(others) < len(content["customers"]):
            changed.append(job)
            write_text(job, yaml.safe_dump({**content, "customers": others}, sort_keys=False, allow_unicode=True))
    if manifest.is_file():
        content = read_json(manifest, 1)
        try:
            without = _without(content, customer)
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise _damaged(manifest, error) from error
        if without != content:
            changed.append(manifest)
            write_json(manifest, without)
    part = folder / "part.json"
    if part.is_file():
        content = read_json(part, 1)
        try:
            others = [one for one in content["members"] if CustomerKey.parse(one[0]).customer != customer]
        except (KeyError, TypeError, AttributeError, IndexError, ConfigError) as error:
            raise _damaged(part, error) from error
        if len(others) < len(content["members"]):
            changed.append(part)
            write_json(part, {**content, "members": others})
    # It was this customer's alone; or of whoever was forgotten before, by a process that was killed after it had written the file.
    if (changed or nobody) and not any(place.is_dir() for place in folder.iterdir()):
        delete(folder)
        changed = changed or [job]
    return changed


def _without(manifest: dict[str, Any], customer: str) -> dict[str, Any]:
    """The manifest of a checkpoint (`pipeline.training.checkpoint`) in which the customer's slot is free."""

    def other(name: str | None) -> bool:
        return name is None or CustomerKey.parse(name).customer != customer

    return {
        **manifest,
        "slots": [name if other(name) else None for name in manifest["slots"]],
        **{part: [name for name in manifest[part] if other(name)] for part in ("finished", "parked")},
        "failed": {name: reason for name, reason in manifest["failed"].items() if other(name)},
    }


def _damaged(file: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{file}: is damaged ({error!r}), so nobody can be taken out of it. Delete it, and run the same command again."
    )


def _leave_report(file: Path, customer: str) -> bool:
    """Write a fleet's page anew without a customer, or remove it where nothing says who is on it; whether that was needed."""
    from pipeline.evaluation.report import fleet_report

    others: list[dict[str, Any]] = []
    of_file: str | None = None
    if file.is_file():
        try:
            content = read_json(file, 1)
            rows, of_file = content["customers"], content.get("fleet_file")
            others = [row for row in rows if CustomerKey.parse(row["key"]).customer != customer]
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise _damaged(file, error) from error
        if others and len(others) == len(rows):
            return False
    elif not any(_names(page.read_text(encoding="utf-8", errors="replace"), customer) for page in _written(file)):
        return False  # of a process that was killed before it wrote the JSON, or is at it
    if others:
        fleet_report(others, file.with_suffix(".html"), of_file)
    else:
        for suffix in _PAGES:
            delete(file.with_suffix(suffix))
    return True


def _names(page: str, customer: str) -> bool:
    """Whether the id stands on a page by itself or before a task: neither as a part of a longer id nor as another's task."""
    plain = page.replace("\\", "")  # Markdown has them before underscores
    return re.search(rf"(?<![a-z0-9_/-]){customer}(?![a-z0-9_-])", plain) is not None


def _written(file: Path) -> list[Path]:
    return [page for suffix in _PAGES if (page := file.with_suffix(suffix)).is_file()]


def delete(place: Path) -> None:
    """Remove a file or a folder with all that is in it; none is no error.

    Raises:
        StorageError: it cannot be deleted.
    """
    try:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{error.filename or place}: cannot be deleted ({error.strerror}). Change its permissions, and run the same command again."
        ) from error
