"""What a fleet's row says, in the words that the page and the Markdown share. In: rows as `pipeline.evaluation.report.fleet_report` takes them."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.evaluation.metrics import METRICS

Row = Mapping[str, Any]

# Of the table of customers; `#` marks columns of numbers.
COLUMNS = (
    "customer", "result", "#rows used", "#quarantined", "metric", "#base", "#champion", "#prefix", "#gain", "version", "#seconds",
)  # fmt: skip


def result_of(row: Row) -> str:
    """`failed`, the gate's decision, or what else became of the customer."""
    return "failed" if row.get("status") == "failed" else str(row.get("decision") or row.get("status") or "")


def why_failed(row: Row) -> str:
    """The reason of a failure."""
    return str(row.get("error") or "no reason was given")


def version_of(row: Row) -> str:
    """`v3 champion`; empty without a version."""
    return "" if row.get("version") is None else " ".join(filter(None, (f"v{row['version']}", row.get("alias"))))


def number_of(row: Row, name: str, form: str) -> str:
    """A number of the row as text; empty if it is not known."""
    return "" if row.get(name) is None else format(row[name], form)


def top_of(row: Row) -> float | None:
    """The end of the scale of the row's metric; points of 100 where it is not known."""
    known = METRICS.get(str(row.get("metric")))
    return 100 if known is None else known.top


def gain_of(row: Row) -> float | None:
    """How much better the prefix is than the base, in the metric's unit, positive where it is better; None without scores."""
    if row.get("base_score") is None or not row.get("score"):
        return None
    known = METRICS.get(str(row.get("metric")))
    gain = float(row["score"]["score"] - row["base_score"])
    return -gain if known is not None and known.better == "lower" else gain


def signatures(rows: Iterable[Row]) -> dict[str, str]:
    """How scores were computed: metric -> its signature, or several where customers have other settings or references."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("signature"):
            found.setdefault(str(row["metric"]), {})[str(row["signature"])] = None
    return {metric: "; ".join(own) for metric, own in found.items()}
