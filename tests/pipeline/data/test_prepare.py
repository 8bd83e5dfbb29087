"""Claims about `prepare`: every row is used or in quarantine, splits follow from content, files are whole."""

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import Customer
from pipeline.data import encode_prompt, load_tokenizer, prepare, read_card, read_split
from pipeline.data.split import assign_splits
from pipeline.errors import ConfigError, DataError, StorageError

SPLITS = ("train", "dev", "test")


def quarantine(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def inputs(folder: Path, split: str) -> set[str]:
    return {record.input for record in read_split(folder, split)}


def test_every_reason_is_given_with_its_line(customer, base, some_pairs, tmp_path):
    good = [json.dumps(row) for row in some_pairs(30)]
    bad = {
        31: ("{", "not_json"),
        32: ('{"input": "a", "target": NaN}', "not_json"),
        33: ('{"input": "a"}', "missing_field"),
        34: ('{"input": null, "target": "b"}', "missing_field"),
        35: ('{"input": "  ", "target": "b"}', "empty"),
        36: ('{"input": "a", "references": []}', "empty"),
        37: ('{"input": 5, "target": "b"}', "wrong_type"),
        38: ('["a", "b"]', "wrong_type"),
        39: ('{"input": "a", "references": "b"}', "wrong_type"),
        40: (json.dumps({"input": "a " * 500, "target": "b"}), "too_long"),
        41: (json.dumps({"input": "a", "target": "b " * 500}), "too_long"),
        42: ('{"input": "a\\u0007", "target": "b"}', "control_characters"),
        43: ('{"input": "a", "target": "\\ud800"}', "control_characters"),
        44: ('{"input": "a", "target": "b<|endoftext|>"}', "control_characters"),
        45: (good[3], "duplicate"),
        46: ("[" * 100_000, "not_json"),
    }
    result = prepare(customer("\n".join([*good, *(line for line, _ in bad.values())])), base, tmp_path / "p")
    lines = quarantine(result.folder)
    assert {line["line"]: line["reason"] for line in lines} == {number: reason for number, (_, reason) in bad.items()}
    assert all(line["detail"] and len(line["row"]) <= 500 and line["file"].endswith("rows.jsonl") for line in lines)
    counts = result.card["counts"]
    assert (counts["read"], counts["used"], counts["quarantined"]) == (46, 30, 16)
    assert sum(counts["reasons"].values()) == 16
    assert counts["train"] + counts["dev"] + counts["test"] == 30


def test_byte_order_mark_crlf_blank_lines_and_bad_bytes_cost_only_the_bad_line(customer, base, some_pairs, tmp_path):
    lines = [json.dumps(row).encode() for row in some_pairs(10)]
    content = b"\xef\xbb\xbf" + b"\r\n".join([*lines[:5], b'{"input": "caf\xe9", "target": "x"}', b"", *lines[5:]])
    result = prepare(customer(content), base, tmp_path / "p")
    assert [(line["line"], line["reason"]) for line in quarantine(result.folder)] == [(6, "not_json")]
    assert result.card["counts"]["used"] == 10


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "parquet"])
def test_other_formats_give_the_same_records_as_jsonl(kind, customer, base, some_pairs, tmp_path):
    rows = [{**row, "target": 'Say "hi",\nplease ' + row["target"], "note": "n"} for row in some_pairs(20)]
    expected = prepare(customer(rows), base, tmp_path / "expected").card["fingerprint"]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import pandas

        pandas.DataFrame(rows).to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    result = prepare(Customer(id="acme", data=str(path)), base, tmp_path / "p")
    assert result.card["fingerprint"] == expected


def test_bad_csv_rows_are_named_by_the_line_they_begin_in(customer, base, some_pairs, tmp_path):
    good = "".join(f"{row['input']},{row['target']}\n" for row in some_pairs(10))
    content = ("input,target\n" + good).encode() + b'"two\nlines",\nonly\na,b,c\ncaf\xe9,x\n"never closed,x\n'
    result = prepare(customer(content, "rows.csv"), base, tmp_path / "p")
    found = [(line["line"], line["reason"]) for line in quarantine(result.folder)]
    assert found == [(12, "empty"), (14, "missing_field"), (15, "wrong_type"), (16, "control_characters"), (17, "wrong_type")]


def test_splits_are_those_of_the_stated_rule(customer, base, some_pairs, tmp_path):
    result = prepare(customer(some_pairs(300)), base, tmp_path / "p")
    expected: dict[str, set[str]] = {split: set() for split in SPLITS}
    for row in some_pairs(300):
        u = int(hashlib.sha256(row["input"].lower().encode()).hexdigest()[:16], 16) / 16**16
        expected["test" if u < 0.1 else "dev" if u < 0.2 else "train"].add(row["input"])
    assert {split: inputs(result.folder, split) for split in SPLITS} == expected


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
ROW = st.one_of(
    st.fixed_dictionaries({"input": TEXT, "target": TEXT}),
    st.fixed_dictionaries({"input": st.sampled_from("abcdefgh"), "target": st.sampled_from("xy")}),
    st.fixed_dictionaries({"input": TEXT, "references": st.lists(TEXT, max_size=3)}),
    st.fixed_dictionaries({"input": TEXT}),
    st.none(),
    st.integers(),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROW, max_size=25), data=st.data())
def test_rows_are_used_or_quarantined_once_splits_are_disjoint_and_order_plays_no_part(rows, data, customer, base, tmp_path):
    rows = [*rows, *({"input": f"safe {i}", "target": "yes"} for i in range(3))]
    first = prepare(customer(rows, "a.jsonl"), base, tmp_path / "a")
    bad = [line["line"] for line in quarantine(first.folder)]
    used = {split: inputs(first.folder, split) for split in SPLITS}
    assert len(bad) == len(set(bad)) == first.card["counts"]["quarantined"]
    for number, row in enumerate(rows, 1):
        if number not in bad:
            assert sum(row["input"].replace("\r\n", "\n").strip() in texts for texts in used.values()) == 1
    assert first.card["counts"]["used"] + len(bad) == len(rows) == first.card["counts"]["read"]
    assert all(used.values())
    assert first.card["overlap"] == {"train/dev": 0, "train/test": 0, "dev/test": 0}
    assert not (used["train"] & used["dev"] or used["train"] & used["test"] or used["dev"] & used["test"])
    second = prepare(customer(data.draw(st.permutations(rows)), "b.jsonl"), base, tmp_path / "b")
    assert {split: inputs(second.folder, split) for split in SPLITS} == used


@given(texts=st.sets(st.text(max_size=8), max_size=12), cut=st.sampled_from([[], ["test"], ["dev"], ["test", "dev"]]))
def test_no_split_is_empty_once_there_are_enough_inputs(texts, cut):
    assigned = assign_splits(texts, cut)
    assert set(assigned) == texts
    if len(texts) > len(cut):
        assert set(assigned.values()) == {"train", *cut}


def test_ready_splits_are_taken_as_they_are_and_their_overlap_is_counted(base, some_pairs, tmp_path):
    rows = some_pairs(12)
    for name, part in {"train": rows[:8], "dev": rows[7:10], "test": [rows[0], rows[11]]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {name: str(tmp_path / f"{name}.jsonl") for name in SPLITS}
    card = prepare(Customer(id="acme", data=data), base, tmp_path / "p").card
    assert [card["counts"][split] for split in SPLITS] == [8, 3, 2]
    assert card["overlap"] == {"train/dev": 1, "train/test": 1, "dev/test": 0}
    without_dev = prepare(Customer(id="acme", data={k: v for k, v in data.items() if k != "dev"}), base, tmp_path / "q").card
    assert without_dev["counts"]["test"] == 2
    assert without_dev["counts"]["dev"] >= 1
    assert without_dev["overlap"]["train/dev"] == 0


def test_references_become_rows_in_train_and_lists_elsewhere(base, tmp_path):
    train = [{"input": f"i{i}", "references": ["one", "two", "one"]} for i in range(4)]
    test = [
        {"input": "t", "target": "one", "k": 1},
        {"input": "t", "references": ["two", "three"]},
        {"input": "t", "target": "two"},
    ]
    for name, rows in {"train": train, "dev": test, "test": test}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = prepare(Customer(id="acme", data={s: str(tmp_path / f"{s}.jsonl") for s in SPLITS}), base, tmp_path / "p")
    assert [r.references for r in read_split(result.folder, "train")] == [["one"], ["two"]] * 4
    (record,) = read_split(result.folder, "test")
    assert record.references == ["one", "two", "three"]
    assert record.fields == {"k": 1}
    assert [(line["split"], line["line"], line["reason"]) for line in quarantine(result.folder)] == [
        ("dev", 3, "duplicate"),
        ("test", 3, "duplicate"),
    ]


def test_columns_are_mapped(customer, base, tmp_path):
    rows = [{"mr": f"a{i}", "ref": "b"} for i in range(9)]
    result = prepare(customer(rows, data={"columns": {"input": "mr", "target": "ref"}}), base, tmp_path / "p")
    assert result.card["counts"]["used"] == 9


def test_unchanged_data_is_not_prepared_again_and_any_change_is(customer, base, some_pairs, tmp_path):
    folder = tmp_path / "p"
    first = prepare(customer(some_pairs(9)), base, folder)
    again = prepare(customer(some_pairs(9)), base, folder)
    assert (first.fresh, again.fresh, again.card) == (True, False, first.card)
    assert read_card(folder) == first.card
    template = prepare(customer(some_pairs(9), prompt={"template": "> {input}\n"}), base, folder)
    assert template.fresh
    assert template.card["fingerprint"] != first.card["fingerprint"]
    more = prepare(customer(some_pairs(10)), base, folder)
    assert more.fresh
    (folder / "dev.parquet").unlink()
    assert prepare(customer(some_pairs(10)), base, folder).fresh


def test_tokens_say_the_template_then_the_target_and_its_end(customer, base, some_pairs, tmp_path):
    result = prepare(customer(some_pairs(5), prompt={"template": "<{x}> {input} =>"}), base, tmp_path / "p")
    tokenizer, _ = load_tokenizer(base.path)
    for split in SPLITS:
        for record in read_split(result.folder, split):
            assert tokenizer.decode(record.prompt_ids) == f"<{{x}}> {record.input} =>"
            assert tokenizer.decode(record.target_ids) == record.references[0] + "<|endoftext|>"


def test_rows_that_do_not_fit_beside_the_prefix_go_to_quarantine(customer, base, some_pairs, tmp_path):
    small = dataclasses.replace(base, max_positions=40)
    long = {"input": " ".join(["word"] * 15), "target": " ".join(["word"] * 15)}
    result = prepare(customer([*some_pairs(5), long], prefix={"length": 15}), small, tmp_path / "p")
    (line,) = quarantine(result.folder)
    assert line["reason"] == "too_long"
    assert "prefix (15)" in line["detail"]
    assert "takes 40" in line["detail"]
    with pytest.raises(ConfigError, match=r"prefix\.length is 40.*40 positions"):
        prepare(customer(some_pairs(5), prefix={"length": 40}), small, tmp_path / "q")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"no such file\. Did you mean 'gone1\.jsonl'"),
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b"\n \n", "holds no rows"),
        ("rows.csv", b"input,target\n", "holds no rows"),
        ("rows.csv", b"input,input\na,b\n", "names 'input' twice"),
        ("rows.txt", b"x", "neither a file of a kind"),
        ("rows.jsonl", b"\xff\xfe{\x00", "UTF-16"),
        ("rows.parquet", b"no parquet at all", "cannot be read as Parquet"),
        ("rows.json", b'[{"input": 1', "no valid JSON array"),
        ("rows.jsonl", b'{"imput": "a", "target": "b"}', r"no column 'input'\. Did you mean 'imput'\?.*data\.columns\.input"),
        ("rows.csv", b"input,goal\na,b", r"no column 'target'.*'input', 'goal'"),
    ],
)
def test_unreadable_sources_are_named_with_a_remedy(name, content, message, base, tmp_path):
    (tmp_path / "gone1.jsonl").write_text("x")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(Customer(id="acme", data=str(tmp_path / name)), base, tmp_path / "p")
    assert str(caught.value).startswith("customer acme: ")
    assert name in str(caught.value)


def test_a_folder_or_a_forbidden_file_is_no_source(base, tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        prepare(Customer(id="acme", data=str(tmp_path / "d.jsonl")), base, tmp_path / "p")
    (tmp_path / "f.jsonl").write_text("{}")

    def forbid(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        prepare(Customer(id="acme", data=str(tmp_path / "f.jsonl")), base, tmp_path / "p")


def test_all_rows_bad_names_the_reasons_writes_the_quarantine_and_removes_old_data(customer, base, some_pairs, tmp_path):
    folder = tmp_path / "p"
    prepare(customer(some_pairs(5)), base, folder)
    with pytest.raises(DataError, match=r"none of its 3 rows can be used: 2 empty, 1 not_json\. First: line 2 empty") as caught:
        prepare(customer('x\n{"input": "", "target": "b"}\n{"input": "a", "target": ""}\n'), base, folder)
    assert str(folder / "quarantine.jsonl") in str(caught.value)
    assert [line["line"] for line in quarantine(folder)] == [1, 2, 3]
    assert os.listdir(folder) == ["quarantine.jsonl"]


def test_two_distinct_inputs_are_too_few_and_three_are_enough(customer, base, some_pairs, tmp_path):
    with pytest.raises(DataError, match="2 distinct inputs can be used, at least 3 are needed, one each for train, dev, test"):
        prepare(customer([*some_pairs(2), *some_pairs(1)]), base, tmp_path / "p")
    counts = prepare(customer(some_pairs(3)), base, tmp_path / "p").card["counts"]
    assert [counts[split] for split in SPLITS] == [1, 1, 1]


def test_a_full_disk_leaves_the_old_files_whole(customer, base, some_pairs, tmp_path, monkeypatch):
    folder = tmp_path / "p"
    first = prepare(customer(some_pairs(5)), base, folder)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        prepare(customer(some_pairs(6)), base, folder)
    assert read_card(folder) == first.card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "rows.jsonl"]


def test_progress_counts_every_row(customer, base, some_pairs, tmp_path):
    seen: list[int] = []
    prepare(customer(some_pairs(2500)), base, tmp_path / "p", progress=seen.append)
    assert seen == [1000, 1000, 500]


def test_missing_or_foreign_prepared_files_are_named(tmp_path):
    with pytest.raises(StorageError, match="Run `prefixfleet prepare` first"):
        read_split(tmp_path, "train")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "train.parquet")
    with pytest.raises(StorageError, match="has format none"):
        read_split(tmp_path, "train")


def test_a_hub_that_is_away_is_reported_within_seconds(base, tmp_path):
    # 203.0.113.1 is reserved for documentation: it never answers.
    code = (
        "import sys; from pathlib import Path; from pipeline.base import resolve_base; from pipeline.config import Customer\n"
        "from pipeline.data import prepare; base = resolve_base(sys.argv[1])\n"
        "try: prepare(Customer(id='acme', data='org/name'), base, Path(sys.argv[2]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    start = time.monotonic()
    environment = {**os.environ, "HF_ENDPOINT": "http://203.0.113.1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(base.path), str(tmp_path / "p")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.startswith("DataError customer acme: org/name: the hub cannot be reached"), done.stdout + done.stderr
    assert time.monotonic() - start < 40


def test_splits_of_a_hub_data_set_are_taken_as_they_are(base, some_pairs, tmp_path, monkeypatch):
    import datasets

    from pipeline.data import hub

    rows = some_pairs(10)
    tables = {"train": datasets.Dataset.from_list(rows[:6]), "validation": datasets.Dataset.from_list(rows[6:])}
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, revision: tables)
    card = prepare(Customer(id="acme", data={"path": "org/name", "revision": "abc"}), base, tmp_path / "p").card
    assert card["counts"]["dev"] == 4
    assert card["counts"]["train"] + card["counts"]["test"] == 6
    with pytest.raises(DataError, match="has no test split"):
        prepare(Customer(id="acme", data={"train": "org/name", "test": "org/name"}), base, tmp_path / "q")


def test_reading_prepared_data_imports_nothing_heavy():
    heavy = ("datasets", "pandas", "pydantic", "torch", "transformers")
    code = f"import sys; import pipeline.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_prompts_served_later_equal_those_trained_on(customer, base, some_pairs, tmp_path):
    made = customer(some_pairs(5))
    tokenizer, _ = load_tokenizer(base.path)
    for record in read_split(prepare(made, base, tmp_path / "p").folder, "train"):
        assert encode_prompt(tokenizer, made.prompt, False, f" {record.input}\r\n", False) == record.prompt_ids


def test_inputs_that_differ_only_in_case_width_and_spacing_are_in_one_split(customer, base, some_pairs, tmp_path):
    same = ["große  straße", "GROSSE STRASSE", "Große\tStraße", "ｇrosse strasse"]  # full-width g
    result = prepare(customer([*some_pairs(10), *({"input": text, "target": "t"} for text in same)]), base, tmp_path / "p")
    holding = [split for split in SPLITS if inputs(result.folder, split) & set(same)]
    assert len(holding) == 1
    assert result.card["counts"]["used"] == 14
