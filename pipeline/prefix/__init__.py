"""The method: prefixes of keys and values before every attention layer of a frozen base (Li & Liang 2021)."""

from pipeline.prefix.bank import Prefix, PrefixBank, Site
from pipeline.prefix.base import FrozenBase, attach, load_base
from pipeline.prefix.store import is_infix, load_prefix, read_config, save_prefix

__all__ = [
    "FrozenBase",
    "Prefix",
    "PrefixBank",
    "Site",
    "attach",
    "is_infix",
    "load_base",
    "load_prefix",
    "read_config",
    "save_prefix",
]
