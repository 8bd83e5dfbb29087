"""The gate: may this prefix become champion? Scores in, a decision with reasons in words out. Knows nothing of how scores are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.errors import EvaluationError
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.scores import LEAST_RECORDS, Comparison, Score, Scores

Verdict = Literal["promote", "keep", "reject"]


class Gate(Protocol):
    """What a gate says; `pipeline.training.job.JobGate` and `pipeline.config.GateSettings` are such."""

    @property
    def metric(self) -> str:
        """The metric that decides."""

    @property
    def min_gain_over_base(self) -> float:
        """The score must be better than the base's by more than this, in the metric's unit."""

    @property
    def min_score(self) -> float | None:
        """The score must be at least this; at most, where lower is better."""

    @property
    def min_gain_over_champion(self) -> float | None:
        """The score must be better than the champion's by more than this; None: the champion is not asked."""

    @property
    def max_regression_on_slice(self) -> float | None:
        """No slice may be worse by more than this."""

    @property
    def significance(self) -> float | None:
        """Gains count with a p-value below this only."""


@dataclass(frozen=True)
class Decision:
    """The outcome of the gate.

    Attributes:
        decision: `promote` if every condition holds; `keep` (whatever is in use) if those that fail compare with the champion or could not be
            judged; else `reject`.
        reasons: one sentence for each condition, whether it holds or not; those that fail stand first; then what else must be known.
    """

    decision: Verdict
    reasons: list[str]


@dataclass(frozen=True)
class _Condition:
    """A condition, what is said of it, and the verdict if it fails."""

    holds: bool
    reason: str
    otherwise: Verdict = "reject"


def decide(scores: Scores, gate: Gate, remarks: Mapping[str, str] | None = None) -> Decision:
    """Apply `gate` to the scores of `prefix`, `base` and, where there is one, `champion`.

    Args:
        scores: `prefix` compared with the others.
        gate: see there.
        remarks: system -> why it is not among the scores, said where the gate asks for it.

    Raises:
        EvaluationError: the gate's metric was not computed.
    """
    metric = gate.metric
    if any(metric not in scores.systems.get(system, {}) for system in ("base", "prefix")):
        raise EvaluationError(f"the gate asks for {metric}, which was not computed. Add it to evaluation.metrics.")
    conditions = [_gain(scores, gate, "base", gate.min_gain_over_base)]
    if gate.min_score is not None:
        conditions.append(_least(scores.systems["prefix"][metric], gate.min_score, metric))
    said = []
    if gate.min_gain_over_champion is not None:
        if "champion" in scores.systems:
            conditions.append(_gain(scores, gate, "champion", gate.min_gain_over_champion))
        else:
            said.append((remarks or {}).get("champion", "There is no champion to compare with."))
    if gate.max_regression_on_slice is not None:
        conditions.append(_slices(scores, metric, gate.max_regression_on_slice))
    if (few := few_records(scores.records)) is not None:
        said.append(few)
    failed = [condition for condition in conditions if not condition.holds]
    verdict: Verdict = "promote"
    if failed:
        verdict = "reject" if any(condition.otherwise == "reject" for condition in failed) else "keep"
    return Decision(verdict, [c.reason for c in sorted(conditions, key=lambda c: (c.holds, c.otherwise == "keep"))] + said)


def few_records(records: int) -> str | None:
    """A warning where there are too few test records to decide anything by; None where there are enough."""
    if records >= LEAST_RECORDS:
        return None
    counted = "1 test record decides" if records == 1 else f"{records} test records decide"
    return f"{counted} nothing: no p-value is given, and intervals mean little, below {LEAST_RECORDS}. Give the customer a larger test split."


def _gain(scores: Scores, gate: Gate, other: str, least: float) -> _Condition:
    metric = gate.metric
    ours, theirs = (scores.systems[system][metric].score for system in ("prefix", other))
    compared = scores.comparisons[other][metric]
    # Compared as they are written in metrics.json, so that a reader with a calculator comes to the same decision.
    enough = round(compared.gain, 6) > least
    untested = gate.significance is not None and compared.p is None
    certain = gate.significance is None or (compared.p is not None and compared.p < gate.significance)
    asked = f"better than the {other}" if least == 0 else f"a gain of more than {least:g}"
    if gate.significance is not None:
        asked += f" with p below {gate.significance:g}"
    shown = f"{metric} is {ours:.2f} with the prefix, {_distance(compared, ours - theirs)} the {other}'s {theirs:.2f}"
    tested = "" if gate.significance is None or compared.p is None else f" (p = {compared.p:.3g})"
    ending = "" if enough and certain else ", so this fails"
    if untested:
        ending = (
            f", and {scores.records} test record{'' if scores.records == 1 else 's'} give no p-value ({LEAST_RECORDS} do), so this fails: "
            "give the customer a larger test split, or remove evaluation.gate.significance"
        )
    return _Condition(
        enough and certain,
        f"{shown}{tested}; the gate asks for {asked}{ending}.",
        # What cannot be judged is no reason to reject.
        "keep" if other == "champion" or (enough and untested) else "reject",
    )


def _distance(compared: Comparison, difference: float) -> str:
    if not compared.gain:
        return "equal to"
    return f"{abs(compared.gain):.2f} {'above' if difference > 0 else 'below'}"


def _least(score: Score, least: float, metric: str) -> _Condition:
    higher = METRICS[metric].better == "higher"
    reached = score.score >= least if higher else score.score <= least
    return _Condition(
        reached,
        f"{metric} is {score.score:.2f} with the prefix; the gate asks for at {'least' if higher else 'most'} {least:g}"
        f"{'' if reached else ', so this fails'}.",
    )


def _slices(scores: Scores, metric: str, most: float) -> _Condition:
    other = "champion" if "champion" in scores.systems else "base"
    judged = [
        (part.comparisons[other][metric].gain, f"{name} {value}", part.records)
        for name, values in scores.slices.items()
        for value, part in values.items()
        if part.records >= LEAST_RECORDS and metric in part.comparisons[other]
    ]
    if not judged:
        why = f"no slice has {LEAST_RECORDS} records or more" if scores.slices else "the test split has no slices"
        if any(part.records >= LEAST_RECORDS for values in scores.slices.values() for part in values.values()):
            why = f"{metric} is not computed for slices"
        return _Condition(
            False,
            f"The gate bears a loss of {most:g} on a slice, but none could be judged: {why}. Give the customer a larger test split, name other "
            "evaluation.slices, or remove evaluation.gate.max_regression_on_slice.",
            "keep",
        )
    gain, where, records = min(judged)
    holds = round(-gain, 6) <= most
    change = f"{abs(gain):.2f} {'better' if gain > 0 else 'worse'} than with the {other}" if gain else f"as with the {other}"
    return _Condition(
        holds,
        f"The slice with the least gain is {where} ({records} records): {metric} is {change} there; the gate bears a loss of {most:g}"
        f"{'' if holds else ', so this fails'}.",
        "keep" if other == "champion" else "reject",
    )
