"""The fleet file: what it means, and what it says about mistakes."""

import importlib.util
import re
from pathlib import Path

import pytest

from pipeline.config import LEARNING_RATES, Customer, DataSettings, Fleet, PrefixSettings, TrainingSettings, load_fleet
from pipeline.errors import ConfigError
from pipeline.keys import CustomerKey


def load(tmp_path: Path, text: str) -> Fleet:
    file = tmp_path / "fleet.yaml"
    file.write_text(text, encoding="utf-8")
    return load_fleet(file)


def test_customers_inherit_defaults_key_by_key(tmp_path: Path) -> None:
    fleet = load(
        tmp_path,
        """
base_model: base
launch: {accelerate_config: single_gpu}
defaults: {training: {lr: 0.1, max_steps: 7}, evaluation: {gate: {min_gain_over_base: 2.0}}}
customers:
  - {id: acme, data: a.jsonl, training: {lr: 0.2}, evaluation: {gate: {min_score: 10}}}
  - {id: 42, task: menu, data: {train: t.csv, test: org/set}}
""",
    )
    acme, other = fleet.customers
    assert (acme.training.lr, acme.training.max_steps, acme.training.batch_size) == (0.2, 7, 10)
    assert (acme.evaluation.gate.min_score, acme.evaluation.gate.min_gain_over_base) == (10, 2.0)
    assert other.training.lr == 0.1 and other.key == CustomerKey("42", "menu")
    assert acme.launch.accelerate_config == "single_gpu"
    assert acme.data.sources == {"all": str(tmp_path / "a.jsonl")}
    assert other.data.sources == {"train": str(tmp_path / "t.csv"), "test": "org/set"}
    assert fleet.base_model.path == str(tmp_path / "base")
    assert fleet.name == "fleet"


HEAD = "base_model: base\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            HEAD + "customers:\n  - {id: acme, data: a.jsonl, prefix: {lenght: 3}}",
            r":3: customer acme: prefix.lenght: unknown key.*'length'",
        ),
        (
            HEAD + "defaults:\n  training: {max_stepz: 3}\ncustomers: [{id: a, data: a.csv}]",
            r":3: defaults.training.max_stepz.*'max_steps'",
        ),
        (HEAD + "custmers: []\ncustomers: [{id: a, data: a.csv}]", r":2: custmers: unknown key.*'customers'"),
        (HEAD + "customers:\n  - {id: ../evil, data: a.jsonl}", r":3: customer \.\./evil: id: .*not valid.*a-z"),
        (HEAD + "customers:\n  - {id: a.b, data: a.jsonl}", "not valid"),
        (HEAD + "customers:\n  - {id: a, task: x/y, data: a.jsonl}", "task id 'x/y' is not valid"),
        (HEAD + "customers:\n  - {id: a, data: a.csv}\n  - {id: a, data: b.csv}", "'a' with task 'default' stands twice"),
        (HEAD + "customers:\n  - {id: a, data: a.csv, training: {lr: -1}}", r":3: customer a: training.lr: .*greater than 0.*-1"),
        (HEAD + "customers:\n  - {id: a, data: {dev: a.csv}}", "needs either `path`, or `train`"),
        (HEAD + "customers:\n  - {id: a}", r"customer a: data: is missing"),
        (HEAD + "customers: []", "customers: needs at least 1 entry"),
        (
            HEAD + "customers:\n  - id: a\n    data: a.csv\n  - data: b.csv\n    id: a",
            r":5: customer a: 'a' with task 'default' stands twice",
        ),
        (HEAD + "customers:\n  - id: 010\n    data: a.csv", r':3: 010: YAML reads this as 8\. Put quotes.*"010"'),
        (HEAD + "customers:\n  - {id: 1:30, data: a.csv}", r":3: 1:30: YAML reads this as 90"),
        (HEAD + "customers:\n  - {id: yes, data: a.csv}", r":3: customer True: id: .*a text needs quotes"),
        (HEAD + "customers:\n  - {id: 1.5, data: a.csv}", r"id: must be text in quotes \(got 1\.5\)"),
        (HEAD + "customers:\n  - id: a\n    data: a.csv\n    id: b", r":5: id: stands twice, first in line 3"),
        (
            HEAD + "customers:\n  - {id: a, data: a.csv, training: {max_steps: yes}}",
            r"max_steps: must not be true or false.*got true",
        ),
        (HEAD + "customers:\n  - {id: a, data: a.csv, training: {lr: true}}", "lr: must not be true or false"),
        (HEAD + "customers:\n  - {id: a, data: a.csv, training: {lr: .inf}}", "lr: must be a finite number"),
        (HEAD + "customers:\n  - {id: a, data: a.csv, training: {lr: .nan}}", "lr: must be a finite number"),
        (HEAD + "customers:\n  - {id: a, data: a.csv, training: {seed: 12345678901234567890123}}", "seed: must be less than"),
        (HEAD + f"customers:\n  - {{id: a, data: a.csv, training: {{seed: {'1' * 5000}}}}}", "is not YAML"),
        (HEAD + "customers:\n  - {id: a, data: a.csv, training: 3}", "training: must be a section of keys and values"),
        (HEAD + "customers:", ":2: customers: is empty; it must be a list"),
        (HEAD + "customers:\n  - {id: a, data: a.csv, prompt: {template: hello}}", r"must contain \{input\}"),
        (HEAD + "customers:\n  - {id: a, data: a.csv, evaluation: {metrics: [bleu, bleu]}}", "names one thing twice"),
        (HEAD + "customers:\n  - {id: a, data: a.csv, evaluation: {preset: e3e}}", "must be 'default'"),
        (
            HEAD + "customers:\n  - {id: a, data: a.csv, evaluation: {slices: [], gate: {max_regression_on_slice: 1}}}",
            "max_regression_on_slice needs slices",
        ),
        (HEAD + "customers:\n  - {id: a, data: a.csv, evaluation: {instruction: ' '}}", "instruction is empty"),
        (
            HEAD + "customers:\n  - {id: a, data: a.csv, evaluation: {bootstrap_resamples: 999}}",
            "must be at least 1000|greater than or equal",
        ),
        (
            HEAD + "customers:\n  - {id: a, data: a.csv, evaluation: {metrics: [chrf], gate: {metric: bleu}}}",
            "gate.metric is 'bleu'",
        ),
        ("customers: [{id: a, data: a.csv}]", "base_model: is missing"),
        ("- a\n- b", "no mapping"),
        ("", "is empty"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_name_file_line_customer_and_remedy(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "fleet.yaml"))


def test_a_mistake_in_the_defaults_is_said_once(tmp_path: Path) -> None:
    customers = "".join(f"  - {{id: c{i}, data: a.csv}}\n" for i in range(20))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, HEAD + "defaults: {prefix: {length: 0}}\ncustomers:\n" + customers)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "customer",
    [
        "{id: a, data: a.csv, training: {lr: -1}}",
        "{id: a, data: a.csv, evaluation: {metrics: [blue]}}",
    ],
)
def test_a_mistake_in_the_only_entry_of_a_list_is_one_problem(tmp_path: Path, customer: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, HEAD + f"customers:\n  - {customer}")
    assert len(str(caught.value).splitlines()) == 1


def test_every_plain_number_is_taken_as_written(tmp_path: Path) -> None:
    fleet = load(
        tmp_path,
        HEAD
        + "customers:\n  - {id: 42, task: 7, data: a.csv, training: {lr: 1e-3, max_grad_norm: 1.5e+1, weight_decay: .5, seed: 0}}",
    )
    training = fleet.customers[0].training
    assert (training.lr, training.max_grad_norm, training.weight_decay) == (0.001, 15.0, 0.5)
    assert fleet.customers[0].key == CustomerKey("42", "7")


def test_a_path_to_an_accelerate_config_is_relative_to_the_fleet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fleet = load(
        tmp_path,
        HEAD + "launch: {accelerate_config: mine.yaml}\ncustomers:\n"
        "  - {id: a, data: a.csv}\n  - {id: b, data: a.csv, launch: {accelerate_config: ../b}}\n"
        "  - {id: c, data: a.csv, launch: {accelerate_config: cpu, num_processes: 2}}",
    )
    named = [fleet.launch, *(customer.launch for customer in fleet.customers)]
    own = str(tmp_path / "mine.yaml")
    assert [launch.accelerate_config for launch in named] == [own, own, str(tmp_path.parent / "b"), "cpu"]
    assert "num_processes" not in fleet.customers[1].launch.model_fields_set


def test_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_fleet(tmp_path / "none.yaml")


def test_select_takes_customers_with_all_their_tasks_and_names_the_nearest_for_unknown_ones(tmp_path: Path) -> None:
    fleet = load(
        tmp_path, HEAD + "customers: [{id: acme, data: a.csv}, {id: acme, task: menu, data: b.csv}, {id: bistro, data: c.csv}]"
    )
    assert [str(c.key) for c in fleet.select(["acme"])] == ["acme", "acme/menu"]
    assert [str(c.key) for c in fleet.select(["acme/menu", "bistro"])] == ["acme/menu", "bistro"]
    with pytest.raises(ConfigError, match=r"'acne' is not in the fleet file\. Did you mean 'acme'"):
        fleet.select(["acne"])


def test_the_page_on_the_fleet_file_is_current(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_fleet_file", root / "docs" / "make_fleet_file.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs" / "fleet-file.md").read_text(encoding="utf-8") == module.page(), "run `python docs/make_fleet_file.py`"


def test_the_example_fleet_is_valid_and_has_five_customers(root: Path) -> None:
    assert len(load_fleet(root / "examples" / "fleet.yaml").customers) == 5


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("{layers: 0}", "greater than 0"),
        ("{layers: top}", "'all'"),
        ("{sites: []}", "at least 1 entry"),
        ("{sites: [decoder.self, decoder.self]}", "one kind of attention twice"),
        ("{sites: [decoder.selfie]}", "'decoder.self', 'encoder.self' or 'decoder.cross'"),
        ("{init: prefix}", "need each other"),
        ("{init_prefix: champion}", "need each other"),
        ("{init: zeros, init_text: hello}", "not used by init: zeros"),
        ("{init_text: ' '}", "is empty"),
        ("{reparam: embedding, init: zeros}", "cannot start from init: zeros"),
        ("{reparam: embedding, placement: infix}", "has no infix"),
        ("{reparam: embedding, layers: 2}", "in all layers"),
        ("{reparam: mlp, mid_dim: 4, length: 5}", "mid_dim to length or more"),
        ("{placement: infix, sites: [encoder.self]}", "decoder-only"),
    ],
)
def test_prefix_settings_that_do_not_fit_together_are_refused_with_the_line(tmp_path: Path, prefix: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        load(tmp_path, HEAD + f"customers:\n  - {{id: acme, data: a.jsonl, prefix: {prefix}}}")
    assert ":3: customer acme: prefix" in str(caught.value)


def test_prefix_settings_of_every_kind_are_understood(tmp_path: Path) -> None:
    fleet = load(
        tmp_path,
        """
base_model: {path: base, quantization: int4, attention: flex_attention}
defaults: {prefix: {layers: 2, sites: [decoder.self, decoder.cross]}}
customers:
  - {id: a, data: a.jsonl, prefix: {init: prefix, init_prefix: old/prefix}}
  - {id: b, data: a.jsonl, prefix: {init: prefix, init_prefix: champion, layers: all}}
""",
    )
    a, b = (customer.prefix for customer in fleet.customers)
    assert (a.layers, b.layers, a.sites) == (2, "all", ("decoder.self", "decoder.cross"))
    assert (a.init_prefix, b.init_prefix) == (str(tmp_path / "old" / "prefix"), "champion")
    assert (fleet.base_model.quantization, fleet.base_model.attention) == ("int4", "flex_attention")


def test_a_learning_rate_that_nobody_gives_is_that_of_the_parameterisation(tmp_path: Path) -> None:
    customers = """customers:
  - {id: plain, data: a.jsonl}
  - {id: mlp, data: a.jsonl, prefix: {reparam: mlp}, training: {max_steps: 7}}
  - {id: embedding, data: a.jsonl, prefix: {reparam: embedding}}
  - {id: own, data: a.jsonl, prefix: {reparam: mlp}, training: {lr: 0.5}}
"""
    plain, mlp, embedding, own = load(tmp_path, HEAD + customers).customers
    rates = [one.training.lr for one in (plain, mlp, embedding, own)]
    assert rates == [LEARNING_RATES["none"], LEARNING_RATES["mlp"], LEARNING_RATES["embedding"], 0.5]
    assert mlp.training.lr <= plain.training.lr / 10 and mlp.training.max_steps == 7
    # Said in the defaults it is said for all.
    assert {one.training.lr for one in load(tmp_path, HEAD + "defaults: {training: {lr: 0.5}}\n" + customers).customers} == {0.5}
    # The parameterisation may stand in the defaults, and settings may be objects.
    inherited = load(tmp_path, HEAD + "defaults: {prefix: {reparam: mlp}}\n" + customers).customers[0]
    built = Customer(id="x", data=DataSettings(path="a.jsonl"), prefix=PrefixSettings(reparam="mlp"), training=TrainingSettings())
    assert inherited.training.lr == built.training.lr == LEARNING_RATES["mlp"]


def test_a_preset_brings_its_metrics_and_the_gate_takes_the_first(tmp_path: Path) -> None:
    fleet = load(
        tmp_path,
        """
base_model: base
defaults: {evaluation: {preset: summarization}}
customers:
  - {id: a, data: a.jsonl}
  - {id: b, data: b.jsonl, evaluation: {preset: e2e, gate: {min_score: 3}}}
  - {id: c, data: c.jsonl, evaluation: {metrics: [ter, bleu]}}
  - {id: d, data: d.jsonl, evaluation: {metrics: [ter, bleu], gate: {metric: bleu}}}
""",
    )
    found = [(c.evaluation.metrics[0], len(c.evaluation.metrics), c.evaluation.gate.metric) for c in fleet.customers]
    assert found == [("rouge1", 3, "rouge1"), ("bleu", 4, "bleu"), ("ter", 2, "ter"), ("ter", 2, "bleu")]
    assert fleet.customers[1].evaluation.gate.min_score == 3
    assert fleet.customers[0].evaluation.gate.min_gain_over_champion == 0


def test_metrics_and_presets_of_the_fleet_file_are_those_that_evaluation_knows() -> None:
    from pipeline import config
    from pipeline.evaluation import metrics, presets

    assert set(config.METRICS) == set(metrics.METRICS)
    assert set(config.PRESETS) == set(presets.PRESETS)
