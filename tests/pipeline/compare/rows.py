"""What the tests of this folder share."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.base import resolve_base
from pipeline.training.job import JobBase


@dataclass
class Row:
    """A row of prepared data."""

    prompt_ids: list[int]
    target_ids: list[int]


def job_base(folder: Path) -> JobBase:
    """A base on disk as a job names it."""
    return JobBase(str(folder), str(folder), None, resolve_base(str(folder)).digest, "float32", None, "auto")
