"""A sweep's settings: every combination once, each under a name that its settings alone decide; nonsense is refused by the option's name."""

from typing import Any

import pytest

from flows import cli
from pipeline.config import Customer
from pipeline.errors import ConfigError
from pipeline.keys import validate_id
from pipeline.sweep.grid import AXES, INITS, MOST, variants


def customer(**settings: Any) -> Customer:
    return Customer.model_validate({"id": "acme", "task": "room-menu", "data": "/data/acme.jsonl", **settings})


def test_every_combination_stands_once_and_what_is_not_varied_is_the_fleet_files() -> None:
    one = customer(prefix={"length": 5, "init_text": "a menu"}, training={"lr": 0.3, "weight_decay": 0.01})
    found = variants(one, {"length": [1, 5, 1], "lr": [0.1, 0.3], "seed": []})
    assert [(v.settings["length"], v.settings["lr"]) for v in found] == [(1, 0.1), (1, 0.3), (5, 0.1), (5, 0.3)]
    assert [v.current for v in found] == [False, False, False, True]
    assert all(v.customer.training.weight_decay == 0.01 and v.customer.prefix.init_text == "a menu" for v in found)
    assert [v.customer.prefix.length for v in found] == [1, 1, 5, 5]
    # Another value changes no name: what is trained is found again.
    assert {v.name for v in found} < {v.name for v in variants(one, {"length": [1, 5, 20], "lr": [0.1, 0.3, 1e-5]})}


def test_names_are_ids_and_differ_where_settings_do() -> None:
    lrs = [0.1, 0.1000001, 1e-05, 1e16, 3.0, 0.30000000000000004]
    names = [v.name for v in variants(customer(), {"lr": lrs, "seed": [0, 2**63 - 1]})]
    assert len(set(names)) == 2 * len(lrs)
    assert [validate_id(name, "task") for name in names] == names


def test_starts_that_need_what_a_variant_has_not_are_put_in_other_words() -> None:
    # A variant's task is its own name, and a champion has one length.
    task, text, noise = (
        v.customer.prefix for v in variants(customer(prefix={"init_text": "a menu"}), {"init": ["task", "text", "random"]})
    )
    assert (task.init, task.init_text) == ("text", "room menu")
    assert (text.init_text, noise.init_text) == ("a menu", None)
    (warm,) = variants(customer(prefix={"init": "prefix", "init_prefix": "champion"}), {})
    assert (warm.customer.prefix.init, warm.customer.prefix.init_prefix, warm.current) == ("text", None, False)


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        ({}, {"length": range(1, 14), "lr": [0.1, 0.2, 0.3, 0.4, 0.5]}, f"13 length x 5 lr are 65 settings; a sweep takes {MOST} at most"),
        ({}, {"length": [5000]}, "--lengths 5000: "),
        ({}, {"lr": [float("nan")]}, "--lrs nan: "),
        ({"prefix": {"reparam": "embedding"}}, {"init": ["zeros"]}, "acme/room-menu: reparam: embedding cannot start from init: zeros"),
    ],
)  # fmt: skip
def test_what_a_fleet_file_could_not_say_is_refused(settings: dict[str, Any], values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="^" + said.replace("(", r"\(")):
        variants(customer(**settings), values)


def test_the_command_has_an_option_for_every_axis(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    shown = capsys.readouterr().out
    assert all(axis.option in shown for axis in AXES.values())
    assert cli._INITS == INITS
