"""Rows from a customer's files or hub data set, each with the place where it stands.

In: the `data` section of one customer. Out: `Row`s; what cannot be parsed comes as a row with a problem instead of an exception,
so that one bad line costs one line. Knows nothing of prompts or tokens.

Parquet and hub go through `datasets`. JSONL, JSON and CSV are read here: `datasets` fails a whole file for one bad line and
gives no line numbers.
"""

import csv
import difflib
import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.hub import describe, hub_commit, load_hub_splits
from pipeline.errors import DataError
from pipeline.files import file_digest

if TYPE_CHECKING:
    from pipeline.config import DataSettings

RAW_LENGTH = 500
# Suffixes that nobody gives to a hub data set: such a source is a file that we cannot read.
_OTHER_FILES = re.compile(
    r"\.(txt|md|xlsx?|ods|docx?|pdf|jsonlines|ndjson|tab|dat|arrow|feather|avro|orc|pkl|pickle|npz?|pt|xml|ya?ml|html?|db|sqlite"
    r"|gz|bz2|xz|zst|zip|tar|tgz|7z)$",
    re.IGNORECASE,
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        source: file or hub id.
        line: 1-based line where the row begins; in Parquet files and hub data sets the 1-based row.
        split: train, dev, test, or `all` for a source that is still to be split.
        raw: the row as it stands in the source, cut to 500 characters.
        values: column to value; None if the row could not be parsed.
        problem: (reason, detail) if it could not.
    """

    source: str
    line: int
    split: str
    raw: str
    values: dict[str, Any] | None
    problem: tuple[str, str] | None = None


def check_source(source: str) -> None:
    """Check that a source is a readable file of a known kind, or may be a hub id.

    Raises:
        DataError: no such file, empty, unreadable, or of a kind that is not read.
    """
    from pipeline.config import DATA_SUFFIXES, is_file_name

    kinds = ", ".join(DATA_SUFFIXES)
    path = Path(source)
    if not is_file_name(source):
        if _OTHER_FILES.search(source) or path.exists() or not _HUB_ID.fullmatch(source):
            raise DataError(
                f"{source}: neither a file of a kind that is read ({kinds}) nor a hub id (name or org/name). "
                "Convert it, or correct `data`."
            )
        return
    if not path.exists():
        near = difflib.get_close_matches(
            path.name, sorted(f.name for f in path.parent.iterdir()) if path.parent.is_dir() else [], n=1
        )
        hint = (
            f" Did you mean {near[0]!r}?"
            if near
            else f" The folder {path.parent} is missing too."
            if not path.parent.is_dir()
            else ""
        )
        raise DataError(f"{source}: no such file.{hint} Correct `data`; paths are relative to the fleet file.")
    if path.is_dir():
        raise DataError(f"{source}: is a folder. Name the file in it.")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error}). Check its permissions.") from error
    if not start:
        raise DataError(f"{source}: is empty. Put at least one row a line into it.")
    for mark, kind in _BOMS.items():
        if start.startswith(mark):
            raise DataError(f"{source}: is {kind} data. Convert it to plain UTF-8 text, or to Parquet.")


# A file that was written so shortly before it was read may have been written again without another time: the coarsest clocks tick every two seconds.
_SETTLED_NS = 3 * 10**9


def source_note(source: str, data: "DataSettings", before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What identifies the content of a source, as `digest`: the digest of a file's bytes, or a hub id with its commit.

    For a file, also what the system says of it, so that `before`, such a note of an earlier time, saves reading it again: a fleet has thousands.

    Raises:
        DataError: the file cannot be read, or the hub knows no such data set.
    """
    from pipeline.config import is_file_name

    if not is_file_name(source):
        return {"digest": [source, data.name, hub_commit(source, data.revision)]}
    try:
        at, found = time.time_ns(), os.stat(source)
        # The time of the last change of the inode is nobody's to set.
        stat = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        if before is not None and before.get("stat") == stat and before["at"] - found.st_ctime_ns > _SETTLED_NS:
            digest = before["digest"]
            if digest[0] == source:
                return dict(before)
        return {"digest": [source, file_digest(Path(source))], "stat": stat, "at": at}
    except OSError as error:
        raise _unreadable(source, error) from error


def read_rows(split: str, source: str, data: "DataSettings") -> Iterator[Row]:
    """All rows of a source, in order.

    Raises:
        DataError: the source as a whole cannot be read.
    """
    suffix = Path(source).suffix.lower()
    from pipeline.config import is_file_name

    try:
        if not is_file_name(source):
            yield from _hub_rows(split, source, data)
        elif suffix == ".parquet":
            yield from _parquet_rows(split, source)
        elif suffix in (".csv", ".tsv"):
            lists = (data.columns.references, data.columns.messages)
            yield from _csv_rows(split, source, "," if suffix == ".csv" else "\t", lists)
        elif suffix == ".json" and Path(source).read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _json_array_rows(split, source)
        else:
            yield from _jsonl_rows(split, source)
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: OSError) -> DataError:
    return DataError(f"{source}: cannot be read ({error.strerror or error}). Check the file and its permissions.")


def _lines(source: str) -> Iterator[bytes]:
    """Lines with their ends, without a byte order mark. A line ends at a line feed only: U+2028 and its kin may stand within
    JSON strings."""
    with Path(source).open("rb") as file:
        for number, line in enumerate(file):
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def _parse_json(text: str) -> Any:
    """Strict JSON: NaN and Infinity, which Python would take, are errors. Raises ValueError."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object_row(source: str, line: int, split: str, raw: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(source, line, split, raw[:RAW_LENGTH], value)
    return Row(
        source,
        line,
        split,
        raw[:RAW_LENGTH],
        None,
        ("wrong_type", f"the row is {_kind(value)}, not an object with named columns"),
    )


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _jsonl_rows(split: str, source: str) -> Iterator[Row]:
    for line, data in enumerate(_lines(source), 1):
        if not data.strip():  # a blank line is no row
            continue
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raw = data.decode("utf-8", "replace").strip()[:RAW_LENGTH]
            yield Row(source, line, split, raw, None, ("not_json", f"invalid UTF-8 at byte {error.start + 1} of the line"))
            continue
        try:
            value = _parse_json(text)
        except ValueError as error:
            yield Row(source, line, split, text[:RAW_LENGTH], None, ("not_json", str(error)))
            continue
        yield _object_row(source, line, split, text, value)


def _json_array_rows(split: str, source: str) -> Iterator[Row]:
    """Rows of one JSON array. After something that is not JSON the next row cannot be found: that fails the file."""
    try:
        text = Path(source).read_bytes().decode("utf-8-sig")
        _parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{source}: is no valid JSON array ({error}). Correct it, or write one object a line (.jsonl)."
        ) from error
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return
        value, end = decoder.raw_decode(text, position)
        line, counted = line + text.count("\n", counted, position), position
        yield _object_row(source, line, split, text[position : min(end, position + RAW_LENGTH)], value)
        position = end


def _csv_rows(split: str, source: str, delimiter: str, lists: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header. Cells of the columns `lists` may hold a JSON list."""
    taken: list[str] = []

    def decoded() -> Iterator[str]:
        for data in _lines(source):
            # Bytes that are not UTF-8 become lone surrogates, which the check of the row finds.
            taken.append(data.decode("utf-8", "surrogateescape"))
            yield taken[-1]

    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        taken.clear()
        problem, cells = None, []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = ("wrong_type", f"not CSV: {error}")
        if not cells and problem is None:
            continue
        if header is None:
            header = [name.strip() for name in cells]
            repeated = [name for name in header if header.count(name) > 1]
            if problem or repeated:
                what = problem[1] if problem else f"the header names {repeated[0]!r} twice"
                raise DataError(f"{source}:{line}: {what}. The first line must name each column once.")
            continue
        if problem is None and len(cells) != len(header):
            reason = "missing_field" if len(cells) < len(header) else "wrong_type"
            problem = (reason, f"{len(cells)} values, but the header names {len(header)} columns")
        raw = "".join(taken).encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()[:RAW_LENGTH]
        if problem:
            yield Row(source, line, split, raw, None, problem)
        else:
            values = {name: _list_cell(cell) if name in lists else cell for name, cell in zip(header, cells, strict=True)}
            yield Row(source, line, split, raw, values)


def _list_cell(cell: str) -> Any:
    try:
        return _parse_json(cell) if cell.startswith("[") else cell or None
    except ValueError:
        return cell


def _parquet_rows(split: str, source: str) -> Iterator[Row]:
    # from_parquet, not load_dataset: the latter asks the hub first, even for local files.
    from datasets import IterableDataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with Path(source).open("rb") as file:
            file.seek(-4, 2)
            if file.read() != b"PAR1":
                raise ValueError("it does not end with the mark of a Parquet file")
        yield from _table_rows(split, source, IterableDataset.from_parquet(source))
    except DataError:
        raise
    except Exception as error:  # datasets and pyarrow raise many kinds for a damaged file
        raise DataError(f"{source}: cannot be read as Parquet ({describe(error)}). Write the file again.") from error


def _hub_rows(split: str, source: str, data: "DataSettings") -> Iterator[Row]:
    for name, table in load_hub_splits(source, split, data.name, data.revision).items():
        yield from _table_rows(name, source, table)


def _table_rows(split: str, source: str, table: Iterable[Any]) -> Iterator[Row]:
    for number, values in enumerate(table, 1):
        # Only the start is shown: do not serialise whole long rows.
        shown = {
            name: value[:RAW_LENGTH] if isinstance(value, str) else value for name, value in itertools.islice(values.items(), 50)
        }
        raw = json.dumps(shown, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()
        yield Row(source, number, split, raw[:RAW_LENGTH], dict(values))
