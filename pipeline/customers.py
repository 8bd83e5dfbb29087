"""The customers of a fleet whose fleet file names a folder or a table instead of listing them.

In: `{folder: DIR}` or `{table: FILE}`, as the fleet file has it. Out: the entries that the fleet file would have listed, as plain values, and where
each one stands, for messages. Knows nothing of what the settings mean: whoever calls checks them as it does those of a list.
"""

import csv
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.keys import validate_id

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "dev", "test")
_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# Ids, names of files and cron lines are text whatever they look like; other cells of a CSV file are numbers, true, false or lists where they can be.
_TEXT = ("id", "task", "data", "schedule", *SPLITS, *(f"data.{split}" for split in ("path", *SPLITS)))

Entry = tuple[dict[str, Any], str]


def from_folder(folder: Path) -> list[Entry]:
    """A customer for every data file in a folder, named by its stem, and for every sub-folder with the files train, dev and test (the last two are
    optional), named by the sub-folder. Other files, and what begins with a dot, are left alone.

    Returns:
        for each, sorted by name, what the fleet file would say, and the file that it stands for.

    Raises:
        ConfigError: there is no such folder, no data in it, or a file cannot be meant.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(
            f"customers.folder: {folder}: cannot be read ({error.strerror}). Give a folder of data files."
        ) from error
    entries: list[Entry] = []
    seen: dict[str, Path] = {}
    for path in found:
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in DATA_SUFFIXES and path.is_file():
            name, data = path.stem, {"path": str(path)}
        elif path.is_dir():
            name, data = path.name, _splits(path)
        else:
            continue
        try:
            validate_id(name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error} The name of the file is the customer's id: rename it.") from error
        if name in seen:
            raise ConfigError(f"{path}: customer {name} has its data in {seen[name].name} too. Remove one of them.")
        seen[name] = path
        entries.append(({"id": name, "data": data}, str(path)))
    if not entries:
        kinds = ", ".join(DATA_SUFFIXES)
        raise ConfigError(f"customers.folder: {folder}: holds no data file ({kinds}) and no folder with one named train.")
    return entries


def _splits(folder: Path) -> dict[str, str]:
    splits: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.stem in SPLITS and file.suffix.lower() in DATA_SUFFIXES:
            if file.stem in splits:
                raise ConfigError(f"{folder}: has two files for {file.stem}. Remove one of them.")
            splits[file.stem] = str(file)
    if "train" not in splits:
        raise ConfigError(f"{folder}: holds no file train ({', '.join(DATA_SUFFIXES)}). Add one, or move the folder elsewhere.")
    return splits


def from_table(file: Path) -> list[Entry]:
    """A customer for every row of a table.

    Columns are the keys of a customer: id, task, schedule, data (or train, dev and test), and settings by their dotted names, such as
    `prefix.length`. An empty cell says nothing. Paths are relative to the table.

    Returns:
        for each row what the fleet file would say, and the file with the row's line.

    Raises:
        ConfigError: the table cannot be read, has no rows, or names a setting in two ways that exclude one another.
    """
    suffix = file.suffix.lower()
    if suffix not in _TABLE_SUFFIXES:
        raise ConfigError(f"customers.table: {file}: is no table. Give a file ending in {', '.join(_TABLE_SUFFIXES)}.")
    rows = _parquet(file) if suffix == ".parquet" else _json_lines(file) if suffix == ".jsonl" else _csv(file)
    entries = []
    try:
        for cells, where in rows:
            entries.append((_entry(cells, where, file.parent), where))
    except OSError as error:
        raise ConfigError(f"customers.table: {file}: cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"customers.table: {file}: cannot be read ({error}).") from error
    if not entries:
        raise ConfigError(f"customers.table: {file}: has no rows.")
    return entries


def _csv(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        names = [name.strip() for name in next(lines, [])]
        _check_names(file, names)
        line = lines.line_num
        for cells in lines:
            where, line = f"{file}:{line + 1}", lines.line_num
            if not any(cells):
                continue
            if len(cells) != len(names):
                raise ConfigError(f"{where}: has {len(cells)} cells, but the first line names {len(names)} columns.")
            texts = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
            yield {name: text if name in _TEXT else _value(text) for name, text in texts.items() if text}, where


def _check_names(file: Path, names: list[str]) -> None:
    if "id" not in names:
        raise ConfigError(f"{file}:1: has no column id. Its columns are: {', '.join(names) or 'none'}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{file}:1: the column {twice[0]!r} stands twice.")


@functools.lru_cache(maxsize=4096)
def _value(text: str) -> Any:
    """A number, true, false or a list where `text` is one in JSON; otherwise the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{where}: is no JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: is no JSON object.")
            yield {name: value for name, value in row.items() if value is not None}, where


def _parquet(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"customers.table: {file}: is no Parquet file ({error}).") from error
    for number, row in enumerate(rows, start=1):
        yield {name: value for name, value in row.items() if value is not None}, f"{file}: row {number}"


def _entry(cells: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """A row as the fleet file would say it: dotted names are sections, paths absolute."""
    from pipeline.config import absolute_data

    entry: dict[str, Any] = {}
    for name, value in cells.items():
        path = ["data", name] if name in SPLITS else name.split(".")
        section = entry
        for part in path[:-1]:
            if isinstance(section.get(part), str) and part == "data":
                section[part] = {"path": section[part]}
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{where}: {name}: {part} is given as a whole in another column. Remove one of the two.")
        if path[-1] == "data" and isinstance(entry.get("data"), dict):
            path, section = ["data", "path"], entry["data"]
        if path[-1] in section:
            raise ConfigError(f"{where}: {name}: is given in another column too. Remove one of the two.")
        section[path[-1]] = value
    if "data" in entry:
        entry["data"] = absolute_data(entry["data"], folder)
    return entry
