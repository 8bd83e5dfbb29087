"""Scores equal the official ones, sacrebleu's, rouge-score's and figures worked by hand."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pipeline.errors import EvaluationError
from pipeline.evaluation.metrics import SEED, Score, score_systems, sentence_chrf

METRICS = ["bleu", "chrf", "rouge1", "rouge2", "rougeL"]


def score(
    outputs: list[str], references: list[list[str]], metric: str, *, resamples: int = 100, lowercase: bool = False
) -> Score:
    return score_systems({"x": outputs}, references, [metric], resamples=resamples, lowercase=lowercase).systems["x"][metric]


@pytest.fixture(scope="module")
def e2e(shared: Path) -> tuple[dict[str, list[str]], list[list[str]]]:
    def read(path: Path, field: str) -> list:
        return [json.loads(line)[field] for line in path.read_text(encoding="utf-8").splitlines()]

    folder = shared / "metrics_reference"
    if not folder.is_dir():
        pytest.skip("no ../shared/metrics_reference beside the checkout")
    systems = {name: read(folder / f"e2e_test_{name}.jsonl", "prediction") for name in ("tgen", "slug")}
    return systems, read(shared / "data" / "e2e" / "test.jsonl", "references")


def streams(references: list[list[str]]) -> list[list[str | None]]:
    return [
        list(stream)
        for stream in zip(*([*own, *[None] * (max(map(len, references)) - len(own))] for own in references), strict=True)
    ]


def test_bleu_equals_the_official_e2e_scores_to_four_digits(e2e) -> None:
    systems, references = e2e
    scores = score_systems(systems, references, ["bleu"], lowercase=True)
    assert round(scores.systems["tgen"]["bleu"].score / 100, 4) == 0.6593
    assert round(scores.systems["slug"]["bleu"].score / 100, 4) == 0.6619
    assert scores.signatures["bleu"] == f"nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:2.6.0|bs:1000|seed:{SEED}"


@pytest.mark.parametrize("kind", [BLEU, CHRF])
def test_interval_is_that_of_sacrebleus_own_bootstrap(e2e, kind, monkeypatch) -> None:
    systems, references = e2e
    outputs, references = systems["tgen"][:120], references[:120]
    monkeypatch.setenv("SACREBLEU_SEED", str(SEED))
    theirs = kind().corpus_score(outputs, streams(references), n_bootstrap=300)
    ours = score(outputs, references, kind.__name__.lower(), resamples=300)
    assert ours.score == pytest.approx(theirs.score, abs=1e-5)
    assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci, abs=1e-3)  # sacrebleu adds up in float32


def test_rouge_equals_the_package_with_stemmer_and_best_reference(e2e) -> None:
    systems, references = e2e
    outputs, references = systems["slug"][:60], references[:60]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for metric in ("rouge1", "rouge2", "rougeL"):
        theirs = [scorer.score_multi(own, output)[metric].fmeasure for output, own in zip(outputs, references, strict=True)]
        assert score(outputs, references, metric).score == pytest.approx(100 * np.mean(theirs), abs=1e-5)


def test_rouge_worked_by_hand() -> None:
    # Stems: output "cat sit on mat" (4), reference "the cat sit on the mat" (6); 4 words in common; 2 of 3 and 5 pairs ("cat sit", "sit on").
    output, reference = ["Cats sitting on mats"], [["the cat sits on the mat"]]
    assert score(output, reference, "rouge1").score == pytest.approx(100 * 2 * (4 / 4) * (4 / 6) / (4 / 4 + 4 / 6), abs=1e-5)
    assert score(output, reference, "rouge2").score == pytest.approx(100 * 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5), abs=1e-5)
    assert score(output, reference, "rougeL").score == pytest.approx(80.0, abs=1e-5)


def test_rouge_takes_the_best_reference_of_each_record() -> None:
    assert score(["a quiet house"], [["nothing alike", "a quiet house", "quiet"]], "rougeL").score == 100


def test_bleu_worked_by_hand() -> None:
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples; no run of four of 3, smoothed to 1/2 of one; same length, so no penalty.
    ours = score(["the cat sat on a mat"], [["the cat sat by a mat"]], "bleu").score
    assert ours == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * (1 / (2 * 3))) ** 0.25, abs=1e-5)


def test_case_counts_unless_lowercase_is_asked_for() -> None:
    output, reference = ["THE QUIET HOUSE BY THE RIVER"], [["the quiet house by the river"]]
    assert score(output, reference, "bleu").score == 0
    assert score(output, reference, "bleu", lowercase=True).score == pytest.approx(100)


def test_a_further_reference_can_only_help_and_may_be_missing_for_some_records() -> None:
    outputs = ["a quiet house by the river", "a loud bar in the town"]
    one = [["the house is by the river"], ["a loud bar in the old town"]]
    two = [["the house is by the river", "a quiet house by the river"], ["a loud bar in the old town"]]
    for metric in METRICS:
        assert score(outputs, two, metric).score > score(outputs, one, metric).score


@pytest.mark.parametrize("metric", METRICS)
def test_outputs_equal_to_the_references_get_100_with_no_spread(metric) -> None:
    outputs = [f"house number {i} stands by the river" for i in range(20)]
    assert score(outputs, [[o] for o in outputs], metric) == Score(100, 100, 100)


@pytest.mark.parametrize("metric", METRICS)
def test_empty_outputs_get_0_and_do_not_stop_anything(metric) -> None:
    references = [["a quiet house by the river"], ["a loud bar in the town"]]
    assert score(["", "  "], references, metric) == Score(0, 0, 0)
    half = score(["a quiet house by the river", ""], references, metric)
    assert 0 < half.score < 100


@pytest.mark.parametrize("metric", METRICS)
def test_one_record_has_an_interval_of_no_width(metric) -> None:
    only = score(["a quiet house by a river"], [["a quiet house by the river"]], metric)
    assert 0 < only.low == only.score == only.high < 100


@pytest.mark.parametrize("metric", METRICS)
def test_one_and_the_same_output_for_every_record_is_scored(metric) -> None:
    outputs = ["a quiet house by the river"] * 30
    found = score(outputs, [[f"a quiet house number {i} by the river"] for i in range(30)], metric)
    assert 0 < found.low <= found.score <= found.high < 100


def test_interval_holds_the_score_and_narrows_with_more_records(e2e) -> None:
    systems, references = e2e
    few, many = (score(systems["tgen"][:n], references[:n], "chrf", resamples=300) for n in (40, 400))
    assert few.low < few.score < few.high
    assert many.high - many.low < few.high - few.low


def test_same_seed_same_interval_other_seed_other_interval() -> None:
    outputs = [f"a house {i % 7} by the {'river' if i % 3 else 'sea'}" for i in range(40)]
    references = [[f"a house {i % 5} by the river"] for i in range(40)]

    def interval(seed: int) -> tuple[float, float]:
        found = score_systems({"x": outputs}, references, ["chrf"], resamples=200, seed=seed).systems["x"]["chrf"]
        return found.low, found.high

    assert interval(1) == interval(1) != interval(2)


def test_intervals_do_not_depend_on_how_resamples_are_cut_into_blocks(monkeypatch) -> None:
    outputs, references = [f"a b {i} c" for i in range(30)], [[f"a b {i % 4} c d"] for i in range(30)]
    whole = score(outputs, references, "chrf", resamples=150)
    monkeypatch.setattr("pipeline.evaluation.metrics._BLOCK", 7 * 30)
    assert score(outputs, references, "chrf", resamples=150) == whole


@pytest.mark.parametrize(
    "text",
    [
        "静かな川辺の家です。",
        "тихий дом у самой реки",
        "بيت هادئ على ضفة النهر",
        "\U0001f3e0 by the \U0001f30a is quiet and small",
    ],
)
def test_chrf_judges_other_scripts_and_emoji(text) -> None:
    assert score([text], [[text]], "chrf").score == pytest.approx(100)
    assert score([text[:-3]], [[text]], "chrf").score < 100


def test_a_metric_that_cannot_judge_the_texts_says_so() -> None:
    texts = ["静かな川辺の家です。", "駅の近くのにぎやかな店。"]
    scores = score_systems({"x": texts}, [[t] for t in texts], METRICS, resamples=100)
    assert set(scores.notes) == {"bleu", "rouge1", "rouge2", "rougeL"}
    assert "use chrf" in scores.notes["bleu"]
    words = ["a quiet house by the river"]
    assert score_systems({"x": words}, [words], METRICS, resamples=100).notes == {}


def test_a_thousand_records_take_a_few_seconds_per_metric() -> None:
    words = [
        "quiet",
        "loud",
        "house",
        "bar",
        "river",
        "town",
        "station",
        "cheap",
        "family",
        "friendly",
        "near",
        "the",
        "in",
        "with",
        "a",
        "and",
        "of",
        "food",
        "rating",
        "high",
    ]
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 20)) for _ in range(2000)]
    for metric in METRICS:
        started = time.process_time()
        score_systems({"base": texts[:1000], "prefix": texts[1000:]}, [[t] for t in texts[:1000]], [metric], resamples=1000)
        assert time.process_time() - started < 6, metric  # two systems, each within 3 s


def test_sentence_chrf_is_sacrebleus() -> None:
    outputs, references = ["a quiet house", ""], [["the quiet house", "a house"], ["a bar"]]
    theirs = [CHRF().sentence_score(o, r).score for o, r in zip(outputs, references, strict=True)]
    assert sentence_chrf({"x": outputs}, references)["x"] == pytest.approx(theirs)
    assert math.isclose(theirs[1], 0)


def test_what_cannot_be_scored_is_refused_with_the_remedy() -> None:
    with pytest.raises(EvaluationError, match="no record"):
        score([], [], "bleu")
    with pytest.raises(EvaluationError, match="record 2 has no reference"):
        score(["a", "b"], [["a"], []], "bleu")
    with pytest.raises(EvaluationError, match="1 outputs for 2 records"):
        score(["a"], [["a"], ["b"]], "bleu")
    with pytest.raises(EvaluationError, match=r"'blue'.*Known: bleu"):
        score(["a"], [["a"]], "blue")
