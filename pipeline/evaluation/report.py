"""The reports that people read: one page for a customer's evaluation and one for a fleet's run.

In: what the evaluation's files hold (prefix.json, metrics.json, decision.json, generations). Out: HTML in one file each, which
opens from disk and loads nothing. Knows nothing of how scores are made.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.evaluation.metrics import sentence_chrf
from pipeline.evaluation.page import (
    facts,
    gain_cell,
    long_text,
    loss_curve,
    page,
    score_axis,
    score_cell,
    score_plot,
    signed,
    table,
    text,
    tiles,
    top_of_scale,
)
from pipeline.files import write_text
from pipeline.keys import CustomerKey

# Wins and losses shown, of each at most.
_SAMPLES = 8

_SCORE_KEY = (
    '<div class="key"><span><i class="base"></i>base without prefix</span><span><i></i>with the prefix</span>'
    "<span>bars: 95 % bootstrap interval</span></div>"
)


def customer_report(
    prefix: Mapping[str, Any], metrics: Mapping[str, Any], decision: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]
) -> str:
    """The page of one evaluation, as HTML.

    Args:
        prefix: content of prefix.json.
        metrics: content of metrics.json.
        decision: content of decision.json.
        generations: the lines of generations.jsonl.
    """
    key = str(CustomerKey(metrics["customer"], metrics["task"]))
    counts = prefix["lineage"]["counts"]
    gate_metric = decision["gate"]["metric"]
    base, ours = (metrics["scores"][system][gate_metric] for system in ("base", "prefix"))
    promoted = decision["decision"] == "promote"
    body = [
        "<header>",
        '<p class="eyebrow">PrefixFleet evaluation</p>',
        f'<div class="title"><h1>{text(key)}</h1>'
        f'<span class="badge {"good" if promoted else "bad"}">{text(decision["decision"])}</span></div>',
        f'<ul class="lead">{"".join(f"<li>{text(reason)}</li>" for reason in decision["reasons"])}</ul>',
        tiles(
            [
                (f"{gate_metric} with the prefix", f"{ours['score']:.1f}"),
                (f"{gate_metric} of the base", f"{base['score']:.1f}"),
                ("gain, in points", signed(ours["score"] - base["score"])),
                ("test records", f"{metrics['records']:,}"),
                ("rows used", f"{counts['used']:,}"),
                ("rows quarantined", f"{counts['quarantined']:,}"),
            ]
        ),
        "</header>",
        _scores(metrics),
        _training(prefix["training"]),
        _samples(generations),
        '<div class="two">',
        f"<section><h2>Data</h2>{facts(counts)}</section>",
        f"<section><h2>Lineage</h2>{facts(_lineage(prefix, metrics))}</section>",
        "</div>",
        _settings(prefix, metrics, decision),
        "<footer>All outputs are in generations.jsonl beside this page, all figures in metrics.json and decision.json.</footer>",
    ]
    return page(f"{key}: {decision['decision']} - PrefixFleet", "\n".join(body))


def _scores(metrics: Mapping[str, Any]) -> str:
    base, ours = metrics["scores"]["base"], metrics["scores"]["prefix"]
    top = top_of_scale(scores[name]["high"] for scores in (base, ours) for name in scores)
    rows = [
        f"<tr><th>{text(name)}</th>{score_cell(base[name], 'base')}{score_cell(ours[name], 'prefix')}"
        f"{gain_cell(base[name]['score'], ours[name]['score'])}"
        f'<td class="wide" style="width:45%">{score_plot(base[name], ours[name], top)}</td></tr>'
        for name in ours
    ]
    rows.append(f'<tr class="scale"><td colspan="4"></td><td class="wide">{score_axis(top)}</td></tr>')
    notes = "".join(f'<p class="note small">{text(note)}</p>' for note in metrics["notes"].values())
    shown = table(["metric", "#base", "#prefix", "#gain", ""], rows, "scores")
    return f"<section><h2>Scores, in points of 100</h2>{notes}{shown}{_SCORE_KEY}</section>"


def _training(training: Mapping[str, Any]) -> str:
    curve = loss_curve(training.get("history") or [], training.get("best_step"))
    drawn = (
        f'{curve}<div class="key"><span><i class="line"></i>training loss</span><span><i class="dev"></i>dev loss</span>'
        "<span>dotted: the step that was kept</span></div>"
        if curve
        else '<p class="soft">No losses were recorded.</p>'
    )
    memory = training.get("peak_memory_bytes")
    shown = {name: training.get(name) for name in ("steps", "best_step", "best_dev_loss", "train_loss", "seconds")}
    shown["peak_memory"] = None if memory is None else f"{memory / 2**20:,.0f} MiB"
    return f'<section><h2>Training</h2><div class="two middle"><div>{drawn}</div><div>{facts(shown)}</div></div></section>'


def _samples(generations: Sequence[Mapping[str, Any]]) -> str:
    references = [record["references"] for record in generations]
    chrf = sentence_chrf({system: [record[system] for record in generations] for system in ("base", "prefix")}, references)
    base, ours = chrf["base"], chrf["prefix"]
    gains = [after - before for before, after in zip(base, ours, strict=True)]
    order = sorted(range(len(gains)), key=lambda i: gains[i])
    wins = [i for i in reversed(order) if gains[i] > 0]
    losses = [i for i in order if gains[i] < 0]
    summary = (
        f"By chrF of each output, {len(wins):,} of {len(gains):,} are better with the prefix, {len(losses):,} worse, "
        f"{len(gains) - len(wins) - len(losses):,} equal."
    )
    parts = [f'<section><h2>Samples</h2><p class="soft">{summary}</p>']
    for title, chosen, none in (
        ("Largest wins", wins, "No output is better."),
        ("Largest losses", losses, "No output is worse."),
    ):
        parts.append(f"<h3>{title}</h3>")
        parts += [_sample(generations[i], base[i], ours[i]) for i in chosen[:_SAMPLES]] or [f'<p class="soft">{none}</p>']
    return "".join(parts) + "</section>"


def _sample(record: Mapping[str, Any], base: float, ours: float) -> str:
    references = record["references"]
    more = f" (first of {len(references)})" if len(references) > 1 else ""
    return (
        f'<div class="sample">{long_text(record["input"], "input soft")}<div class="answers">'
        f"<div><h4>reference{more}</h4>{long_text(references[0])}</div>"
        f"<div><h4>base, chrF {base:.1f}</h4>{long_text(record['base'])}</div>"
        f'<div class="ours"><h4>prefix, chrF {ours:.1f}</h4>{long_text(record["prefix"])}</div></div></div>'
    )


def _lineage(prefix: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    base = prefix["base"]
    lineage = {name: value for name, value in prefix["lineage"].items() if name != "counts"}
    return {
        "base": base["id"],
        "base_revision": base["revision"],
        "base_digest": base["digest"],
        "tokenizer_digest": base["tokenizer_digest"],
        **lineage,
        "prefix_digest": prefix["digest"],
        "weights_sha256": prefix["weights_sha256"],
        "evaluation_digest": metrics["digest"],
        "mlflow_run": prefix["run_id"],
    }


def _settings(prefix: Mapping[str, Any], metrics: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    outcome = ("steps", "best_step", "best_dev_loss", "train_loss", "seconds", "history", "peak_memory_bytes")
    groups = {
        "Prompt": {**prefix["prompt"], "chat": prefix["chat"]},
        "Prefix": {name: value for name, value in prefix["prefix"].items() if name != "sites"},
        "Training": {name: value for name, value in prefix["training"].items() if name not in outcome},
        "Evaluation": {**metrics["settings"], "gate": decision["gate"]},
    }
    shown = "".join(f"<div><h3>{title}</h3>{facts(content)}</div>" for title, content in groups.items())
    return (
        f'<section><h2>Settings</h2><div class="two" style="row-gap:18px">{shown}</div>'
        f"<h3>Metric signatures</h3>{facts(metrics['signatures'])}</section>"
    )


def fleet_report(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page of a fleet's run to `path`; its title is the file's stem.

    Args:
        rows: one mapping a customer: `key`, `status` (`failed` or another word) and, as far as known, `rows_used`, `quarantined`,
            `metric`, `base_score` (points), `score` (`{score, low, high}`), `decision`, `reasons`, `version`, `alias`, `seconds`,
            `error` and `report`, the path of the customer's own page, linked relative to `path`. Whatever is None or absent is
            left blank.
        path: the HTML file, replaced as a whole.

    Raises:
        StorageError: it cannot be written.
    """
    failed = [row for row in rows if row.get("status") == "failed"]
    scored = [row for row in rows if row.get("score") and row.get("base_score") is not None]
    gains = [_gain(row) for row in scored]
    summary = [
        ("customers", f"{len(rows):,}"),
        ("promote", f"{sum(row.get('decision') == 'promote' for row in rows):,}"),
        ("reject", f"{sum(row.get('decision') == 'reject' for row in rows):,}"),
        ("failed", f"{len(failed):,}"),
        ("median gain over the base", signed(statistics.median(gains)) if gains else "none"),
    ]
    body = [
        "<header>",
        '<p class="eyebrow">PrefixFleet fleet report</p>',
        f'<div class="title"><h1>{text(path.stem)}</h1><span class="badge {"bad" if failed else "good"}">'
        f"{f'{len(failed)} failed' if failed else 'all customers finished'}</span></div>",
        tiles(summary),
        "</header>",
        _failures(failed, path),
        _overview(sorted(scored, key=_gain, reverse=True), path),
        _customers(rows, path),
        "<footer>Scores are of the metric that the customer's gate uses, in points of 100, with its 95 % interval.</footer>",
    ]
    write_text(path, page(f"{path.stem} - PrefixFleet", "\n".join(body)))


def _gain(row: Mapping[str, Any]) -> float:
    return float(row["score"]["score"] - row["base_score"])


def _link(row: Mapping[str, Any], path: Path) -> str:
    if row.get("report") is None:
        return text(row["key"])
    # Both made absolute first: a report may be given relative to the working folder, not to the page.
    target = os.path.relpath(Path(row["report"]).absolute(), path.absolute().parent)
    return f'<a href="{text(quote(Path(target).as_posix()))}">{text(row["key"])}</a>'


def _failures(failed: Sequence[Mapping[str, Any]], path: Path) -> str:
    if not failed:
        return ""
    rows = (f"<tr><th>{_link(row, path)}</th><td>{text(row.get('error') or 'no reason was given')}</td></tr>" for row in failed)
    return f"<section><h2>Failed</h2>{table(['customer', 'why'], rows)}</section>"


def _overview(scored: Sequence[Mapping[str, Any]], path: Path) -> str:
    if not scored:
        return ""
    top = top_of_scale(value for row in scored for value in (row["base_score"], row["score"].get("high", row["score"]["score"])))
    metrics = sorted({str(row.get("metric")) for row in scored})
    lines = "".join(
        f"<div>{_link(row, path)}</div>{score_plot({'score': row['base_score']}, row['score'], top)}"
        f'<div class="number {"good" if _gain(row) > 0 else "bad"}">{signed(_gain(row))}</div>'
        for row in scored
    )
    return (
        f"<section><h2>From base to prefix, by gain ({text(', '.join(metrics))})</h2>"
        f'<div class="rows">{lines}<div></div>{score_axis(top)}<div></div></div>{_SCORE_KEY}</section>'
    )


def _customers(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    head = ["customer", "result", "#rows used", "#quarantined", "metric", "#base", "#prefix", "#gain", "version", "#seconds"]
    return f"<section><h2>Customers</h2>{table(head, (_customer(row, path) for row in rows), 'scores')}</section>"


def _customer(row: Mapping[str, Any], path: Path) -> str:
    def number(name: str, of: str, pattern: str) -> str:
        return f'<td class="number" data-of="{of}">{"" if row.get(name) is None else format(row[name], pattern)}</td>'

    result = "failed" if row.get("status") == "failed" else row.get("decision") or row.get("status") or ""
    colour = {"promote": "good", "reject": "bad", "failed": "bad"}.get(result, "soft")
    base, score = row.get("base_score"), row.get("score")
    version = "" if row.get("version") is None else " ".join(filter(None, (f"v{row['version']}", row.get("alias"))))
    reasons = text(" ".join(row.get("reasons") or []))
    cells = [
        f"<th>{_link(row, path)}</th>",
        f'<td class="{colour}" title="{reasons}" data-of="result">{text(result)}</td>',
        number("rows_used", "rows used", ","),
        number("quarantined", "quarantined", ","),
        f'<td data-of="metric">{text(row.get("metric") or "")}</td>',
        score_cell(None if base is None else {"score": base}, "base"),
        score_cell(score, "prefix"),
        gain_cell(base, score["score"] if score else None),
        f'<td data-of="version">{text(version)}</td>',
        number("seconds", "seconds", ",.0f"),
    ]
    return f"<tr>{''.join(cells)}</tr>"
