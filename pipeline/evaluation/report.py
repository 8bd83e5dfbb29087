"""The reports that people read: one page for a customer's evaluation and one for a fleet's run.

In: what the evaluation's files hold (prefix.json, metrics.json, decision.json, generations). Out: HTML in one file each, which
opens from disk and loads nothing. Knows nothing of how scores are made.
"""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.evaluation.markdown import customer_markdown, fleet_markdown
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.page import (
    compared_cell,
    digits,
    facts,
    gain_cell,
    long_text,
    loss_curve,
    page,
    scale,
    score_axis,
    score_cell,
    score_curve,
    score_plot,
    score_rows,
    signed,
    table,
    text,
    tiles,
)
from pipeline.evaluation.rows import COLUMNS, Row, gain_of, number_of, result_of, signatures, top_of, version_of, why_failed
from pipeline.evaluation.scores import sentence_chrf
from pipeline.files import write_json, write_text
from pipeline.keys import CustomerKey

# Wins and losses shown, of each at most.
_SAMPLES = 8

_BADGES = {"promote": "good", "keep": "keep", "reject": "bad"}
_KEY = {
    "base": '<span><i class="base"></i>base without prefix</span>',
    "prompt": '<span><i class="prompt"></i>base told in words</span>',
    "champion": '<span><i class="champion"></i>champion</span>',
    "prefix": "<span><i></i>with the prefix</span>",
}


def _score_key(systems: Iterable[str]) -> str:
    return f'<div class="key">{"".join(_KEY[name] for name in systems)}<span>bars: 95 % bootstrap interval</span></div>'


def write_reports(
    folder: Path,
    prefix: Mapping[str, Any],
    metrics: Mapping[str, Any],
    decision: Mapping[str, Any],
    generations: Sequence[Mapping[str, Any]],
    sweep: Mapping[str, Any] | None = None,
) -> None:
    """Write report.html and report.md of one evaluation into `folder`; for the arguments see `customer_report`.

    Raises:
        StorageError: they cannot be written.
    """
    write_text(folder / "report.html", customer_report(prefix, metrics, decision, generations, sweep))
    write_text(folder / "report.md", customer_markdown(prefix, metrics, decision, sweep))


def customer_report(
    prefix: Mapping[str, Any],
    metrics: Mapping[str, Any],
    decision: Mapping[str, Any],
    generations: Sequence[Mapping[str, Any]],
    sweep: Mapping[str, Any] | None = None,
) -> str:
    """The page of one evaluation, as HTML.

    Args:
        prefix: content of prefix.json.
        metrics: content of metrics.json.
        decision: content of decision.json.
        generations: the lines of generations.jsonl.
        sweep: content of the newest sweep.json over prefix lengths, if there is one.
    """
    key = str(CustomerKey(metrics["customer"], metrics["task"]))
    counts = prefix["lineage"]["counts"]
    gate_metric = decision["gate"]["metric"]
    of_gate = {system: scores[gate_metric] for system, scores in metrics["scores"].items()}
    places = digits(METRICS[gate_metric].top or max(score["high"] for score in of_gate.values()))
    shown = [
        (f"{gate_metric} with the prefix", f"{of_gate['prefix']['score']:.{places}f}"),
        (f"{gate_metric} of the base", f"{of_gate['base']['score']:.{places}f}"),
        ("gain over the base", signed(metrics["comparisons"]["base"][gate_metric]["gain"])),
    ]
    if "champion" in of_gate:
        shown.append(("gain over the champion", signed(metrics["comparisons"]["champion"][gate_metric]["gain"])))
    shown += [
        ("test records", f"{metrics['records']:,}"),
        ("rows used", f"{counts['used']:,}"),
        ("rows quarantined", f"{counts['quarantined']:,}"),
    ]
    body = [
        "<header>",
        '<p class="eyebrow">PrefixFleet evaluation</p>',
        f'<div class="title"><h1>{text(key)}</h1>'
        f'<span class="badge {_BADGES.get(decision["decision"], "")}">{text(decision["decision"])}</span></div>',
        f'<ul class="lead">{"".join(f"<li>{text(reason)}</li>" for reason in decision["reasons"])}</ul>',
        tiles(shown),
        "</header>",
        _scores(metrics),
        _gains(metrics),
        _slices(metrics, gate_metric),
        _training(prefix["training"]),
        "" if sweep is None else _lengths(sweep, prefix),
        _samples(generations, list(metrics["scores"])),
        _contamination(metrics),
        '<div class="two">',
        f"<section><h2>Data</h2>{facts(counts)}</section>",
        f"<section><h2>Lineage</h2>{facts(_lineage(prefix, metrics))}</section>",
        "</div>",
        _settings(prefix, metrics, decision),
        "<footer>All outputs are in generations.jsonl beside this page, all figures in metrics.json and decision.json, and as text in "
        "report.md.</footer>",
    ]
    return page(f"{key}: {decision['decision']} - PrefixFleet", "\n".join(body))


def _scores(metrics: Mapping[str, Any]) -> str:
    systems = metrics["scores"]
    names = list(systems["prefix"])
    in_points = [name for name in names if METRICS[name].top == 100]
    top = scale(100, [systems[system][name]["high"] for system in systems for name in in_points])
    rows = []
    for name in sorted(names, key=lambda name: name not in in_points):
        own_top = top if name in in_points else scale(None, (of[name]["high"] for of in systems.values()))
        places = digits(own_top)
        arrow = "" if metrics["better"][name] == "higher" else ' <span class="soft small">lower is better</span>'
        cells = "".join(score_cell(systems[system][name], system, places) for system in systems)
        rows.append(
            f'<tr><th>{text(name)}{arrow}</th>{cells}<td class="wide" style="width:38%">{_plot(systems, name, own_top)}</td></tr>'
        )
        if in_points and name == [n for n in names if n in in_points][-1]:
            rows.append(f'<tr class="scale"><td colspan="{1 + len(systems)}"></td><td class="wide">{score_axis(top)}</td></tr>')
    notes = "".join(f'<p class="note small">{text(note)}</p>' for note in metrics["notes"].values())
    what = facts({name: of["what"] for name, of in metrics["systems"].items()})
    remarks = "".join(f'<p class="soft small">{text(remark)}</p>' for remark in metrics["remarks"])
    shown = table(["metric", *(f"#{system}" for system in systems), ""], rows, "scores")
    units = "in points of 100" if len(in_points) == len(names) else "in points of 100; those below the scale in their own units"
    if not in_points:
        units = "each in its own unit"
    return (
        f"<section><h2>Scores, {units}</h2>{notes}{shown}{_score_key(systems)}"
        f'<div class="more"><h3>What is compared</h3>{what}{remarks}</div></section>'
    )


def _plot(systems: Mapping[str, Any], name: str, top: float) -> str:
    others = {system: systems[system][name] for system in ("prompt", "champion") if system in systems}
    return score_plot(systems["base"][name], systems["prefix"][name], top, others)


def _gains(metrics: Mapping[str, Any]) -> str:
    """The table of paired comparisons."""
    compared = metrics["comparisons"]
    rows = [
        f"<tr><th>{text(name)}</th>"
        + "".join(compared_cell(own.get(name), f"over the {other}") for other, own in compared.items())
        + "</tr>"
        for name in metrics["scores"]["prefix"]
    ]
    shown = table(["metric", *(f"#over the {other}" for other in compared)], rows, "scores")
    return (
        f"<section><h2>Gains of the prefix</h2>{shown}"
        '<p class="soft small">Positive is better. 95 % interval and p-value of a paired bootstrap over the test records; a gain whose interval '
        "holds 0 is grey.</p></section>"
    )


def _slices(metrics: Mapping[str, Any], name: str) -> str:
    """The gate's metric by slice, in a table for each."""
    parts = []
    for title, values in metrics["slices"].items():
        if any(name not in part["scores"]["prefix"] for part in values.values()):
            continue
        highest = [of[name]["high"] for part in values.values() for of in part["scores"].values()]
        top = scale(METRICS[name].top, highest)
        systems = list(metrics["scores"])
        rows = [
            f'<tr><th>{text(value)}</th><td class="number" data-of="records">{part["records"]:,}</td>'
            + "".join(score_cell(part["scores"][system][name], system, digits(top)) for system in systems)
            + "".join(
                compared_cell(own[name], f"over the {other}") for other, own in part["comparisons"].items() if other != "prompt"
            )
            + f'<td class="wide" style="width:26%">{_plot(part["scores"], name, top)}</td></tr>'
            for value, part in values.items()
        ]
        others = [f"#over the {other}" for other in metrics["comparisons"] if other != "prompt"]
        head = [title.replace("_", " "), "#records", *(f"#{system}" for system in systems), *others, ""]
        parts.append(f"<h3>{text(title.replace('_', ' '))}</h3>{table(head, rows, 'scores')}")
    if not parts:
        return ""
    return f"<section><h2>{text(name)} by slice</h2>{''.join(parts)}{_score_key(metrics['scores'])}</section>"


def _contamination(metrics: Mapping[str, Any]) -> str:
    found = metrics["contamination"]
    repeated, overlapping = found["inputs_in_train"], found["references_overlapping"]
    sentences = (
        f"{repeated:,} of {metrics['records']:,} test inputs stand in the training split too. {overlapping:,} of the "
        f"{found['references_judged']:,} test records with a reference of {found['words']} words or more share {found['words']} words in a row with "
        "it."
    )
    rows = (
        f"<tr><td>{text(example['kind'])}</td><td>{long_text(example['input'])}</td><td>{long_text(example['shared'])}</td></tr>"
        for example in found["examples"]
    )
    shown = table(["what", "test input", "shared with train"], rows) if found["examples"] else ""
    style = "note" if repeated else "soft"
    return f'<section><h2>Does the test split repeat the training split?</h2><p class="{style}">{sentences}</p>{shown}</section>'


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


def _lengths(sweep: Mapping[str, Any], prefix: Mapping[str, Any]) -> str:
    """The curve over prefix lengths."""
    curve = score_curve(sweep["curves"]["length"], sweep["base_dev"], "prefix length", f"{sweep['metric']} on dev")
    said = "".join(f"<li>{text(sentence)}</li>" for sentence in sweep["said"])
    same = sweep["train_fingerprint"] == prefix["lineage"]["data_fingerprint"]
    made = f"From the sweep of {sweep['made'][:10]}, {'on the same training rows' if same else 'on other training rows than this prefix'}."
    return (
        f'<section><h2>Prefix length</h2><div class="two middle"><div>{curve}<div class="key"><span><i></i>the best</span>'
        "<span>bars: 95 % bootstrap interval</span><span>dashed: base without prefix</span></div></div>"
        f'<div><ul class="lead small">{said}</ul><p class="soft small">{text(made)}</p></div></div></section>'
    )


def _samples(generations: Sequence[Mapping[str, Any]], systems: Sequence[str]) -> str:
    references = [record["references"] for record in generations]
    chrf = sentence_chrf({system: [record[system] for record in generations] for system in systems}, references)
    # What is in use is what a change is measured by.
    other = "champion" if "champion" in systems else "base"
    gains = [after - before for before, after in zip(chrf[other], chrf["prefix"], strict=True)]
    order = sorted(range(len(gains)), key=lambda i: gains[i])
    wins = [i for i in reversed(order) if gains[i] > 0]
    losses = [i for i in order if gains[i] < 0]
    summary = (
        f"By sacrebleu's sentence chrF of each output, compared with the {other}: {len(wins):,} of {len(gains):,} are better with the prefix, "
        f"{len(losses):,} worse, {len(gains) - len(wins) - len(losses):,} equal."
    )
    parts = [f'<section><h2>Samples</h2><p class="soft">{summary}</p>']
    for title, chosen, none in (
        ("Largest wins", wins, "No output is better."),
        ("Largest losses", losses, "No output is worse."),
    ):
        parts.append(f"<h3>{title}</h3>")
        parts += [_sample(generations[i], {system: chrf[system][i] for system in systems}) for i in chosen[:_SAMPLES]] or [
            f'<p class="soft">{none}</p>'
        ]
    return "".join(parts) + "</section>"


def _sample(record: Mapping[str, Any], chrf: Mapping[str, float]) -> str:
    references = record["references"]
    more = f" (first of {len(references)})" if len(references) > 1 else ""
    answers = "".join(
        f"<div{' class=ours' if system == 'prefix' else ''}><h4>{system}, chrF {own:.1f}</h4>{long_text(record[system])}</div>"
        for system, own in chrf.items()
    )
    return (
        f'<div class="sample">{long_text(record["input"], "input soft")}<div class="answers">'
        f"<div><h4>reference{more}</h4>{long_text(references[0])}</div>{answers}</div></div>"
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
        f"<h3>Metric signatures</h3>{facts(metrics['signatures'])}"
        f"<h3>Seconds for each metric, all systems and intervals</h3>{facts(metrics['metric_seconds'])}</section>"
    )


def fleet_report(rows: Sequence[Row], path: Path, fleet_file: str | None = None) -> None:
    """Write the page of a fleet's run to `path`, and the same as JSON and Markdown beside it; its title is the file's stem.

    Args:
        rows: one mapping a customer: `key`, `status` (`failed` or another word) and, as far as known, `rows_used`, `quarantined`,
            `metric`, `signature`, `base_score`, `champion_score`, `score` (`{score, low, high}`), `decision`, `reasons`, `version`, `alias`,
            `seconds`, `error` and `report`, the path of the customer's own page, linked relative to `path`. Whatever is None or absent is
            left blank.
        path: the HTML file, replaced as a whole.
        fleet_file: where the fleet file is, for the JSON: of two of the same name it says whose the page is.

    Raises:
        StorageError: it cannot be written.
    """
    failed = [row for row in rows if row.get("status") == "failed"]
    scored = [(gain, row) for row in rows if (gain := gain_of(row)) is not None]
    summary = [
        ("customers", f"{len(rows):,}"),
        *((verdict, f"{sum(row.get('decision') == verdict for row in rows):,}") for verdict in ("promote", "keep", "reject")),
        ("failed", f"{len(failed):,}"),
        ("median gain over the base", signed(statistics.median(gain for gain, _ in scored)) if scored else "none"),
    ]
    body = [
        "<header>",
        '<p class="eyebrow">PrefixFleet fleet report</p>',
        f'<div class="title"><h1>{text(path.stem)}</h1><span class="badge {"bad" if failed else "good"}">'
        f"{f'{len(failed)} failed' if failed else 'all customers finished'}</span></div>",
        tiles(summary),
        "</header>",
        _failures(failed, path),
        _overview(sorted(scored, key=lambda of: of[0], reverse=True), path),
        _customers(rows, path),
        _signatures(rows),
        "<footer>Scores are of the metric that the customer's gate uses, with its 95 % interval. The same as JSON and Markdown: "
        f"{text(path.stem)}.json, {text(path.stem)}.md.</footer>",
    ]
    write_text(path, page(f"{path.stem} - PrefixFleet", "\n".join(body)))
    write_text(path.with_suffix(".md"), fleet_markdown(path.stem, rows, summary))
    # Last: whoever takes a customer off the pages asks this file who is on them, so it must not be ahead of the others.
    plain = [{name: str(value) if isinstance(value, Path) else value for name, value in row.items()} for row in rows]
    write_json(path.with_suffix(".json"), {"format": 1, "fleet": path.stem, "fleet_file": fleet_file, "customers": plain})


def _signatures(rows: Iterable[Row]) -> str:
    found = signatures(rows)
    return f"<section><h2>Metric signatures</h2>{facts(found)}</section>" if found else ""


def _link(row: Row, path: Path) -> str:
    if row.get("report") is None:
        return text(row["key"])
    # Both made absolute first: a report may be given relative to the working folder, not to the page.
    target = os.path.relpath(Path(row["report"]).absolute(), path.absolute().parent)
    return f'<a href="{text(quote(Path(target).as_posix()))}">{text(row["key"])}</a>'


def _failures(failed: Sequence[Row], path: Path) -> str:
    if not failed:
        return ""
    rows = (f"<tr><th>{_link(row, path)}</th><td>{text(why_failed(row))}</td></tr>" for row in failed)
    return f"<section><h2>Failed</h2>{table(['customer', 'why'], rows)}</section>"


def _overview(scored: Sequence[tuple[float, Row]], path: Path) -> str:
    """One dot a customer, a plot for each metric that gates ask for."""
    parts = []
    for metric in sorted({str(row.get("metric")) for _, row in scored}):
        of = [(gain, row) for gain, row in scored if str(row.get("metric")) == metric]
        highest = [value for _, row in of for value in (row["base_score"], row["score"].get("high", row["score"]["score"]))]
        drawn = score_rows(
            top_of(of[0][1]),
            highest,
            lambda top, of=of: (  # type: ignore[misc]  # bound now
                (
                    _link(row, path),
                    score_plot({"score": row["base_score"]}, row["score"], top, _champion(row)),
                    f'<span class="{"good" if gain > 0 else "bad"}">{signed(gain)}</span>',
                )
                for gain, row in of
            ),
        )
        shown = ["base", *(["champion"] if any(_champion(row) for _, row in of) else []), "prefix"]
        parts.append(f"<section><h2>From base to prefix, by gain ({text(metric)})</h2>{drawn}{_score_key(shown)}</section>")
    return "".join(parts)


def _champion(row: Row) -> dict[str, Mapping[str, float]]:
    score = row.get("champion_score")
    return {} if score is None else {"champion": {"score": score}}


def _customers(rows: Sequence[Row], path: Path) -> str:
    return f"<section><h2>Customers</h2>{table(COLUMNS, (_customer(row, path) for row in rows), 'scores')}</section>"


def _customer(row: Row, path: Path) -> str:
    def number(name: str, form: str) -> str:
        return f'<td class="number" data-of="{name.replace("_", " ")}">{number_of(row, name, form)}</td>'

    result, base = result_of(row), row.get("base_score")
    colour = {"promote": "good", "reject": "bad", "failed": "bad", "keep": "soft"}.get(result, "soft")
    places = digits(top_of(row))
    reasons = text(" ".join(row.get("reasons") or []))
    cells = [
        f"<th>{_link(row, path)}</th>",
        f'<td class="{colour}" title="{reasons}" data-of="result">{text(result)}</td>',
        number("rows_used", ","),
        number("quarantined", ","),
        f'<td data-of="metric">{text(row.get("metric") or "")}</td>',
        score_cell(None if base is None else {"score": base}, "base", places),
        score_cell(_champion(row).get("champion"), "champion", places),
        score_cell(row.get("score"), "prefix", places),
        gain_cell(gain_of(row)),
        f'<td data-of="version">{text(version_of(row))}</td>',
        number("seconds", ",.0f"),
    ]
    return f"<tr>{''.join(cells)}</tr>"
