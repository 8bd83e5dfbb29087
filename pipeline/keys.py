"""A customer id is data, not a path: validated here once, and joined into paths only by `CustomerKey`."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError

ID_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"
# SHA-256 in hex.
DIGEST_PATTERN = "[0-9a-f]{64}"
DEFAULT_TASK = "default"


def validate_id(value: str, what: str = "customer") -> str:
    """Return `value` if it is a valid customer or task id.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, str) or not re.fullmatch(ID_PATTERN, value):
        raise ConfigError(
            f"{what} id {value!r} is not valid: use 1 to 63 of the characters a-z, 0-9, '-' and '_', beginning with a letter or digit."
        )
    return value


def validate_digest(value: str) -> str:
    """Return `value` if it is a SHA-256 in hex, which may become part of a path.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, str) or not re.fullmatch(DIGEST_PATTERN, value):
        raise ConfigError(f"digest {str(value)[:80]!r} is not valid: it must be 64 hexadecimal digits.")
    return value


@dataclass(frozen=True, order=True)
class CustomerKey:
    """(customer, task): what a prefix belongs to. Ids are valid by construction."""

    customer: str
    task: str = DEFAULT_TASK

    def __post_init__(self) -> None:
        validate_id(self.customer, "customer")
        validate_id(self.task, "task")

    def __str__(self) -> str:
        """`acme`, or `acme/menu` for another task than the default one: what people read and type."""
        return self.customer if self.task == DEFAULT_TASK else f"{self.customer}/{self.task}"

    @classmethod
    def parse(cls, text: str) -> "CustomerKey":
        """The inverse of `str`: `acme` or `acme/menu`."""
        customer, _, task = text.partition("/")
        return cls(customer, task or DEFAULT_TASK)

    @property
    def model_name(self) -> str:
        """The MLflow registered model: `prefixfleet.acme` or `prefixfleet.acme.menu`."""
        return f"prefixfleet.{self.customer}" + ("" if self.task == DEFAULT_TASK else f".{self.task}")

    def below(self, folder: Path, kind: str = "", *rest: str) -> Path:
        """`folder/<kind>/<customer>/<task>/<rest>`, made at once: a fleet's planning makes a dozen for every customer."""
        return folder.joinpath(kind, self.customer, self.task, *rest)


@functools.lru_cache(maxsize=2**15)
def key_of(customer: str, task: str) -> CustomerKey:
    """`CustomerKey(customer, task)`, made and checked once."""
    return CustomerKey(customer, task)
