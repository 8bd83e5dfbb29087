"""Which names mean this machine alone."""

import ipaddress
import re

_HEADER = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::[0-9]*)?")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def names_loopback(header: str) -> bool:
    """Whether the header Host, `name`, `name:port` or `[address]:port`, names this machine."""
    found = _HEADER.fullmatch(header.strip())
    return found is not None and is_loopback(found[1] or found[2])
