"""Rows that arrived since a customer's data was prepared, prepared by themselves."""

import json

from pipeline.data import prepare, prepare_fresh, read_card, read_split


def text(rows):
    return "\n".join(json.dumps(row) for row in rows)


def test_only_inputs_that_stand_in_no_split_are_new_and_all_of_them_are_to_be_judged(customer, base, some_pairs, tmp_path):
    rows = some_pairs(60)
    known = prepare(customer(text(rows[:40])), base, tmp_path / "p").folder
    before = read_card(known)
    # A known input with another target, and one that differs in case alone, are not new; a row that cannot be used is none.
    again = [{**rows[3], "target": "something else"}, {**rows[4], "input": rows[4]["input"].upper()}, {"input": "lost"}]
    grown = customer(text([*rows, *again]))
    fresh = prepare_fresh(grown, base, known, tmp_path / "f", 20)
    assert fresh is not None and fresh.fresh
    assert [record.input for record in read_split(fresh.folder, "test")] == [row["input"] for row in rows[40:]]
    assert read_split(fresh.folder, "train") == read_split(fresh.folder, "dev") == []
    assert fresh.card["counts"]["test"] == 20 and read_card(known) == before
    same = prepare_fresh(grown, base, known, tmp_path / "f", 20)
    assert same is not None and not same.fresh and same.card == fresh.card
    assert prepare_fresh(grown, base, known, tmp_path / "f", 21) is None


def test_too_few_new_rows_write_nothing(customer, base, some_pairs, tmp_path):
    rows = some_pairs(45)
    known = prepare(customer(text(rows[:40])), base, tmp_path / "p").folder
    assert prepare_fresh(customer(text(rows)), base, known, tmp_path / "f", 6) is None and not (tmp_path / "f").exists()
    assert prepare_fresh(customer(text(rows[:40])), base, known, tmp_path / "f", 1) is None
