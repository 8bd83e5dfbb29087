"""The gate: may this prefix become champion? Scores in, a decision with reasons in words out. Knows nothing of metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.errors import EvaluationError
from pipeline.evaluation.metrics import Score


class Gate(Protocol):
    """What a gate says; `pipeline.training.job.JobGate` and `pipeline.config.GateSettings` are such."""

    @property
    def metric(self) -> str:
        """The metric that decides."""

    @property
    def min_gain_over_base(self) -> float:
        """The score must be greater than the base's by more than this, in points."""

    @property
    def min_score(self) -> float | None:
        """The score must be at least this, in points."""


@dataclass(frozen=True)
class Decision:
    """The outcome of the gate.

    Attributes:
        decision: `promote` only if every condition holds.
        reasons: one sentence for each condition, whether it holds or not; those that fail stand first.
    """

    decision: Literal["promote", "reject"]
    reasons: list[str]


def decide(scores: Mapping[str, Mapping[str, Score]], gate: Gate) -> Decision:
    """Apply `gate` to the scores of the systems `base` and `prefix`.

    Raises:
        EvaluationError: the gate's metric was not computed.
    """
    try:
        base, prefix = scores["base"][gate.metric].score, scores["prefix"][gate.metric].score
    except KeyError as error:
        raise EvaluationError(
            f"the gate asks for {gate.metric}, which was not computed. Add it to evaluation.metrics."
        ) from error
    gain = prefix - base
    # Compared as they are written in metrics.json, so that a reader with a calculator comes to the same decision.
    enough = round(gain, 6) > gate.min_gain_over_base
    asked = "more than the base" if gate.min_gain_over_base == 0 else f"a gain of more than {gate.min_gain_over_base:g}"
    comparison = f"{abs(gain):.2f} {'above' if gain > 0 else 'below'}" if gain else "equal to"
    conditions = [
        (
            enough,
            f"{gate.metric} is {prefix:.2f} with the prefix, {comparison} the base's {base:.2f}; "
            f"the gate asks for {asked}{'' if enough else ', so this fails'}.",
        )
    ]
    if gate.min_score is not None:
        reached = prefix >= gate.min_score
        conditions.append(
            (
                reached,
                f"{gate.metric} is {prefix:.2f} with the prefix; the gate asks for at least {gate.min_score:g}"
                f"{'' if reached else ', so this fails'}.",
            )
        )
    return Decision(
        decision="promote" if all(holds for holds, _ in conditions) else "reject",
        reasons=[reason for _, reason in sorted(conditions, key=lambda condition: condition[0])],
    )
