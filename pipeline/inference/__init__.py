"""Answers for many customers in one batch: the decoding loop, prefixes in memory, ensembles, the HTTP service (`pipeline.inference.service`).

Importing this imports no torch, which `prefixfleet keys` has no need of; the names below do when they are first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.inference.decoder import Decoder
    from pipeline.inference.engine import PrefixEngine, load_engine
    from pipeline.inference.prefixes import PrefixMemory
    from pipeline.inference.request import BASE_ALONE, Decoding, Members, Request

__all__ = ["BASE_ALONE", "Decoder", "Decoding", "Members", "PrefixEngine", "PrefixMemory", "Request", "load_engine"]

_HOMES = {
    "decoder": ("Decoder",),
    "engine": ("PrefixEngine", "load_engine"),
    "prefixes": ("PrefixMemory",),
    "request": ("BASE_ALONE", "Decoding", "Members", "Request"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
