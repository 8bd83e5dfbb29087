"""Ensembles: several prefixes of one customer that answer together."""

from pathlib import Path
from typing import Any

from pipeline.inference.request import Loaded, Members
from pipeline.prefix import is_infix, load_prefix


def load_members(folder: Path) -> tuple[Members, dict[str, Any]]:
    prefix, config = load_prefix(folder)
    return Members((Loaded(prefix, is_infix(config)),)), config
