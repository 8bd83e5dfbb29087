"""Sizes of memory, as people write and read them. Standard library only."""

from pipeline.errors import ConfigError


def gib(count: int) -> str:
    """Bytes for a reader."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"


def parse_bytes(text: str, what: str = "--memory") -> int:
    """`80GiB`, `24GB`, `512MiB` or a number of bytes; `what` is how messages call it.

    Raises:
        ConfigError: it is none of these.
    """
    units = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbGgTtMmIi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        count = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count <= 0:
        raise ConfigError(f"{what} {text!r}: is no size. Write 80GiB, 24GB or 512MiB.")
    return count
