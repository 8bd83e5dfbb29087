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
from sacrebleu.metrics.ter import TER

from pipeline.errors import EvaluationError
from pipeline.evaluation.meteor import Meteor, check_meteor
from pipeline.evaluation.metrics import METRICS as KINDS
from pipeline.evaluation.metrics import check_metrics
from pipeline.evaluation.ptb import ptb_tokens
from pipeline.evaluation.scores import SEED, Score, score_systems, sentence_chrf
from pipeline.evaluation.slots import slot_errors

METRICS = ["bleu", "chrf", "rouge1", "rouge2", "rougeL"]
# Those whose scale ends at 100 and which are 100 only for outputs equal to a reference.
SIMILARITIES = [*METRICS, "rougeL_coco"]
TEXTUAL = [name for name in KINDS if name not in ("meteor", "slot_error_rate", "perplexity")]


def score(
    outputs: list[str], references: list[list[str]], metric: str, *, resamples: int = 100, preset: str = "default"
) -> Score:
    return score_systems({"x": outputs}, references, [metric], resamples=resamples, preset=preset).systems["x"][metric]


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
    scores = score_systems(systems, references, ["bleu"], preset="e2e")
    assert round(scores.systems["tgen"]["bleu"].score / 100, 4) == 0.6593
    assert round(scores.systems["slug"]["bleu"].score / 100, 4) == 0.6619
    assert scores.signatures["bleu"] == f"nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:2.6.0|bs:1000|seed:{SEED}"


@pytest.mark.parametrize(
    ("metric", "tgen", "slug"), [("nist", 8.6094, 8.6130), ("rougeL_coco", 68.50, 67.72), ("cider", 2.2338, 2.2615)]
)
def test_nist_rouge_l_and_cider_equal_the_official_e2e_scores_to_four_digits(e2e, metric, tgen, slug) -> None:
    systems, references = e2e
    scores = score_systems(systems, references, [metric], preset="e2e", resamples=100).systems
    digits = 2 if metric == "rougeL_coco" else 4  # in points of 100
    assert [round(scores[system][metric].score, digits) for system in ("tgen", "slug")] == [tgen, slug]


@pytest.mark.slow
def test_meteor_equals_the_official_e2e_scores_to_four_digits(e2e) -> None:
    needs_meteor()
    systems, references = e2e
    scores = score_systems(systems, references, ["meteor"], resamples=100).systems
    assert [round(scores[system]["meteor"].score, 2) for system in ("tgen", "slug")] == [44.83, 44.54]
    assert scores["tgen"]["meteor"].low < 44.83 < scores["tgen"]["meteor"].high


def test_paired_bootstrap_gives_sacrebleus_p_value(e2e) -> None:
    systems, references = e2e
    found = score_systems(systems, references, ["bleu"], preset="e2e", ours="slug")
    assert round(found.comparisons["tgen"]["bleu"].p, 3) == 0.256
    gain = found.comparisons["tgen"]["bleu"]
    assert gain.low < 0 < gain.gain < gain.high
    assert gain.gain == pytest.approx(found.systems["slug"]["bleu"].score - found.systems["tgen"]["bleu"].score, abs=1e-5)


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
    assert score(output, reference, "bleu", preset="e2e").score == pytest.approx(100)


def test_a_further_reference_can_only_help_and_may_be_missing_for_some_records() -> None:
    outputs = ["a quiet house by the river", "a loud bar in the town"]
    one = [["the house is by the river"], ["a loud bar in the old town"]]
    two = [["the house is by the river", "a quiet house by the river"], ["a loud bar in the old town"]]
    for metric in METRICS:
        assert score(outputs, two, metric).score > score(outputs, one, metric).score


@pytest.mark.parametrize("metric", SIMILARITIES)
def test_outputs_equal_to_the_references_get_100_with_no_spread(metric) -> None:
    outputs = [f"house number {i} stands by the river" for i in range(20)]
    assert score(outputs, [[o] for o in outputs], metric) == Score(100, 100, 100)


@pytest.mark.parametrize("metric", SIMILARITIES)
def test_empty_outputs_get_0_and_do_not_stop_anything(metric) -> None:
    references = [["a quiet house by the river"], ["a loud bar in the town"]]
    assert score(["", "  "], references, metric) == Score(0, 0, 0)
    half = score(["a quiet house by the river", ""], references, metric)
    assert 0 < half.score < 100


@pytest.mark.parametrize("metric", SIMILARITIES)
def test_one_record_has_an_interval_of_no_width(metric) -> None:
    only = score(["a quiet house by a river"], [["a quiet house by the river"]], metric)
    assert 0 < only.low == only.score == only.high < 100


@pytest.mark.parametrize("metric", SIMILARITIES)
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
    monkeypatch.setattr("pipeline.evaluation.scores._BLOCK", 7 * 30)
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


@pytest.mark.parametrize("metric", [name for name in KINDS if name not in ("ter", "meteor")])  # minutes, and said so in the docs
def test_a_thousand_records_take_a_few_seconds_per_metric(metric) -> None:
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
    systems, references = {"base": texts[:1000], "prefix": texts[1000:]}, [[t] for t in texts[:1000]]
    inputs = [f"name : {' '.join(text.split()[:2])} | food : {text.split()[3]}" for text in texts[:1000]]
    losses = {name: np.ones((1000, 2)) for name in systems}
    started = time.process_time()
    score_systems(systems, references, [metric], ours="prefix", inputs=inputs, losses=losses, resamples=1000)
    assert time.process_time() - started < 6  # two systems, each within 3 s


def test_sentence_chrf_is_sacrebleus() -> None:
    outputs, references = ["a quiet house", ""], [["the quiet house", "a house"], ["a bar"]]
    theirs = [CHRF().sentence_score(o, r).score for o, r in zip(outputs, references, strict=True)]
    assert sentence_chrf({"x": outputs}, references)["x"] == pytest.approx(theirs)
    assert math.isclose(theirs[1], 0)


def needs_meteor() -> None:
    try:
        check_meteor()
    except EvaluationError as error:
        pytest.skip(str(error))


def test_meteor_of_sums_is_the_programs_own_score_of_the_set() -> None:
    needs_meteor()
    outputs = ["a quiet house by the river", "loud bars in town", "a house", ""]
    references = [["a quiet house by the river"], ["a loud bar in the town"], ["the house", "one home"], ["a bar"]]
    with Meteor() as program:
        rows = program.statistics(references)(outputs)
        program._say(" ||| ".join(("EVAL", *(" ".join(map(str, row)) for row in rows))))
        theirs = [float(program._hear()) for _ in range(len(rows) + 1)]
        assert program.scores(rows.sum(axis=0, keepdims=True))[0] == pytest.approx(theirs[-1], abs=1e-9)
    assert theirs[0] == 1
    assert theirs[3] == 0


def test_meteor_without_its_program_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.meteor.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"prefixfleet\[meteor\]"):
        score(["a"], [["a"]], "meteor")


def test_ter_is_sacrebleus_and_lower_is_better(e2e) -> None:
    systems, references = e2e
    outputs, references = systems["tgen"][:40], references[:40]
    found = score_systems({"tgen": outputs, "worse": ["nothing"] * 40}, references, ["ter"], ours="tgen", resamples=100)
    assert found.systems["tgen"]["ter"].score == pytest.approx(TER().corpus_score(outputs, streams(references)).score, abs=1e-5)
    assert found.systems["worse"]["ter"].score > found.systems["tgen"]["ter"].score
    assert found.comparisons["worse"]["ter"].gain > 0


def test_nist_worked_by_hand() -> None:
    # Four words, each once: log2 4 for each; "a b" is known once "a" is: log2 1 = 0. Two of the two words of the output match: 4 / 2.
    # Two words against four: the penalty exp(beta log(1/2) ** 2).
    beta = math.log(0.5) / math.log(1.5) ** 2
    assert score(["a b"], [["a b c d"]], "nist").score == pytest.approx(2 * math.exp(beta * math.log(0.5) ** 2), abs=1e-5)


def test_coco_rouge_takes_best_precision_and_best_recall_apart() -> None:
    # Against "a b c d": precision 2/2, recall 2/4; against "a x": 1/2 and 1/2.
    p, r = 1.0, 0.5
    expected = 100 * (1 + 1.44) * p * r / (r + 1.44 * p)
    assert score(["a b"], [["a b c d", "a x"]], "rougeL_coco").score == pytest.approx(expected, abs=1e-5)


def test_cider_worked_by_hand() -> None:
    # Two records with nothing in common: all n-grams weigh log 2, and the cosine of equal texts is 1 for the orders that they have.
    texts = ["a b", "c d e"]
    assert score(texts, [[t] for t in texts], "cider").score == pytest.approx(10 * (2 / 4 + 3 / 4) / 2, abs=1e-5)
    assert score(["c d e", "a b"], [[t] for t in texts], "cider").score == 0


def test_exact_match_counts_outputs_equal_to_any_reference_but_for_blanks_and_composition() -> None:
    outputs = ["a  house ", "A house", "cafe\u0301", ""]
    references = [["a bar", "a house"], ["a house"], ["caf\u00e9"], ["x"]]
    assert score(outputs, references, "exact_match").score == 50


def test_slot_errors_are_missing_added_and_repeated_values() -> None:
    inputs = [
        "name : The Rice Boat | food : Thai | area : riverside | familyFriendly : yes",
        "name : Zizzi | food : Italian | price : £20-25",
        "no slots here",
    ]
    outputs = [
        "The Rice Boat, the rice boat, serves Thai and Italian food.",  # area missing, name repeated, Italian added
        "Zizzi is Italian, for £20-25.",
        "x",
    ]
    found = score_systems({"x": outputs}, [[o] for o in outputs], ["slot_error_rate"], inputs=inputs, resamples=100)
    assert found.systems["x"]["slot_error_rate"].score == pytest.approx(100 * 3 / 6)
    assert "first references themselves" in found.notes["slot_error_rate"]
    with pytest.raises(EvaluationError, match="no input of the test split has slots"):
        check_metrics(["slot_error_rate"], ["plain text"])


def counted(inputs: list[str], outputs: list[str]) -> list[list[float]]:
    """Missing, added, repeated, values."""
    errors = slot_errors(inputs)
    assert errors is not None
    return errors(outputs).tolist()


def test_values_of_slots_that_the_input_does_not_have_at_all_are_added() -> None:
    inputs = [
        "name : Zizzi | food : Rice",
        "name : The Rice Boat | area : riverside",
        "name : Wok | area : centre | mood : the | size : 12 | near : Zizzi",
    ]
    outputs = [
        "Zizzi at the riverside has rice.",
        "The Rice Boat, all 12 of it, on the riverside.",
        "Wok, the 12, near Zizzi, centre, riverside",
    ]
    # "the" and "12" tell nothing where there is no such slot; "rice" is part of the second's name; riverside is another area in the third.
    assert counted(inputs, outputs) == [[0, 1, 0, 2], [0, 0, 0, 2], [0, 1, 0, 5]]
    assert counted(inputs[:2], ["Zizzi has rice", "The Rice Boat by the riverside serves rice"])[1] == [0, 0, 0, 2]


def test_a_value_may_hold_colons_and_triples_are_told_from_it_by_all_inputs() -> None:
    films = ["title : Alien: Covenant | year : 2017", "title : A : B | year : 2018", "title: Alien: Covenant"]
    assert counted(films, ["Alien: Covenant, of 2017", "A : B came in 2018", "alien covenant"]) == [[0, 0, 0, 2]] * 2 + [
        [0, 0, 0, 1]
    ]
    triples = ["Alan_Bean : nationality : United_States | Alan_Bean : born : 1932", "X_1 : title : A : B", "no triple"]
    told = ["Alan Bean of the united states, born 1932", "X 1 is A : B", ""]
    assert counted(triples, told) == [[0, 0, 0, 3], [0, 0, 0, 2], [0, 0, 0, 0]]


def test_values_in_scripts_without_blanks_are_found_within_the_text() -> None:
    inputs = ["店名 : 緑の亭 | 料理 : 寿司", "店名 : 青い鳥 | 料理 : そば | 場所 : 川辺", "이름 : 서울", "ชื่อ : บ้านสวน"]
    outputs = ["緑の亭では寿司が食べられます。", "川辺の青い鳥は寿司の店です。", "서울에서 만나요", "ร้านบ้านสวนอร่อย"]
    assert counted(inputs, outputs) == [[0, 0, 0, 2], [1, 1, 0, 3], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_distinct_counts_different_words_of_all_outputs_together() -> None:
    outputs = ["a b a", "a c", ""]
    assert score(outputs, [["x"]] * 3, "distinct1").score == pytest.approx(100 * 3 / 5)
    assert score(outputs, [["x"]] * 3, "distinct2").score == pytest.approx(100 * 3 / 3)
    assert score(["", ""], [["x"]] * 2, "distinct1") == Score(0, 0, 0)


def test_perplexity_is_of_all_tokens_and_never_infinite() -> None:
    losses = {"x": np.array([[2.0, 1.0], [4.0, 3.0]]), "bad": np.array([[9e9, 1.0], [9e9, 1.0]])}
    found = score_systems(
        {"x": ["", ""], "bad": ["", ""]}, [["a"], ["b"]], ["perplexity"], losses=losses, ours="x", resamples=100
    )
    assert found.systems["x"]["perplexity"].score == pytest.approx(math.exp(6 / 4), abs=1e-5)
    assert math.isfinite(found.systems["bad"]["perplexity"].high)
    assert found.comparisons["bad"]["perplexity"].gain > 0


def test_webnlg_preset_is_the_challenges_tokenisation() -> None:
    outputs = ["Aarhus Airport\u2019s runway is 2702.0 m long.", "\u00c5rhus is big"]
    references = [["Aarhus Airport's runway has 2,702.0 m.", "It is 2702.0 m long.", "x", "never seen"], ["Arhus is quite big"]]
    tokens = ["aarhus airport ' s runway is 2702 . 0 m long .", "arhus is big"]
    firsts = [["aarhus airport ' s runway has 2 , 702 . 0 m .", "arhus is quite big"], ["it is 2702 . 0 m long .", ""], ["x", ""]]
    theirs = BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(tokens, firsts).score
    assert score(outputs, references, "bleu", preset="webnlg").score == pytest.approx(theirs, abs=1e-5)
    found = score_systems({"x": outputs}, references, ["bleu"], preset="webnlg")
    assert "|prep:webnlg|refs:first3|" in found.signatures["bleu"]


def test_every_metric_has_a_signature_and_bears_empty_references() -> None:
    found = score_systems({"x": ["a house", ""]}, [[""], ["", "a house"]], TEXTUAL, resamples=100)
    assert set(found.signatures) == set(TEXTUAL)
    for name, value in found.systems["x"].items():
        assert math.isfinite(value.score) and value.low <= value.high, name
        assert name.partition("L")[0].rstrip("12") in found.signatures[name] or "nrefs" in found.signatures[name]


@pytest.mark.parametrize("outputs", [["", ""], ["same", "same"], ["\U0001f3e0", "\u9759\u304b"]])
def test_every_metric_bears_empty_identical_and_foreign_outputs(outputs) -> None:
    found = score_systems({"x": outputs, "y": ["a b", "c"]}, [["a b c d"], ["\u9759"]], TEXTUAL, ours="x", resamples=100)
    assert all(math.isfinite(v.score + v.low + v.high) for own in found.systems.values() for v in own.values())
    assert all(math.isfinite(c.gain + c.low + c.high) and c.p is None for c in found.comparisons["y"].values())


def test_a_system_compared_with_itself_gains_nothing_with_p_1() -> None:
    texts = [f"house {i} by the river" for i in range(10)]
    found = score_systems({"x": texts, "y": texts}, [["a house by the river"]] * 10, TEXTUAL, ours="x", resamples=100)
    assert {(c.gain, c.low, c.high, c.p) for c in found.comparisons["y"].values()} == {(0, 0, 0, 1)}


@pytest.mark.parametrize(("records", "tested"), [(1, False), (9, False), (10, True)])
def test_below_ten_records_there_is_no_p_value(records, tested) -> None:
    better, worse = ["a quiet house by the river"] * records, ["a house"] * records
    found = score_systems({"x": better, "y": worse}, [[b] for b in better], TEXTUAL, ours="x", resamples=100)
    assert found.records == records
    assert {c.p is not None for c in found.comparisons["y"].values()} == {tested}


def test_a_slice_has_the_scores_of_its_records_alone() -> None:
    outputs = [f"a house {i % 7} by the {'river' if i % 3 else 'sea'}" for i in range(20)]
    references = [[f"a house {i % 5} by the river"] for i in range(20)]
    rows = list(range(3, 11))
    slices = {"category": {"bar": rows, "cafe": [0]}}
    whole = score_systems(
        {"x": outputs, "y": outputs[::-1]}, references, [*METRICS, "distinct1"], ours="x", slices=slices, resamples=100
    )
    alone = score_systems({"x": [outputs[i] for i in rows]}, [references[i] for i in rows], METRICS, resamples=100)
    part = whole.slices["category"]["bar"]
    assert part.records == 8
    assert part.systems["x"] == alone.systems["x"]
    assert set(part.comparisons["y"]) == set(METRICS)


def test_words_are_those_of_stanfords_tokeniser() -> None:
    """Expected tokens were made by CoreNLP 3.4.1's PTBTokenizer with -lowerCase, punctuation dropped as COCO does."""
    expected = {
        "It's a family-friendly pub (near the U.S. Embassy), isn't it?": "it 's a family-friendly pub -lrb- near the u.s. embassy -rrb- is n't it",
        "Prices: £20-25, i.e. 2702.0 or 1,095.": "prices # 20-25 i.e. 2702.0 or 1,095",
        'St. Mary\'s has 18L/36R and 1.8g; cannot say "no"...': "st. mary 's has 18l/36r and 1.8 g can not say no",
        "Mr. J.R.R. Tolkien -- they'll rock 'n roll": "mr. j.r.r. tolkien they 'll rock 'n roll",
        "": "",
    }
    assert {text: " ".join(ptb_tokens(text)) for text in expected} == expected


def test_what_cannot_be_scored_is_refused_with_the_remedy() -> None:
    with pytest.raises(EvaluationError, match="no record"):
        score([], [], "bleu")
    with pytest.raises(EvaluationError, match="record 2 has no reference"):
        score(["a", "b"], [["a"], []], "bleu")
    with pytest.raises(EvaluationError, match="1 outputs for 2 records"):
        score(["a"], [["a"], ["b"]], "bleu")
    with pytest.raises(EvaluationError, match=r"'blue'.*Known: bleu"):
        score(["a"], [["a"]], "blue")
