"""API keys: each opens some customers, and only their digests are kept.

In: the file `keys.json` below `PREFIXFLEET_HOME`, or the same JSON in the environment variable `PREFIXFLEET_API_KEYS`. Out: whom a key opens. A key
is 256 random bits, so a plain SHA-256 cannot be searched for it; slow hashes are for passwords, which people choose. Knows nothing of HTTP.
"""

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import ConfigError, StorageError
from pipeline.files import one_at_a_time, read_json, write_json
from pipeline.home import Home
from pipeline.keys import validate_id

FORMAT = 1
ENVIRONMENT = "PREFIXFLEET_API_KEYS"
EVERYBODY = "*"
_START = "pf-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key.

    Attributes:
        id: to name it in lists; nothing secret.
        sha256: of the key, 64 hex digits.
        customers: whom it opens, with all their tasks; `*` for everybody.
        created: UTC, ISO 8601.
        note: whatever helps to tell whose it is.
    """

    id: str
    sha256: str
    customers: tuple[str, ...]
    created: str
    note: str = ""

    def opens(self, customer: str) -> bool:
        """Whether it may ask for this customer."""
        return EVERYBODY in self.customers or customer in self.customers


def key_file(home: Home) -> Path:
    """Where keys are kept unless a file is named."""
    return home.root / "keys.json"


def read_keys(file: Path) -> list[ApiKey]:
    """The keys of a file; none if there is no file.

    Raises:
        StorageError, ConfigError: it is damaged.
    """
    try:
        file.stat()
        content = read_json(file, FORMAT)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, StorageError) as error:
        raise StorageError(
            f"{file}: cannot be read as API keys ({error.__cause__ or error}). Restore it, or delete it and make keys anew with "
            "`prefixfleet keys create`."
        ) from error
    return _parse(content, str(file))


def create_key(file: Path, customers: list[str], note: str = "") -> tuple[ApiKey, str]:
    """Make a key and keep its digest in `file`.

    Args:
        file: is made if it is not there.
        customers: ids, or `*`.
        note: see `ApiKey`.

    Returns:
        what is kept, and the key itself, which nobody can find out again.

    Raises:
        ConfigError: no customer, or an id that is not valid.
        StorageError: the file cannot be written.
    """
    if not customers:
        raise ConfigError("a key must open somebody. Name customers with --customer, or give --all-customers.")
    for customer in customers:
        if customer != EVERYBODY:
            validate_id(customer)
    secret = _START + secrets.token_urlsafe(32)
    made = ApiKey(
        f"key-{secrets.token_hex(4)}", _digest(secret), tuple(dict.fromkeys(customers)), datetime.now(UTC).isoformat(timespec="seconds"), note
    )  # fmt: skip
    with _changing(file):
        _write(file, [*read_keys(file), made])
    return made, secret


def revoke_key(file: Path, key_id: str) -> None:
    """Remove a key; a running service notices at the next request.

    Raises:
        ConfigError: there is no key of this id.
        StorageError: the file cannot be written.
    """
    if not file.exists():
        raise ConfigError(f"{file}: there is no such file, so no key {key_id}. `prefixfleet keys create` writes one.")
    with _changing(file):
        known = read_keys(file)
        if all(key.id != key_id for key in known):
            raise ConfigError(f"{file}: holds no key {key_id}. `prefixfleet keys list` shows those that it holds.")
        _write(file, [key for key in known if key.id != key_id])


@contextlib.contextmanager
def _changing(file: Path) -> Iterator[None]:
    """One at a time, from reading to writing: of two that change the file at once the later would undo the earlier, a revocation too."""
    with one_at_a_time(file.with_name(f".{file.name}.lock"), "Check the folder and its permissions."):
        yield


class KeyRing:
    """The keys that a service accepts, read again when their file changes.

    A file that cannot be read any more is an error in the log, once for each change, and is tried again until it can. What it held stays
    in force for `grace_seconds`, as whoever changes it by hand may need; then its keys are refused, for one that was revoked must not live
    on in a damaged file. Keys of the environment stay. A file that is gone has no keys.

    Args:
        file: need not exist.
        clock: seconds.

    Raises:
        StorageError, ConfigError: the file or the environment variable is damaged.
    """

    grace_seconds: ClassVar[float] = 60.0
    _retry_seconds: ClassVar[float] = 1.0

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self._clock = file, clock
        self._fixed = self._of_environment()
        self._damaged: float | None = None  # since when
        self._tried = 0.0
        self._guard = threading.Lock()
        self._stamp = self._now()  # before it is read: what changes meanwhile is read again
        self._keys = [*self._fixed, *read_keys(file)]

    @staticmethod
    def _of_environment() -> list[ApiKey]:
        given = os.environ.get(ENVIRONMENT)
        if not given:
            return []
        try:
            content = json.loads(given)
        except ValueError as error:
            raise ConfigError(
                f"{ENVIRONMENT}: is not JSON ({error}). It holds what a file of `prefixfleet keys` holds."
            ) from None
        return _parse(content, ENVIRONMENT)

    def _now(self) -> tuple[int, ...] | None:
        with contextlib.suppress(OSError):
            found = self.file.stat()
            return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        return None

    def __len__(self) -> int:
        return len(self._current())

    @property
    def wanted(self) -> bool:
        """Whether nobody may ask without a key: there is one, or it is not known whether there is."""
        return bool(self._current()) or self._damaged is not None

    def _current(self) -> list[ApiKey]:
        stamp = self._now()
        with self._guard:
            now = self._clock()
            changed = stamp != self._stamp
            if changed or (self._damaged is not None and now - self._tried >= self._retry_seconds):
                self._stamp, self._tried = stamp, now
                self._read_again(now, changed)
            if self._damaged is not None and now - self._damaged >= self.grace_seconds and len(self._keys) > len(self._fixed):
                log.error("%s: could not be read for %g s; its keys are refused until it can.", self.file, self.grace_seconds)
                self._keys = self._fixed
            return self._keys

    def _read_again(self, now: float, changed: bool) -> None:
        try:
            self._keys = [*self._fixed, *read_keys(self.file)]
        except (StorageError, ConfigError) as error:
            self._damaged = now if self._damaged is None else self._damaged
            if changed:
                log.error("%s Keys that were read before are refused after %g s.", error, self.grace_seconds)
            return
        if self._damaged is not None and self._stamp is None:
            log.warning("%s: is gone, and so are its keys.", self.file)
        elif self._damaged is not None:
            log.warning("%s: can be read again, and holds %d keys.", self.file, len(self._keys) - len(self._fixed))
        self._damaged = None

    def find(self, secret: str) -> ApiKey | None:
        """The key that this is, or None. Takes as long whatever is given: digests are compared in constant time, and all of them."""
        digest, found = _digest(secret), None
        for key in self._current():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _parse(content: Any, place: str) -> list[ApiKey]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:  # of a file `read_json` has seen it
        raise ConfigError(f'{place}: has no "format": {FORMAT}. `prefixfleet keys create` writes what belongs there.')
    try:
        keys = [
            ApiKey(str(k["id"]), str(k["sha256"]), _customers(k["customers"]), str(k.get("created", "")), str(k.get("note", "")))
            for k in content["keys"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{place}: is no list of API keys ({type(error).__name__}: {error}). `prefixfleet keys create` writes one."
        ) from None
    for key in keys:
        if not re.fullmatch("[0-9a-f]{64}", key.sha256):
            raise ConfigError(f"{place}: key {key.id} has no SHA-256 of 64 hex digits. Only digests of keys belong there.")
        if not key.customers:
            raise ConfigError(
                f'{place}: key {key.id} opens nobody. Its "customers" is a list of ids, such as ["acme"], or ["{EVERYBODY}"].'
            )
        for customer in key.customers:
            if customer != EVERYBODY:
                validate_id(customer)
    return keys


def _customers(listed: Any) -> tuple[str, ...]:
    """None if it is no list of texts: a single text would be taken letter by letter."""
    texts = isinstance(listed, list) and all(isinstance(customer, str) for customer in listed)
    return tuple(listed) if texts else ()


def _write(file: Path, keys: list[ApiKey]) -> None:
    listed = [{**vars(key), "customers": list(key.customers)} for key in keys]
    # Digests are no secret, but whom they open is nobody's business.
    write_json(file, {"format": FORMAT, "keys": listed}, private=True)
