"""The reports as Markdown, for terminals, tickets and reviews: the figures of the pages without their drawings.

In: what the pages are made of. Out: text. Whatever customers or models wrote is escaped, so that it cannot become a link or a heading.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.rows import COLUMNS, Row, gain_of, number_of, result_of, signatures, version_of, why_failed
from pipeline.keys import CustomerKey


def escaped(value: object) -> str:
    """`value` in one line, without effect in Markdown, in a table or in HTML."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(line, quote=False))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown. A title that begins with `#` is of a column of numbers."""
    titles = [title.removeprefix("#") for title in head]
    rule = ["---:" if title.startswith("#") else "---" for title in head]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows)) + "\n"


def score_text(score: Mapping[str, float] | None, metric: str) -> str:
    """`26.9 (22.6 to 31.9)`."""
    if score is None:
        return ""
    in_points = metric not in METRICS or METRICS[metric].top == 100
    places = 2 if in_points or score["score"] >= 20 else 4
    interval = f" ({score['low']:.{places}f} to {score['high']:.{places}f})" if "low" in score else ""
    return f"{score['score']:.{places}f}{interval}"


def gain_text(compared: Mapping[str, float | None]) -> str:
    """`+1.20 (-0.30 to +2.10), p 0.041`; `no p` where there were too few records for one."""
    p = compared["p"]
    tested = "no p" if p is None else f"p {p:.3f}" if p >= 0.001 else "p below 0.001"
    return f"{compared['gain']:+.3g} ({compared['low']:+.3g} to {compared['high']:+.3g}), {tested}"


def customer_markdown(
    prefix: Mapping[str, Any], metrics: Mapping[str, Any], decision: Mapping[str, Any], sweep: Mapping[str, Any] | None = None
) -> str:
    """The report of one evaluation.

    Args:
        prefix: content of prefix.json.
        metrics: content of metrics.json.
        decision: content of decision.json.
        sweep: content of the newest sweep.json over prefix lengths, if there is one.
    """
    key = str(CustomerKey(metrics["customer"], metrics["task"]))
    systems, names = list(metrics["scores"]), list(metrics["scores"]["prefix"])
    parts = [
        f"# {escaped(key)}: {decision['decision']}\n",
        "".join(f"- {escaped(reason)}\n" for reason in decision["reasons"]),
        f"## Scores ({metrics['records']:,} test records, 95 % bootstrap intervals)\n",
        markdown_table(
            ["metric", *(f"#{system}" for system in systems)],
            (
                [_named(name, metrics), *(score_text(metrics["scores"][system][name], name) for system in systems)]
                for name in names
            ),
        ),
        "".join(f"- {name}: {escaped(of['what'])}\n" for name, of in metrics["systems"].items()),
        "## Gains of the prefix (positive is better, paired bootstrap)\n",
        markdown_table(
            ["metric", *(f"#over the {other}" for other in metrics["comparisons"])],
            ([escaped(name), *(gain_text(own[name]) for own in metrics["comparisons"].values())] for name in names),
        ),
    ]
    gate = decision["gate"]["metric"]
    for title, values in metrics["slices"].items():
        if all(gate in part["scores"]["prefix"] for part in values.values()):
            rows = (
                [escaped(value), f"{part['records']:,}", *(score_text(part["scores"][system][gate], gate) for system in systems)]
                for value, part in values.items()
            )
            parts += [
                f"## {escaped(gate)} by {escaped(title.replace('_', ' '))}\n",
                markdown_table([escaped(title), "#records", *(f"#{system}" for system in systems)], rows),
            ]
    if sweep is not None:
        points = ([f"{point['value']}", score_text(point, sweep["metric"])] for point in sweep["curves"]["length"])
        parts += [
            f"## Prefix length (sweep of {sweep['made'][:10]}, dev split)\n",
            markdown_table(["#length", f"#{escaped(sweep['metric'])}"], points),
            "".join(f"- {escaped(sentence)}\n" for sentence in sweep["said"]),
        ]
    found = metrics["contamination"]
    training = prefix["training"]
    parts += [
        "## Notes\n",
        "".join(f"- {escaped(note)}\n" for note in [*metrics["notes"].values(), *metrics["remarks"]])
        + f"- {found['inputs_in_train']:,} of {metrics['records']:,} test inputs stand in the training split too; "
        f"{found['references_overlapping']:,} of {found['references_judged']:,} references of {found['words']} words or more share as many in a row "
        "with it.\n"
        f"- {_made(training)}\n",
        "## Signatures\n",
        "".join(f"- {name}: `{signature.replace('`', ' ')}`\n" for name, signature in metrics["signatures"].items()),
    ]
    return "\n".join(parts)


def _made(training: Mapping[str, Any]) -> str:
    if "ensemble_of" in training:
        return f"An ensemble of {escaped(training['ensemble_of'])}: the mean of their {escaped(training['average'].replace('_', '-'))}."
    return f"Trained for {training.get('steps')} steps, best at step {training.get('best_step')}, {training.get('seconds')} s."


def _named(name: str, metrics: Mapping[str, Any]) -> str:
    return escaped(name) + ("" if metrics["better"][name] == "higher" else " (lower is better)")


def fleet_markdown(fleet: str, rows: Sequence[Row], summary: Iterable[tuple[str, str]]) -> str:
    """The report of a fleet's run; `rows` as in `pipeline.evaluation.report.fleet_report`."""
    return "\n".join(
        [
            f"# {escaped(fleet)}\n",
            ", ".join(f"{name}: {escaped(figure)}" for name, figure in summary) + "\n",
            markdown_table(COLUMNS, (_fleet_row(row) for row in rows)),
            "".join(f"- {escaped(metric)}: `{signature.replace('`', ' ')}`\n" for metric, signature in signatures(rows).items()),
        ]
    )


def _fleet_row(row: Row) -> list[str]:
    metric, gain = str(row.get("metric") or ""), gain_of(row)
    named = {name: None if row.get(f"{name}_score") is None else {"score": row[f"{name}_score"]} for name in ("base", "champion")}
    result = result_of(row)
    return [
        escaped(row["key"]),
        escaped(f"failed: {why_failed(row)}" if result == "failed" else result),
        number_of(row, "rows_used", ","),
        number_of(row, "quarantined", ","),
        escaped(metric),
        score_text(named["base"], metric),
        score_text(named["champion"], metric),
        score_text(row.get("score"), metric),
        "" if gain is None else f"{gain:+.3g}",
        escaped(version_of(row)),
        number_of(row, "seconds", ",.0f"),
    ]
