"""The registry: one MLflow model per customer; a version is a prefix with its report and lineage.

Importing this imports no MLflow (a second or more); its functions do.
"""

from pipeline.registry.aliases import Moved, promote, rollback
from pipeline.registry.base_lookup import base_of
from pipeline.registry.held import Held, held
from pipeline.registry.lookup import Found, lookup
from pipeline.registry.register import Registration, find, register, register_imported
from pipeline.registry.state import Difference, ModelStatus, Version, diff, history, status
from pipeline.registry.store import ensure_store
from pipeline.registry.tombstones import forgotten_customers, lift

__all__ = [
    "Difference",
    "Found",
    "Held",
    "ModelStatus",
    "Moved",
    "Registration",
    "Version",
    "base_of",
    "diff",
    "ensure_store",
    "find",
    "forgotten_customers",
    "held",
    "history",
    "lift",
    "lookup",
    "promote",
    "register",
    "register_imported",
    "rollback",
    "status",
]
