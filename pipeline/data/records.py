"""The prepared files of one customer: `{train,dev,test}.parquet`, `card.json` and `quarantine.jsonl`.

Knows their columns and format number, and nothing of how rows come about. Needs pyarrow only.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.files import read_json

FORMAT = 1
SPLITS = ("train", "dev", "test")
CARD, QUARANTINE = "card.json", "quarantine.jsonl"
_FORMAT_KEY = b"prefixfleet.format"


@dataclass(frozen=True)
class Record:
    """One row of a prepared split.

    Attributes:
        prompt_ids: what the model reads: the prompt of a decoder-only base, the encoder's input of an encoder-decoder.
        target_ids: what it should write (of the first reference), with the end token if the prompt settings ask for it.
        input: the input as people read it; a chat as `role: content` lines.
        references: all good answers; exactly one in the train split.
        fields: the row's other columns; empty in the train split. For a chat, `messages` holds the conversation before the
            target.
    """

    prompt_ids: list[int]
    target_ids: list[int]
    input: str
    references: list[str]
    fields: dict[str, Any] = field(default_factory=dict)


def write_split(folder: Path, split: str, records: Sequence[Record]) -> None:
    """Write `<folder>/<split>.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.list_(pa.int32())
    columns: dict[str, tuple[Any, list[Any]]] = {
        "prompt_ids": (ids, [r.prompt_ids for r in records]),
        "target_ids": (ids, [r.target_ids for r in records]),
        "input": (pa.string(), [r.input for r in records]),
    }
    if split == "train":
        columns["target"] = (pa.string(), [r.references[0] for r in records])
    else:
        columns["references"] = (pa.list_(pa.string()), [r.references for r in records])
        columns["fields"] = (pa.string(), [json.dumps(r.fields) for r in records])
    schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()], metadata={_FORMAT_KEY: str(FORMAT)})
    pq.write_table(pa.table([values for _, values in columns.values()], schema=schema), folder / f"{split}.parquet")


def read_split(folder: Path, split: str) -> list[Record]:
    """The records of `split` (train, dev or test) of the prepared data in `folder`, in the order of the source.

    Raises:
        StorageError: missing, damaged, or of another format.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{split}.parquet"
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file. Run `prefixfleet prepare` first.") from error
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path}: cannot be read ({error}). Delete {folder} and run `prefixfleet prepare` again.") from error
    found = (table.schema.metadata or {}).get(_FORMAT_KEY, b"none").decode()
    if found != str(FORMAT):
        raise StorageError(
            f"{path}: has format {found}, this version of PrefixFleet reads format {FORMAT}. Run `prefixfleet prepare` again."
        )
    columns = table.to_pydict()
    if split == "train":
        columns["references"] = [[target] for target in columns["target"]]
        columns["fields"] = ["{}"] * table.num_rows
    return [
        Record(prompt, target, text, references, json.loads(fields))
        for prompt, target, text, references, fields in zip(
            *(columns[name] for name in ("prompt_ids", "target_ids", "input", "references", "fields")), strict=True
        )
    ]


def read_card(folder: Path) -> dict[str, Any]:
    """The card of the prepared data in `folder`: counts, fingerprint, prompt settings.

    Raises:
        StorageError: missing, damaged, or of another format.
    """
    return read_json(folder / CARD, FORMAT)
