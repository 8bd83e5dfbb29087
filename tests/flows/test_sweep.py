"""`prefixfleet sweep`: what is trained is found again, a setting's failure is its own, mistakes are named before anything starts."""

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import cli, locks
from flows.display import sweep_table
from flows.work import open_work, prepare
from pipeline.errors import ConfigError
from pipeline.home import Home
from pipeline.keys import CustomerKey

from ..pipeline.evaluation.conftest import FakeEngine
from .fake_stage import write_prefix


def sweep(fleet_file: Path, values: dict[str, list[Any]], metric: str | None = None) -> tuple[dict[str, Any], Path]:
    from flows.sweep_work import run_sweep

    return run_sweep(fleet_file, "acme", values, metric, logging.getLogger("test"))


def test_finished_settings_are_found_again_and_mlflow_has_the_sweep_as_nested_runs(
    home: Home, fleet_file: Path, sweep_stages: list[tuple[str, Any]]
) -> None:
    from mlflow import MlflowClient

    first, folder = sweep(fleet_file, {"length": [2, 10]})
    assert first["best"]["settings"]["length"] == 10 and first["best"]["is_current"]
    assert folder.is_relative_to(home.root / "sweeps" / "acme" / "default")
    assert sweep_stages[0] == ("pipeline.training", ["p2-lr0_1-b10-s400-text-r0", "p10-lr0_1-b10-s400-text-r0"])
    assert sweep(fleet_file, {"length": [2, 10]}) == (first, folder) and len(sweep_stages) == 2

    more, other = sweep(fleet_file, {"length": [2, 10, 20]})
    assert sweep_stages[2] == ("pipeline.training", ["p20-lr0_1-b10-s400-text-r0"])
    assert other != folder and (folder / "sweep.html").is_file()
    # Only the new setting's rows on dev: the test rows of the best and of the present one are known.
    assert sweep_stages[3][1] == more["records"]["dev"]
    # Nothing was registered, and the customer's own folders are as they were.
    assert not (home.root / "prefixes").exists()

    client = MlflowClient()
    experiment = client.get_experiment_by_name("prefixfleet-sweeps")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`prefixfleet.sweep` = '{more['digest']}'")
    assert len(runs) == 1 and runs[0].data.params["best.length"] == "10"
    assert runs[0].data.metrics["test_bleu"] == more["test"]["systems"]["best"]["bleu"]["score"]
    names = {artifact.path for artifact in client.list_artifacts(runs[0].info.run_id)}
    assert names == {"sweep.html", "sweep.json", "sweep.md", "sweep-length.svg"}
    below = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{runs[0].info.run_id}'")
    assert sorted(run.data.params["length"] for run in below) == ["10", "2", "20"]
    scores = {str(row["settings"]["length"]): row["dev"]["score"] for row in more["variants"]}
    assert {run.data.params["length"]: run.data.metrics["dev_bleu"] for run in below} == scores


def test_a_setting_that_fails_is_tried_again_and_the_table_says_why_and_what_to_write(
    home: Home, fleet_file: Path, sweep_stages: list[tuple[str, Any]]
) -> None:
    for _ in range(2):
        content, _ = sweep(fleet_file, {"length": [2, 10, 200]})
    trained = [what for module, what in sweep_stages if module == "pipeline.training"]
    assert [len(names) for names in trained] == [3, 1] and trained[1] == ["p200-lr0_1-b10-s400-text-r0"]
    printed = io.StringIO()
    sweep_table(content, Console(file=printed, width=160))
    shown = printed.getvalue()
    assert "prefix length 200 failed: too long" in shown
    assert "- id: acme\n  prefix: {length: 10}" in shown
    assert [line.split()[0] for line in shown.splitlines()[2:5]] == ["2", "10", "200"]


def test_a_length_beyond_the_bases_positions_is_a_row_of_the_table_and_no_part_of_the_job(
    home: Home, fleet_file: Path, sweep_stages: list[tuple[str, Any]]
) -> None:
    content, _ = sweep(fleet_file, {"length": [2, 4000]})
    assert [names for module, names in sweep_stages if module == "pipeline.training"] == [["p2-lr0_1-b10-s400-text-r0"]]
    (failed,) = [variant for variant in content["variants"] if "error" in variant]
    assert failed["settings"]["length"] == 4000 and "pass the" in failed["error"] and "Up to" in failed["error"]
    with pytest.raises(ConfigError, match="no setting can be trained"):
        sweep(fleet_file, {"length": [4000]})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--customer", "acmee"], "Did you mean 'acme'"),
        (
            ["--customer", "acme", "--lengths", "1,x"],
            "--lengths: invalid value 'x': give numbers with commas between them, such as 5,20",
        ),
        (["--customer", "acme", "--lrs", "0"], "must be more than 0"),
        (["--customer", "acme", "--inits", "prefix"], "is none of text, task, random, zeros"),
    ],
)
def test_a_mistake_on_the_command_line_is_status_2_and_one_message(
    home: Home, fleet_file: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = cli.main(["sweep", str(fleet_file), *arguments])
    except SystemExit as ended:  # argparse
        status = ended.code
    errors = capsys.readouterr().err
    assert status == 2 and said in errors and "Traceback" not in errors


def test_what_a_sweep_cannot_be_decided_by_is_refused_before_anything_is_trained(
    home: Home, fleet_file: Path, sweep_stages: list[tuple[str, Any]]
) -> None:
    from pipeline.errors import ConfigError, DataError, TrainingError

    with pytest.raises(ConfigError, match="--metric blue: unknown"):
        sweep(fleet_file, {}, "blue")
    with pytest.raises(ConfigError, match="perplexity is the dev loss"):
        sweep(fleet_file, {}, "perplexity")
    with pytest.raises(ConfigError, match="65 length are 65 settings"):
        sweep(fleet_file, {"length": list(range(1, 66))})
    swept = Home(home.sweep(CustomerKey("acme")))
    with locks.holding(swept, [CustomerKey("acme")]), pytest.raises(TrainingError, match="another sweep of this customer"):
        sweep(fleet_file, {})
    with locks.holding(home, [CustomerKey("acme")]):
        sweep(fleet_file, {"length": [3]})  # prepared already, so another run is no hindrance
    sweep_stages.clear()
    text = fleet_file.read_text(encoding="utf-8")
    (fleet_file.parent / "empty.jsonl").write_text('{"input": "", "target": ""}\n', encoding="utf-8")
    fleet_file.write_text(text.replace("data: acme.jsonl", "data: {train: acme.jsonl, dev: empty.jsonl}"))
    with pytest.raises(DataError, match=r"customer acme: .*none of its 1 rows can be used"):
        sweep(fleet_file, {})
    assert sweep_stages == []


def test_the_report_of_the_customers_present_prefix_shows_the_curve_afterwards(
    home: Home, fleet_file: Path, sweep_stages: list[tuple[str, Any]]
) -> None:
    from flows import jobs
    from pipeline.evaluation.run import evaluate_job

    todo = open_work(fleet_file, ["acme"], home)
    (one,) = todo.customers
    member = jobs.job_customer(one, prepare(one, todo.base, home).card, todo.base, "auto", home)
    (planned,) = jobs.plan(todo.fleet, [one], {one.key: member}, todo.base, home)
    write_prefix(planned.job, member)
    engine = FakeEngine()
    engine.answers[member.prefix_dir] = lambda prompt: "soup"
    evaluate_job(planned.job, engine.load)
    report = Path(member.evaluation_dir) / "report.html"
    before = report.read_text(encoding="utf-8")
    assert "Prefix length" not in before

    content, _ = sweep(fleet_file, {"length": [2, 10]})
    after = report.read_text(encoding="utf-8")
    assert "<h2>Prefix length</h2>" in after and "on the same training rows" in after
    assert "## Prefix length" in report.with_suffix(".md").read_text(encoding="utf-8")
    assert content["said"][0] in after
    # Made again, it has it from the start.
    report.unlink()
    evaluate_job(planned.job, engine.load)
    assert "<h2>Prefix length</h2>" in report.read_text(encoding="utf-8")
