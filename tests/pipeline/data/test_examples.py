"""Claims about the example customers."""

import json
import runpy
from pathlib import Path

from pipeline.config import load_fleet
from pipeline.data import prepare

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_example_customers_are_what_the_script_writes(tmp_path):
    runpy.run_path(str(EXAMPLES / "make_customers.py"))["main"](tmp_path)
    names = sorted(path.name for path in (EXAMPLES / "customers").iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((tmp_path / name).read_bytes() == (EXAMPLES / "customers" / name).read_bytes() for name in names)


def test_example_fleet_prepares_five_customers_and_one_has_bad_rows_of_every_kind(base, tmp_path):
    reasons = {}
    for customer in load_fleet(EXAMPLES / "fleet.yaml").customers:
        card = prepare(customer, base, tmp_path / customer.id).card
        assert card["counts"]["used"] == 400
        assert min(card["counts"]["dev"], card["counts"]["test"]) >= 25
        reasons[customer.id] = card["counts"]["reasons"]
    kinds = ["control_characters", "duplicate", "empty", "missing_field", "not_json", "too_long", "wrong_type"]
    assert reasons.pop("gadgetry") == dict.fromkeys(kinds, 2)
    assert not any(reasons.values())


def test_example_rows_are_short_enough_for_a_quick_first_run(base, tmp_path):
    for customer in load_fleet(EXAMPLES / "fleet.yaml").customers:
        card = prepare(customer, base, tmp_path / customer.id).card
        assert card["max_prompt_tokens"] <= 60, customer.id
        assert card["max_target_tokens_seen"] <= 52, customer.id
        lines = [line for line in Path(customer.data.path).read_text().splitlines() if line.startswith("{")]
        openings = {" ".join(json.loads(line).get("target", "").split()[:2]) for line in lines if line.endswith("}")}
        assert len(openings) >= 8, customer.id
