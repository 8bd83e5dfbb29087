"""The table of the methods: parameters trained, share of the base, seconds, memory, bytes, scores with intervals.

In: the methods' results and the test split. Out: compare.json, compare.md and compare.html, the same figures in each.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data import Record
from pipeline.evaluation.markdown import escaped, gain_text, markdown_table, score_text
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.page import (
    compared_cell,
    digits,
    facts,
    page,
    score_cell,
    score_plot,
    score_rows,
    table,
    text,
)
from pipeline.evaluation.scores import score_systems
from pipeline.files import write_json, write_text
from pipeline.training.job import JobCustomer

FORMAT = 1
OURS = "prefix"


def compare(
    customer: JobCustomer, records: Sequence[Record], results: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """Score all methods on the same resamples, the prefix compared with each, and write the three files.

    Args:
        customer: whose data and settings they are.
        records: the test split.
        results: of `pipeline.compare.method.run_method`, or with `error` instead of figures.
        folder: where the files go.

    Returns:
        the content of compare.json.

    Raises:
        EvaluationError: nothing can be scored.
    """
    settings = customer.evaluation
    metrics = [name for name in settings.metrics if name != "perplexity"]
    done = [result for result in results if "error" not in result]
    scores = score_systems(
        {result["method"]: result["outputs"] for result in done},
        [record.references for record in records],
        metrics,
        ours=OURS if any(result["method"] == OURS for result in done) else None,
        inputs=[record.input for record in records],
        preset=settings.preset,
        resamples=settings.bootstrap_resamples,
    )
    rows = []
    for result in results:
        name = result["method"]
        row = {key: value for key, value in result.items() if key not in ("outputs", "format")}
        if name in scores.systems:
            row["scores"] = {metric: vars(score) for metric, score in scores.systems[name].items()}
        if name in scores.comparisons:
            row["prefix_gain"] = {metric: vars(gain) for metric, gain in scores.comparisons[name].items()}
        rows.append(row)
    content = {
        "format": FORMAT,
        "customer": customer.customer,
        "task": customer.task,
        "records": len(records),
        "budget": {
            "max_steps": customer.training.max_steps,
            "batch_size": customer.training.batch_size * customer.training.gradient_accumulation_steps,
            "early_stopping": customer.training.early_stopping,
            "dtype": "float32",
        },
        "metrics": metrics,
        "signatures": scores.signatures,
        "notes": {
            **scores.notes,
            **(
                {"perplexity": "Perplexity is left out: methods are compared by what they write."}
                if len(metrics) < len(settings.metrics)
                else {}
            ),
        },
        "methods": rows,
    }
    write_json(folder / "compare.json", content)
    write_text(folder / "compare.md", comparison_markdown(content))
    write_text(folder / "compare.html", comparison_page(content))
    return content


def comparison_markdown(content: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    metrics = content["metrics"]
    head = ["method", "#trained", "#of the base", "#seconds", "#peak memory", "#stored", *(f"#{m}" for m in metrics)]
    rows = [
        [cell for cell, _ in _costs(row)] + [score_text(row.get("scores", {}).get(m), m) for m in metrics]
        for row in content["methods"]
    ]
    gains = [row for row in content["methods"] if "prefix_gain" in row]
    parts = [
        f"# {escaped(content['customer'])}/{escaped(content['task'])}: the same data and budget for each method\n",
        f"{content['records']:,} test records; {_budget(content)}. 95 % bootstrap intervals.\n",
        markdown_table(head, rows),
        "".join(f"- {row['method']}: {escaped(row['what'])}{_tried(row)}\n" for row in content["methods"]),
    ]
    if gains:
        parts += [
            "## How much better the prefix is (paired bootstrap)\n",
            markdown_table(
                ["than", *(f"#{m}" for m in metrics)],
                ([row["method"], *(gain_text(row["prefix_gain"][m]) for m in metrics)] for row in gains),
            ),
        ]
    if content["notes"]:
        parts += ["## Notes\n", "".join(f"- {escaped(note)}\n" for note in content["notes"].values())]
    parts += ["## Signatures\n", "".join(f"- {name}: `{signature}`\n" for name, signature in content["signatures"].items())]
    return "\n".join(parts)


def _budget(content: Mapping[str, Any]) -> str:
    budget = content["budget"]
    patience = budget["early_stopping"]
    stops = "no early stopping" if patience is None else f"early stopping after {patience} dev losses"
    return f"at most {budget['max_steps']:,} steps of {budget['batch_size']} rows each, {stops}, {budget['dtype']}"


def _tried(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"; not possible: {escaped(row['error'])}"
    if not row.get("tries"):
        return ""
    tried = ", ".join(f"{one['lr']:g}" for one in row["tries"])
    return (
        f"; lr {row['lr']:g} of {tried}; best at step {row['best_step']} of {row['steps']}, dev loss {row['best_dev_loss']:.3f}"
    )


def _costs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and costs of a method as text, each with the column's name."""
    if "error" in row:
        return [
            (row["method"], "method"),
            ("not possible", "trained"),
            *(("", name) for name in ("of the base", "seconds", "peak memory", "stored")),
        ]
    return [
        (row["method"], "method"),
        (f"{row['trained']:,}", "trained"),
        (f"{100 * row['share']:.2f} %", "of the base"),
        (f"{row['seconds']:,.1f}", "seconds"),
        (f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB", "peak memory"),
        (f"{row['bytes'] / 2**10:,.0f} KiB", "stored"),
    ]


def comparison_page(content: Mapping[str, Any]) -> str:
    """The table as a page."""
    metrics = content["metrics"]
    rows = []
    for row in content["methods"]:
        (name, _), *costs = _costs(row)
        cells = "".join(f'<td class="number" data-of="{of}">{text(cell)}</td>' for cell, of in costs)
        scores = "".join(score_cell(row.get("scores", {}).get(m), m, digits(METRICS[m].top)) for m in metrics)
        rows.append(f"<tr><th>{text(name)}</th>{cells}{scores}</tr>")
    head = ["method", "#trained", "#of the base", "#seconds", "#peak memory", "#stored", *(f"#{m}" for m in metrics)]
    gains = [row for row in content["methods"] if "prefix_gain" in row]
    gained = [
        f"<tr><th>{text(row['method'])}</th>" + "".join(compared_cell(row["prefix_gain"][m], m) for m in metrics) + "</tr>"
        for row in gains
    ]
    shown = (
        f"<section><h2>How much better the prefix is</h2>{table(['than', *(f'#{m}' for m in metrics)], gained, 'scores')}</section>"
        if gains
        else ""
    )
    body = [
        '<header><p class="eyebrow">PrefixFleet comparison of methods</p>'
        f'<div class="title"><h1>{text(content["customer"])}/{text(content["task"])}</h1></div>'
        f'<p class="soft">{content["records"]:,} test records; {text(_budget(content))}. 95 % bootstrap intervals.</p></header>',
        f"<section><h2>Methods</h2>{table(head, rows, 'scores')}</section>",
        *(_plot(content, metric) for metric in metrics),
        shown,
        f"<section><h2>What they are</h2>{facts({row['method']: row['what'] + _tried(row) for row in content['methods']})}"
        f"<h3>Metric signatures</h3>{facts(content['signatures'])}"
        + "".join(f'<p class="note small">{text(note)}</p>' for note in content["notes"].values())
        + "</section>",
        "<footer>The same figures are in compare.json and compare.md beside this page.</footer>",
    ]
    return page(f"{content['customer']}/{content['task']}: methods - PrefixFleet", "\n".join(body))


def _plot(content: Mapping[str, Any], metric: str) -> str:
    scored = [row for row in content["methods"] if "scores" in row]
    base = next((row["scores"][metric] for row in scored if row["method"] == "base"), None)
    end = METRICS[metric].top
    drawn = score_rows(
        end,
        [row["scores"][metric]["high"] for row in scored],
        lambda top: (
            (
                text(row["method"]),
                score_plot({"score": (base or row["scores"][metric])["score"]}, row["scores"][metric], top),
                f"{row['scores'][metric]['score']:.{digits(end)}f}",
            )
            for row in scored
            if row["method"] != "base"
        ),
    )
    key = '<div class="key"><span><i class="base"></i>the base</span><span><i></i>the method, with its interval</span></div>'
    return f"<section><h2>{text(metric)}</h2>{drawn}{key}</section>"
