"""The gate promotes only what meets every condition, and says why."""

import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluation.gate import Decision, decide
from pipeline.evaluation.scores import Comparison, Part, Score, Scores
from pipeline.training.job import JobGate


def scores(records: int = 50, **systems: float) -> Scores:
    """Scores of `systems`, and `prefix` compared with the others; p is 0.04 throughout, and none below 10 records."""
    p = 0.04 if records >= 10 else None
    found = {name: {"bleu": Score(value, value - 1, value + 1), "ter": Score(value, 0, 0)} for name, value in systems.items()}
    compared = {
        other: {name: Comparison(sign * (systems["prefix"] - value), 0, 0, p) for name, sign in (("bleu", 1), ("ter", -1))}
        for other, value in systems.items()
        if other != "prefix"
    }
    return Scores(found, compared, {}, {}, {}, {}, records)


def outcome(base: float, prefix: float, gain: float = 0.0, least: float | None = None) -> Decision:
    return decide(scores(base=base, prefix=prefix), JobGate("bleu", gain, least, None, None, None))


def test_more_than_the_base_is_promoted() -> None:
    assert outcome(10, 10.01).decision == "promote"
    assert outcome(10, 30).reasons == [
        "bleu is 30.00 with the prefix, 20.00 above the base's 10.00; the gate asks for better than the base."
    ]


@pytest.mark.parametrize("prefix", [10.0, 9.0])
def test_equal_to_the_base_or_worse_is_rejected(prefix) -> None:
    found = outcome(10, prefix)
    assert found.decision == "reject"
    assert "so this fails" in found.reasons[0]


def test_the_gain_must_be_greater_than_asked_not_equal_to_it() -> None:
    assert outcome(10, 12.3, gain=2.3).decision == "reject"
    assert outcome(10, 12.31, gain=2.3).decision == "promote"


def test_a_negative_gain_lets_a_prefix_be_a_little_worse() -> None:
    assert outcome(10, 9.5, gain=-1).decision == "promote"


def test_the_least_score_is_enough_and_the_condition_that_fails_stands_first() -> None:
    assert outcome(10, 40, least=40).decision == "promote"
    found = outcome(10, 39.9, least=40)
    assert found.decision == "reject"
    assert found.reasons[0] == "bleu is 39.90 with the prefix; the gate asks for at least 40, so this fails."
    assert len(found.reasons) == 2


def test_a_metric_that_was_not_computed_is_an_error() -> None:
    with pytest.raises(EvaluationError, match=r"asks for chrf.*evaluation\.metrics"):
        decide(scores(base=1, prefix=2), JobGate("chrf", 0.0, None, None, None, None))


def test_a_champion_that_is_not_beaten_is_kept() -> None:
    gate = JobGate("bleu", 0.0, None, 0.5, None, None)
    assert decide(scores(base=10, champion=20, prefix=20.6), gate).decision == "promote"
    found = decide(scores(base=10, champion=20, prefix=20.5), gate)
    assert found.decision == "keep"
    assert found.reasons[0] == (
        "bleu is 20.50 with the prefix, 0.50 above the champion's 20.00; the gate asks for a gain of more than 0.5, so this fails."
    )


def test_worse_than_the_base_is_a_rejection_whatever_the_champion_does() -> None:
    found = decide(scores(base=10, champion=20, prefix=9), JobGate("bleu", 0.0, None, 0.0, None, None))
    assert found.decision == "reject"
    assert "the base's" in found.reasons[0]
    assert "the champion's" in found.reasons[1]


def test_without_a_champion_the_gate_says_why_it_did_not_ask() -> None:
    gate = JobGate("bleu", 0.0, None, 0.0, None, None)
    found = decide(scores(base=10, prefix=20), gate, {"champion": "The champion was trained on another base."})
    assert (found.decision, found.reasons[-1]) == ("promote", "The champion was trained on another base.")
    assert decide(scores(base=10, champion=99, prefix=20), JobGate("bleu", 0.0, None, None, None, None)).decision == "promote"


@pytest.mark.parametrize(("level", "decision"), [(0.05, "promote"), (0.04, "reject")])
def test_with_a_significance_level_a_gain_counts_only_below_it(level, decision) -> None:
    found = decide(scores(base=10, prefix=20), JobGate("bleu", 0.0, None, None, None, level))
    assert found.decision == decision
    assert f"(p = 0.04); the gate asks for better than the base with p below {level:g}" in found.reasons[0]


def test_where_lower_is_better_gains_and_least_scores_turn_round() -> None:
    gate = JobGate("ter", 0.0, 50, None, None, None)
    assert decide(scores(base=60, prefix=45), gate).decision == "promote"
    assert "15.00 below the base's 60.00" in decide(scores(base=60, prefix=45), gate).reasons[0]
    found = decide(scores(base=60, prefix=55), gate)
    assert found.decision == "reject"
    assert "asks for at most 50, so this fails" in found.reasons[0]


def sliced(records: int, loss: float, other: str) -> Scores:
    found = scores(**{"base": 10, "champion": 12, "prefix": 20} if other == "champion" else {"base": 10, "prefix": 20})
    part = Part(records, found.systems, {other: {"bleu": Comparison(-loss, 0, 0, 0.5)}})
    fine = Part(50, found.systems, {other: {"bleu": Comparison(5, 0, 0, 0.5)}})
    found.slices["category"] = {"Airport": part, "City": fine}
    return found


def test_a_slice_that_loses_too_much_keeps_the_champion_or_rejects() -> None:
    gate = JobGate("bleu", 0.0, None, 0.0, 2.0, None)
    assert decide(sliced(10, 2.0, "champion"), gate).decision == "promote"
    found = decide(sliced(10, 2.1, "champion"), gate)
    assert found.decision == "keep"
    assert "category Airport (10 records): bleu is 2.10 worse than with the champion" in found.reasons[0]
    assert decide(sliced(10, 2.1, "base"), gate).decision == "reject"


def test_a_slice_of_few_records_is_not_judged() -> None:
    assert decide(sliced(9, 50, "champion"), JobGate("bleu", 0.0, None, 0.0, 2.0, None)).decision == "promote"


def test_a_slice_gate_that_cannot_judge_any_slice_keeps_what_is_in_use_and_says_why() -> None:
    gate = JobGate("bleu", 0.0, None, None, 2.0, None)
    small = sliced(9, 50, "base")
    del small.slices["category"]["City"]
    cut = sliced(20, 0, "base")
    for part in cut.slices["category"].values():
        part.comparisons["base"].clear()
    cases = {
        "the test split has no slices": scores(base=10, prefix=20),
        "no slice has 10 records or more": small,
        "bleu is not computed for slices": cut,
    }
    for why, found in cases.items():
        outcome = decide(found, gate)
        assert outcome.decision == "keep"
        assert f"none could be judged: {why}" in outcome.reasons[0]
        assert "remove evaluation.gate.max_regression_on_slice" in outcome.reasons[0]


def test_few_records_promote_nothing_where_significance_is_asked_for() -> None:
    gate = JobGate("bleu", 0.0, None, 0.0, None, 0.05)
    found = decide(scores(records=3, base=10, champion=12, prefix=20), gate)
    assert found.decision == "keep"
    assert "3 test records give no p-value (10 do), so this fails: give the customer a larger test split" in found.reasons[0]
    assert found.reasons[-1].startswith("3 test records decide nothing")
    assert decide(scores(records=3, base=10, prefix=9), gate).decision == "reject"
    plain = decide(scores(records=1, base=10, prefix=20), JobGate("bleu", 0.0, None, None, None, None))
    assert (plain.decision, plain.reasons[-1].partition(":")[0]) == ("promote", "1 test record decides nothing")
