"""The gate promotes only what meets every condition, and says why."""

import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluation.gate import Decision, decide
from pipeline.evaluation.metrics import Score
from pipeline.training.job import JobGate


def outcome(base: float, prefix: float, gain: float = 0.0, least: float | None = None) -> Decision:
    scores = {system: {"bleu": Score(value, value - 1, value + 1)} for system, value in (("base", base), ("prefix", prefix))}
    return decide(scores, JobGate("bleu", gain, least))


def test_more_than_the_base_is_promoted() -> None:
    assert outcome(10, 10.01).decision == "promote"
    assert outcome(10, 30).reasons == [
        "bleu is 30.00 with the prefix, 20.00 above the base's 10.00; the gate asks for more than the base."
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
        decide({"base": {}, "prefix": {}}, JobGate("chrf", 0.0, None))
