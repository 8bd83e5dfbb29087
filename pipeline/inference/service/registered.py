"""From a model's name to a prefix in memory: the registry says which version is meant now, the folder is loaded once.

A promotion is noticed when the next request looks its alias up; answers under way keep the version that they began with, for they hold its lease.
"""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BaseModelError, ConfigError, NotRegisteredError, ServiceError
from pipeline.inference.prefixes import Lease, PrefixMemory
from pipeline.inference.request import Members
from pipeline.keys import ID_PATTERN, CustomerKey
from pipeline.registry import Found, lookup

# customer, customer.task; then @alias or :version
_NAME = re.compile(rf"({ID_PATTERN})(?:\.({ID_PATTERN}))?(?:@([A-Za-z0-9_-]{{1,100}})|:([0-9]{{1,9}}))?")


class UnknownModelError(ServiceError):
    """There is no such model, or it cannot be served here."""


@dataclass(frozen=True)
class ModelName:
    """What a request names: `acme`, `acme.menu`, `acme@challenger`, `acme.menu:3`."""

    key: CustomerKey
    alias: str
    version: int | None

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """The inverse of `str`.

        Raises:
            UnknownModelError: it has another form.
        """
        found = _NAME.fullmatch(text)
        if found is None:
            raise UnknownModelError("a model's name is customer, customer.task, customer@alias or customer:version")
        customer, task, alias, version = found.groups()
        try:
            key = CustomerKey(customer, task or "default")
        except ConfigError as error:
            raise UnknownModelError(str(error)) from error
        return cls(key, alias or "champion", None if version is None else int(version))


def model_id(key: CustomerKey) -> str:
    """The name of a customer's champion."""
    return key.customer if key.task == "default" else f"{key.customer}.{key.task}"


@dataclass(eq=False)
class Served:
    """A version, held in memory until `release`."""

    key: CustomerKey
    version: int
    lease: Lease

    @property
    def members(self) -> Members:
        """What stands before rows."""
        return self.lease.members

    @property
    def config(self) -> dict[str, Any]:
        """Content of prefix.json."""
        return self.lease.config

    def release(self) -> None:
        """Let it go."""
        self.lease.release()


def find_registered(name: ModelName, base_digest: str | None = None) -> Found:
    """Look a version up. Blocks: not for the event loop.

    Args:
        base_digest: of the base that is loaded; None: it is seen when the prefix is loaded.

    Raises:
        UnknownModelError: nothing is registered under that name, or for another base than the one that is loaded.
        RegistryError: MLflow does not answer, or the stored prefix is not the one that was registered.
        StorageError: it cannot be written to the cache.
    """
    try:
        return lookup(name.key, name.alias, name.version, base_digest=base_digest)
    except NotRegisteredError as error:
        # The message lists who else is registered, which is nobody's business here.
        raise UnknownModelError("nothing is registered under this name") from error
    except BaseModelError as error:
        raise UnknownModelError(str(error)) from error


def open_registered(memory: PrefixMemory, name: ModelName, patience: float) -> Served:
    """Look a version up and hold its prefix in memory. Blocks: not for the event loop.

    Raises:
        UnknownModelError, RegistryError: see `find_registered`.
        BusyError: all memory for prefixes is in use.
        PrefixError, StorageError: it cannot be loaded.
    """
    found = find_registered(name)
    try:
        return Served(name.key, found.version, memory.lease(found.prefix_dir, patience))
    except BaseModelError as error:
        raise UnknownModelError(
            f"version {found.version} was trained on another base than the one that this service has loaded"
        ) from error
