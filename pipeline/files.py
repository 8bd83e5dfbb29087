"""Files between stages: written whole or not at all, with a `format` number, and content digests.

Standard library only, for it runs on bare GPU nodes.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError


def _storage_error(path: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{path}: the disk is full. Free some space and run the same command again; nothing finished is lost."
        )
    return StorageError(f"{path}: cannot be written ({error.strerror or error}). Check the folder and its permissions.")


@contextlib.contextmanager
def whole_file(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, otherwise removed.

    A reader, or a process killed at any moment, sees the old file or the new one, never a part. A `private` file is its owner's
    alone at every moment.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _sync(temporary)
        if not private:
            # mkstemp makes files private; files between stages follow the umask as any other file does.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole_file` for a folder: yields a temporary folder that becomes `path`, replacing what stood there.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, old / "old")
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def is_whole(folder: Path | str, files: Iterable[str]) -> bool:
    """Whether a stage's outcome is there. Stages write folders whole, but somebody may have deleted a file since."""
    return all(
        os.path.isfile(f"{folder}/{file}") for file in files
    )  # a fleet's planning asks it of tens of thousands: no Path for each


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Write `text` as UTF-8, whole or not at all; `private` as in `whole_file`."""
    with whole_file(path, private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any], private: bool = False) -> None:
    """Write `content` as indented JSON, whole or not at all. It should hold a `format` number; `private` as in `whole_file`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", private)


def read_json(path: Path, format: int) -> dict[str, Any]:
    """Read a JSON object written by another stage and check its `format` number.

    Raises:
        StorageError: missing, damaged, or of another format.
    """
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read().decode("utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file. Run the stage that writes it first.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{path}: cannot be read ({error}). Delete it and run the stage that writes it again.") from error
    if not isinstance(content, dict) or content.get("format") != format:
        found = content.get("format") if isinstance(content, dict) else None
        raise StorageError(
            f"{path}: has format {found}, this version of PrefixFleet reads format {format}. Delete it and run the stage again."
        )
    return content


@contextlib.contextmanager
def one_at_a_time(lock: Path, remedy: str) -> Iterator[None]:
    """Let one process at a time pass, on this machine. Released when the process ends, however it ends.

    Args:
        lock: the file that is locked; it stays.
        remedy: what to do where it cannot be made.

    Raises:
        StorageError: the lock cannot be made.
    """
    from filelock import FileLock

    guard = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        guard.acquire()
    except OSError as error:
        raise StorageError(f"{lock}: cannot be written ({error.strerror}). {remedy}") from error
    try:
        yield
    finally:
        guard.release()


def digest_of(content: Any) -> str:
    """SHA-256 in hex of the canonical JSON form of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 in hex of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
