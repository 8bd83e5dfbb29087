"""Every error that a user can cause or must know of, under one base class.

The command line prints `PrefixFleetError`s as one message without a traceback; anything else is a bug and keeps its traceback.
A message names the place (file, line, customer) and ends with the remedy.
"""


class PrefixFleetError(Exception):
    """Base of all errors meant for users."""


class ConfigError(PrefixFleetError):
    """The fleet file, a job file or an argument is wrong."""


class DataError(PrefixFleetError):
    """A customer's data cannot be read or yields nothing to train on."""


class BaseModelError(PrefixFleetError):
    """The base model is missing, of a kind that takes no prefix, or not the one that a prefix was trained on."""


class PrefixError(PrefixFleetError):
    """A prefix does not fit: length, shapes, positions, or a damaged or foreign file."""


class TrainingError(PrefixFleetError):
    """Training of one customer, or the process that trains, failed."""


class EvaluationError(PrefixFleetError):
    """A test set cannot be generated for or scored."""


class RegistryError(PrefixFleetError):
    """MLflow is unreachable, lacks what was asked for, or holds something that must not be used."""


class NotRegisteredError(RegistryError):
    """The registry answers that it has no such customer, alias or version."""


class StorageError(PrefixFleetError):
    """A file could not be written or read whole (disk full, no permission, damaged)."""


class ServiceError(PrefixFleetError):
    """The service cannot start or go on as it was asked to."""


class BusyError(ServiceError):
    """All of something is in use for the moment; trying again later helps."""
