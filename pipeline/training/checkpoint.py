"""Where a job stands, on disk: one pair of files per customer, and one manifest that says which pairs belong together.

`jobs/<job>/<customer>/<task>/checkpoint-<tick>.safetensors` and `.json` hold one customer each; `jobs/<job>/checkpoint.json`, written last, is what
makes them count. All customers of a checkpoint stand at the same tick of the job: which rows share a micro-batch decides in which order numbers are
added up, so that only a job that goes on with everybody where they were ends with the very same prefixes. Knows nothing of training.
"""

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipeline.errors import PrefixFleetError, StorageError
from pipeline.files import file_digest, read_json, whole_file, write_json
from pipeline.keys import CustomerKey

FORMAT = 1
MANIFEST = "checkpoint.json"
SHORTAGE = "shortage.json"

# Tensors and plain values of one customer.
State = tuple[dict[str, torch.Tensor], dict[str, Any]]


@dataclass
class Checkpoint:
    """What a manifest says, with the states it names.

    Attributes:
        tick: passes over the residents so far.
        budget: tokens of a micro-batch; less than `asked_budget`, which the job was given, if memory ran out.
        length: columns of the bank.
        slots: the customer in each slot, or None.
        finished: customers who are done but whose prefixes may not have been written yet.
        parked: customers in training of whom this run of the job was not asked for.
        done: customers of the job who are through and whose prefixes are written.
        failed: customers who were given up, and why.
        states: of everybody in `slots`, `finished` and `parked`.
    """

    tick: int
    budget: int
    asked_budget: int
    length: int
    slots: list[CustomerKey | None]
    finished: list[CustomerKey] = field(default_factory=list)
    parked: list[CustomerKey] = field(default_factory=list)
    failed: dict[CustomerKey, str] = field(default_factory=dict)
    done: int = 0
    states: dict[CustomerKey, State] = field(default_factory=dict)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, before: Iterable[CustomerKey] = ()) -> None:
    """Write a checkpoint, and then delete the files of the one before it. Killed at any moment, it leaves one of the two.

    Args:
        folder: the job's.
        checkpoint: what to write.
        before: the customers of the checkpoint that this one replaces, see `sweep`.

    Raises:
        StorageError: the disk is full or a folder cannot be written; the checkpoint before still counts.
    """
    for key, (tensors, plain) in checkpoint.states.items():
        path = _path(folder, key, checkpoint.tick)
        with whole_file(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(path.with_suffix(".json"), {"format": FORMAT, "tensors_sha256": file_digest(path), **plain})
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "tick": checkpoint.tick,
            "budget": checkpoint.budget,
            "asked_budget": checkpoint.asked_budget,
            "length": checkpoint.length,
            "slots": [None if key is None else str(key) for key in checkpoint.slots],
            "finished": [str(key) for key in checkpoint.finished],
            "parked": [str(key) for key in checkpoint.parked],
            "done": checkpoint.done,
            "failed": {str(key): reason for key, reason in checkpoint.failed.items()},
        },
    )
    for key in {*checkpoint.states, *before}:
        _delete_others(key.below(folder), checkpoint.tick if key in checkpoint.states else None)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of a job, or None if there is none.

    Raises:
        StorageError: it is damaged; the message says what to delete.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST, FORMAT)
    try:
        checkpoint = Checkpoint(
            manifest["tick"],
            manifest["budget"],
            manifest["asked_budget"],
            manifest["length"],
            [None if name is None else CustomerKey.parse(name) for name in manifest["slots"]],
            [CustomerKey.parse(name) for name in manifest["finished"]],
            [CustomerKey.parse(name) for name in manifest["parked"]],
            {CustomerKey.parse(name): reason for name, reason in manifest["failed"].items()},
            manifest["done"],
        )
        for key in itertools.chain(checkpoint.slots, checkpoint.finished, checkpoint.parked):
            if key is not None:
                checkpoint.states[key] = _read_state(_path(folder, key, checkpoint.tick))
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / MANIFEST}: is damaged ({error!r}). {_remedy(folder)}") from error
    return checkpoint


def delete_checkpoint(folder: Path) -> None:
    """Forget a checkpoint, the manifest first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / SHORTAGE).unlink(missing_ok=True)
    sweep(folder, None)


def sweep(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Delete what killed processes left in a job's folder: files that do not belong to its checkpoint, or that were being written."""
    kept = {} if checkpoint is None else {key.below(folder): checkpoint.tick for key in checkpoint.states}
    for place in {file.parent for file in folder.glob("*/*/*checkpoint-*")}:
        _delete_others(place, kept.get(place))
    for file in folder.glob(f".{MANIFEST}.*.tmp"):
        file.unlink(missing_ok=True)


@dataclass
class Shortage:
    """What a process learned that ran out of memory where no checkpoint can be written.

    Attributes:
        asked: tokens of a micro-batch that the job was given.
        budget: those that are left of them.
        given_up: customers who have a row that does not fit by itself, and what to tell of it.
    """

    asked: int
    budget: int
    given_up: dict[CustomerKey, str] = field(default_factory=dict)


def note_shortage(folder: Path, shortage: Shortage) -> None:
    """Keep it for the next run of the job.

    Raises:
        StorageError: it cannot be written.
    """
    given_up = {str(key): reason for key, reason in shortage.given_up.items()}
    write_json(folder / SHORTAGE, {"format": FORMAT, "asked": shortage.asked, "budget": shortage.budget, "given_up": given_up})


def noted_shortage(folder: Path, asked: int) -> Shortage:
    """What `note_shortage` kept for the same `asked`; nothing short of it if there is none."""
    if (folder / SHORTAGE).exists():
        # A note, not a record: without it memory runs out once more.
        with contextlib.suppress(PrefixFleetError, KeyError, TypeError, ValueError, AttributeError):
            noted = read_json(folder / SHORTAGE, FORMAT)
            if noted["asked"] == asked:
                given_up = {CustomerKey.parse(name): str(reason) for name, reason in noted["given_up"].items()}
                return Shortage(asked, int(noted["budget"]), given_up)
    return Shortage(asked, asked)


def _read_state(path: Path) -> State:
    plain = read_json(path.with_suffix(".json"), FORMAT)
    try:
        if file_digest(path) != plain.pop("tensors_sha256", None):
            raise StorageError(f"{path}: its digest is not the one in {path.stem}.json. {_remedy(path.parents[2])}")
        return load(path.read_bytes()), {name: value for name, value in plain.items() if name != "format"}
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be read ({error}). {_remedy(path.parents[2])}") from error


def _remedy(folder: Path) -> str:
    return f"Delete {folder / MANIFEST} to train the job's unfinished customers from their beginning."


def _path(folder: Path, key: CustomerKey, tick: int) -> Path:
    return key.below(folder) / f"checkpoint-{tick:08d}.safetensors"


def _delete_others(place: Path, tick: int | None) -> None:
    """Delete a customer's files of other ticks, and those half written."""
    kept = () if tick is None else (f"checkpoint-{tick:08d}.safetensors", f"checkpoint-{tick:08d}.json")
    for file in [*place.glob("checkpoint-*"), *place.glob(".checkpoint-*.tmp")]:
        if file.name not in kept:
            with contextlib.suppress(OSError):
                file.unlink()
