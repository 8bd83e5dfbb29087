"""The best setting is chosen on dev by the mean of its seeds and reported on test; what is made once is kept; one that fails is a row."""

import json

import pytest
import sacrebleu

from pipeline.errors import EvaluationError
from pipeline.sweep.found import newest_length_sweep

from .conftest import DEV, TEST, Swept


def whole(n: int) -> str:
    return f"number {n} is a quiet house by the river"


def part(n: int) -> str:
    return f"number {n} is a quiet house"


def poor(n: int) -> str:
    return f"number {n} is some place"


def test_the_best_is_chosen_on_dev_whatever_test_says_and_the_scores_are_sacrebleus(swept: Swept) -> None:
    swept.add(1, lambda n: part(n) if n < 100 else whole(n), current=True)
    best = swept.add(5, lambda n: whole(n) if n < 100 else part(n))
    found = swept.score()
    assert [group["best"] for group in found["settings"]] == [False, True]
    assert found["best"]["settings"]["length"] == 5 and not found["best"]["is_current"]
    texts = {"base": "the base says little", "current": None, "best": None}
    for name, answer in (("best", part), ("current", whole)):
        outputs = [answer(100 + i) for i in range(10)]
        wanted = sacrebleu.corpus_bleu(outputs, [[record.references[0] for record in TEST]]).score
        assert found["test"]["systems"][name]["bleu"]["score"] == pytest.approx(wanted, abs=1e-6)
    assert set(found["test"]["systems"]) == set(texts)
    wanted = sacrebleu.corpus_bleu([part(i) for i in range(10)], [[record.references[0] for record in DEV]]).score
    assert found["variants"][0]["dev"]["score"] == pytest.approx(wanted, abs=1e-6)
    assert found["settings"][0]["behind"]["gain"] == pytest.approx(100 - wanted, abs=1e-5)
    # The test rows were asked of the base, the best and the present settings alone.
    assert len([1 for prompt, _ in swept.engine.asked if prompt[0] >= 100]) == 3 * 10
    assert found["best"]["fleet_file"] == "- id: acme\n  prefix: {length: 5}\n"
    assert best in found["settings"][1]["variants"]


def test_seeds_are_repetitions_so_one_lucky_seed_does_not_win(swept: Swept) -> None:
    for seed, (lucky, steady) in enumerate([(whole, part), (poor, part), (poor, part)]):
        swept.add(1, lucky, seed=seed)
        swept.add(5, steady, seed=seed)
    found = swept.score()
    best = next(group for group in found["settings"] if group["best"])
    assert best["settings"]["length"] == 5 and len(best["variants"]) == 3
    lost = found["settings"][0]
    assert lost["seeds"][1] == 100 > best["score"] > lost["score"] == pytest.approx((100 + 2 * lost["seeds"][0]) / 3)
    assert list(found["test"]["systems"]) == ["base", "best", "best 2", "best 3"]
    assert "seed" not in found["best"]["fleet_file"] and list(found["curves"]) == ["length"]
    assert "mean of 3 seeds" in found["said"][0]


def test_of_equal_settings_the_shortest_wins_and_a_shorter_one_within_the_noise_is_named(swept: Swept) -> None:
    for length in (20, 5, 40):
        swept.add(length, whole, dev_loss=1 / length)
    swept.add(1, lambda n: part(n) if n % 10 == 3 else whole(n))
    swept.add(2, poor)
    found = swept.score()
    assert found["best"]["settings"]["length"] == 5
    assert found["best"]["shortest_equal"]["settings"]["length"] == 1
    assert any("prefix length 1, bleu" in sentence and "not to be told from it" in sentence for sentence in found["said"])
    assert [point["value"] for point in found["curves"]["length"] if point["best"]] == [5]


def test_where_lower_is_better_the_lowest_wins(swept: Swept) -> None:
    swept.add(1, whole)
    swept.add(5, poor)
    found = swept.score("ter")
    assert found["best"]["settings"]["length"] == 1 and found["better"] == "lower"
    assert found["settings"][1]["behind"]["gain"] > 0
    # The metrics of the fleet file are reported beside the one that decides.
    assert list(found["test"]["systems"]["best"]) == ["ter", "bleu", "rougeL", "chrf"]


def test_a_setting_that_cannot_be_trained_or_generated_for_is_its_own_row(
    swept: Swept, capfd: pytest.CaptureFixture[str]
) -> None:
    def breaks(_: int) -> str:
        raise RuntimeError("out of memory")

    swept.add(1, part)
    swept.add(5, breaks)
    swept.fail(60, "prefix of 60 <b>passes</b> the context")
    found = swept.score()
    errors = {row["settings"]["length"]: row.get("error") for row in found["variants"]}
    assert errors == {1: None, 5: "RuntimeError: out of memory", 60: "prefix of 60 <b>passes</b> the context"}
    assert found["best"]["settings"]["length"] == 1
    assert "trying each alone" in capfd.readouterr().out
    page = (swept.folder / "report" / "sweep.html").read_text(encoding="utf-8")
    assert "prefix length 60 failed: prefix of 60 &lt;b&gt;passes" in page
    assert not list((swept.folder / "report").glob("*.svg"))  # one point is no curve


def test_prefixes_that_leave_no_room_for_an_answer_are_told_before_anything_is_generated(swept: Swept) -> None:
    swept.add(1, whole)
    swept.engine.limit = 1
    with pytest.raises(EvaluationError, match=r"no setting could be judged: .* pass the base's context"):
        swept.score()
    assert {slot for _, slot in swept.engine.asked} <= {0}


def test_outputs_are_kept_so_a_killed_sweep_goes_on_and_an_added_value_costs_its_own_rows_only(swept: Swept) -> None:
    calls = 0

    def dies(n: int) -> str:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise SystemExit(143)
        return whole(n)

    swept.add(1, part)
    swept.add(5, dies)
    with pytest.raises(SystemExit):
        swept.score()
    with (swept.folder / "outputs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"of": "half a li')
    calls = -1000
    swept.score()
    rows = [rows for rows, _, _ in swept.engine.calls]
    # Base, both variants; what was not kept; base and best on test.
    assert rows == [30, 30 - 24, 20]
    swept.add(20, poor)
    swept.score()
    assert [rows for rows, _, _ in swept.engine.calls][3:] == [10]
    swept.score()
    assert len(swept.engine.calls) == 4


def test_files_have_the_figures_and_the_curve_and_a_report_finds_the_newest_sweep_of_its_base(swept: Swept) -> None:
    for length, answer in ((1, poor), (5, whole), (20, part)):
        swept.add(length, answer, current=length == 20)
    found = swept.score()
    folder = swept.folder / "report"
    shown = (folder / "sweep.md").read_text(encoding="utf-8")
    assert "| 5 | 100.00 (100.00 to 100.00) |  | 1.000 | 25,600 | 5 KiB | 12.5 | best |" in shown
    assert "in the fleet file" in shown and "```yaml\n- id: acme\n  prefix: {length: 5}\n```" in shown
    assert "![bleu by prefix length](sweep-length.svg)" in shown
    curve = (folder / "sweep-length.svg").read_text(encoding="utf-8")
    assert "var(" not in curve and "#1361cf" in curve
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert 'class="curve"' in page and "var(--accent)" in page and found["said"][0].split(",")[0] in page

    base = swept.job.base.digest
    sweeps = swept.folder / "sweeps"
    assert newest_length_sweep(sweeps, base) is None
    for name, made, changes in (("a", "2026-01-02", {}), ("b", "2026-01-03", {"curves": {}}), ("c", "2026-01-01", {})):
        (sweeps / "reports" / name).mkdir(parents=True)
        (sweeps / "reports" / name / "sweep.json").write_text(json.dumps({**found, "made": made, **changes}))
    (sweeps / "reports" / "d").mkdir()
    (sweeps / "reports" / "d" / "sweep.json").write_text("{")
    newest = newest_length_sweep(sweeps, base)
    assert newest is not None and newest["made"] == "2026-01-02"
    assert newest_length_sweep(sweeps, "0" * 64) is None
