"""The registry: one MLflow model per customer; a version is a prefix with its report and lineage.

Importing this imports no MLflow (a second or more); its functions do.
"""

from pipeline.registry.base_lookup import base_of
from pipeline.registry.lookup import Found, ModelStatus, lookup, status
from pipeline.registry.register import Registration, find, register, register_imported
from pipeline.registry.store import ensure_store

__all__ = [
    "Found",
    "ModelStatus",
    "Registration",
    "base_of",
    "ensure_store",
    "find",
    "lookup",
    "register",
    "register_imported",
    "status",
]
