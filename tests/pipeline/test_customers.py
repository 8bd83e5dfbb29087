"""Customers of a folder or a table, and schedules: what they mean, and what is said about mistakes."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.config import Customer, Fleet, ScheduleSettings, load_fleet, with_settings
from pipeline.errors import ConfigError


def load(tmp_path: Path, text: str) -> Fleet:
    file = tmp_path / "fleet.yaml"
    file.write_text("base_model: base\n" + text, encoding="utf-8")
    return load_fleet(file)


def test_every_data_file_and_every_folder_with_splits_is_a_customer(tmp_path: Path) -> None:
    (tmp_path / "data" / "chez-nous").mkdir(parents=True)
    for name in ("acme.jsonl", "bistro.csv", "README.md", ".hidden.csv", "chez-nous/train.csv", "chez-nous/test.jsonl"):
        (tmp_path / "data" / name).touch()
    fleet = load(tmp_path, "defaults: {prefix: {length: 7}}\ncustomers: {folder: data}")
    assert [(c.id, c.data.sources, c.prefix.length) for c in fleet.customers] == [
        ("acme", {"all": str(tmp_path / "data/acme.jsonl")}, 7),
        ("bistro", {"all": str(tmp_path / "data/bistro.csv")}, 7),
        (
            "chez-nous",
            {"train": str(tmp_path / "data/chez-nous/train.csv"), "test": str(tmp_path / "data/chez-nous/test.jsonl")},
            7,
        ),
    ]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["Acme!.csv"], r"data/Acme!\.csv: customer id 'Acme!' is not valid.*rename"),
        (["acme.csv", "acme.jsonl"], r"acme\.jsonl: customer acme has its data in acme\.csv too"),
        (["readme.txt"], r"data: holds no data file"),
        (["bistro/dev.csv"], r"data/bistro: holds no file train"),
        (["bistro/train.csv", "bistro/train.jsonl"], r"data/bistro: has two files for train"),
    ],
)
def test_a_folder_in_which_something_cannot_be_meant_is_refused_by_its_path(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, "customers: {folder: data}")


def table(path: Path) -> None:
    rows = [
        {"id": "acme", "task": None, "data": "a.jsonl", "schedule": "0 3 * * *", "prefix.length": 5, "training.lr": 0.05},
        {"id": "42", "task": "menu", "data": "/abs/b.csv", "schedule": None, "prefix.length": None, "training.lr": None},
    ]
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    else:
        between = "\t" if path.suffix == ".tsv" else ","
        lines = [rows[0].keys(), *([("" if value is None else str(value)) for value in row.values()] for row in rows)]
        path.write_text("\ufeff" + "\r\n".join(between.join(line) for line in lines), encoding="utf-8")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_a_table_says_what_a_list_would_say(tmp_path: Path, name: str) -> None:
    (tmp_path / "lists").mkdir()
    table(tmp_path / "lists" / name)
    got = load(tmp_path, f"defaults: {{training: {{max_steps: 9}}}}\ncustomers: {{table: lists/{name}}}")
    listed = load(
        tmp_path,
        """
defaults: {training: {max_steps: 9}}
customers:
  - {id: acme, data: lists/a.jsonl, schedule: 0 3 * * *, prefix: {length: 5}, training: {lr: 0.05}}
  - {id: 42, task: menu, data: /abs/b.csv}
""",
    )
    assert got == listed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,data,prefix.lenght\na,a.csv,3\n", r"t\.csv:2: customer a: prefix\.lenght: unknown key.*'length'"),
        ("id,data\na,a.csv\n\na,b.csv\n", r"t\.csv:4: customer a: .*stands twice"),
        ("id,data,schedule\na,a.csv,0 3 * *\n", r"t\.csv:2: customer a: schedule\.cron: is no cron line"),
        ("id,data,prefix.length\na,a.csv,many\n", r"t\.csv:2: customer a: prefix\.length: must be a whole number"),
        ("id,data\na\n", r"t\.csv:2: has 1 cells, but the first line names 2 columns"),
        ("name,data\na,a.csv\n", r"t\.csv:1: has no column id"),
        ("id,data,data\na,a.csv,b.csv\n", r"t\.csv:1: the column 'data' stands twice"),
        ("id,prefix,prefix.length,data\na,3,3,a.csv\n", r"t\.csv:2: prefix\.length: prefix is given as a whole"),
        ("id\na\n", r"t\.csv:2: customer a: data: is missing"),
        ("id,data,train\na,a.csv,b.csv\n", r"t\.csv:2: customer a: data: needs either `path`, or `train`"),
        ("id,data\n", r"t\.csv: has no rows"),
    ],
)
def test_a_mistake_in_a_table_names_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, "customers: {table: t.csv}")


@pytest.mark.parametrize(
    ("customers", "says"),
    [
        ("{folder: a, table: b.csv}", "must be a list of customers"),
        ("{folder: nowhere}", "nowhere: cannot be read"),
        ("{table: t.xlsx}", r"t\.xlsx: is no table"),
        ("{table: t.csv}", r"t\.csv: cannot be read"),
    ],
)
def test_customers_that_are_neither_list_nor_folder_nor_table_are_refused(tmp_path: Path, customers: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, f"customers: {customers}")


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ("every day", r":2: schedule\.cron: is no cron line"),
        ("{cron: 0 3 * * *, timezone: Mars/Olympus}", r":2: schedule\.timezone: is no time zone"),
        ("{cron: 0 3 * * *, timezone: ../../etc/passwd}", r":2: schedule\.timezone: is no time zone"),
        ("'* * * * * *'", "it needs five fields"),
    ],
)
def test_a_schedule_that_never_comes_is_refused(tmp_path: Path, schedule: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, f"schedule: {schedule}\ncustomers: [{{id: a, data: a.csv}}]")


def test_a_schedule_means_the_clock_of_its_zone() -> None:
    berlin = ScheduleSettings.model_validate({"cron": "0 3 * * *", "timezone": "Europe/Berlin"})
    assert berlin.next_after(datetime(2026, 7, 1, 0, 30, tzinfo=UTC)) == datetime(2026, 7, 1, 1, 0, tzinfo=UTC)
    assert berlin.next_after(datetime(2026, 12, 1, 1, 30, tzinfo=UTC)) == datetime(2026, 12, 1, 2, 0, tzinfo=UTC)
    assert ScheduleSettings.model_validate("0 3 * * *").next_after(datetime(2026, 7, 1, 3, 0, tzinfo=UTC)).day == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("launch: {device_memory: lots}", r"launch\.device_memory: is no size"),
        ("launch: {work_pool: 'a b'}", r"launch\.work_pool"),
        ("work_pools: {gpu: {concurrency_limit: 0}}", r"work_pools\.gpu\.concurrency_limit"),
        ("deploy: {pool: x}", r"deploy\.pool: unknown key.*Known here: .*work_pool"),
        ("work_pools: {gpu: {limit: 3}}", r"work_pools\.gpu\.limit: unknown key.*concurrency_limit"),
        ("schedule: {crom: 0 3 * * *}", r"schedule\.crom: unknown key.*'cron'"),
    ],
)
def test_settings_of_work_pools_are_checked(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, f"{text}\ncustomers: [{{id: a, data: a.csv}}]")


def test_ten_thousand_customers_are_read_in_seconds(tmp_path: Path) -> None:
    lines = "".join(f"  - {{id: c{i}, data: d/c{i}.jsonl, prefix: {{length: {i % 20 + 1}}}}}\n" for i in range(10_000))
    started = time.process_time()
    fleet = load(tmp_path, "customers:\n" + lines)
    chosen = fleet.select([f"c{i}" for i in range(5000)])
    assert time.process_time() - started < 5, "0.9 s where it was measured"
    assert len(chosen) == 5000 and chosen[19].prefix.length == 20


def test_settings_laid_over_a_customer_s_own_are_checked_together() -> None:
    one = Customer.model_validate({"id": "a", "data": "a.csv", "prefix": {"reparam": "embedding", "length": 3}})
    changed = with_settings(one, {"prefix": {"length": 5}, "training": {"max_steps": 2}})
    assert (changed.prefix.length, changed.prefix.reparam, changed.training.max_steps) == (5, "embedding", 2)
    with pytest.raises(ConfigError, match=r"customer a: prefix: reparam: embedding has no infix"):
        with_settings(one, {"prefix": {"placement": "infix"}})
