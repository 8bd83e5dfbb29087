"""What a sweep found, for people: JSON, Markdown, a page that opens from disk, and each curve as a picture of its own.

In: the content of sweep.json. Out: the files. The same figures in each. Knows nothing of how they came about.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.markdown import escaped, gain_text, markdown_table, score_text
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.page import (
    compared_cell,
    digits,
    facts,
    page,
    score_cell,
    score_curve,
    score_plot,
    score_rows,
    table,
    text,
    tiles,
)
from pipeline.files import write_json, write_text
from pipeline.keys import CustomerKey

_CALLED = {
    "length": "prefix length",
    "lr": "learning rate",
    "batch_size": "batch size",
    "steps": "steps",
    "init": "start",
    "seed": "seed",
}
_TEST = {"base": "base", "best": "best setting", "current": "what the fleet file says"}


def write_sweep(content: Mapping[str, Any], folder: Path) -> None:
    """Write `sweep.md`, `sweep.html`, `sweep-<axis>.svg` for every number that was varied, and last `sweep.json`.

    Raises:
        StorageError: they cannot be written.
    """
    for axis, points in content["curves"].items():
        if curve := _curve(content, axis, points, standalone=True):
            write_text(folder / f"sweep-{axis}.svg", curve)
    write_text(folder / "sweep.md", sweep_markdown(content))
    write_text(folder / "sweep.html", sweep_page(content))
    write_json(folder / "sweep.json", {**content, "said": sentences(content)})


def sentences(content: Mapping[str, Any]) -> list[str]:
    """What came out, in words."""
    metric, test = content["metric"], content["test"]
    best = next(group for group in content["settings"] if group["best"])
    seeds = len(best["variants"])
    of_test, base = (test["systems"][name][metric] for name in ("best", "base"))
    gain = test["comparisons"]["base"][metric]
    said = [
        f"Best on dev: {_setting(content, best['settings'])}, {metric} {score_text(best, metric)}"
        + (f" (mean of {seeds} seeds, which range from {_range(best, metric)})" if seeds > 1 else "")
        + f". On the test split, which had no part in the choice, it has {metric} {score_text(of_test, metric)}; the base has "
        f"{score_text(base, metric)}: a gain of {gain_text(gain)}."
    ]
    others = [test["systems"][name][metric]["score"] for name in test["systems"] if name.startswith("best")]
    if len(others) > 1:
        least, most = (score_text({"score": score}, metric) for score in (min(others), max(others)))
        said.append(f"Its {len(others)} seeds have from {least} to {most} on test; the first stands for it everywhere else.")
    if content["best"]["is_current"]:
        said.append("That is what the fleet file says already.")
    elif "current" in test["systems"]:
        against = test["comparisons"]["current"][metric]
        now = test["systems"]["current"][metric]
        said.append(
            f"What the fleet file says now has {score_text(now, metric)} on test; the best gains {gain_text(against)} over it."
        )
    if equal := content["best"]["shortest_equal"]:
        tested = f"p {equal['p']:.3g}" if equal["p"] is not None else "too few records for a p-value"
        said.append(
            f"Shorter, and on {content['records']['dev']:,} dev records not to be told from it: {_setting(content, equal['settings'])}, "
            f"{metric} {score_text({'score': equal['score']}, metric)} (the best gains {equal['gain']:+.3g}, {tested})."
        )
    return said


def plain_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of settings as text; a title that begins with `#` is of a column of numbers."""
    metric = content["metric"]
    return _head(content), [[cell if isinstance(cell, str) else _cell(cell, metric) for cell in row] for row in _rows(content)]


def sweep_markdown(content: Mapping[str, Any]) -> str:
    """The sweep as Markdown."""
    key, metric = _key(content), content["metric"]
    test = content["test"]["systems"]
    metrics = list(test["best"])
    curves = [axis for axis, points in content["curves"].items() if _curve(content, axis, points)]
    head, rows = plain_table(content)
    parts = [
        f"# {escaped(key)}: {_asked(content)}\n",
        "".join(f"- {sentence}\n" for sentence in sentences(content)),
        f"```yaml\n{content['best']['fleet_file']}```\n",
        f"## Settings ({escaped(metric)} on {content['records']['dev']:,} dev records, 95 % bootstrap intervals)\n",
        markdown_table(head, rows),
        "".join(f"- {escaped(failure)}\n" for failure in failures(content)),
        "".join(f"![{escaped(metric)} by {_CALLED[axis]}](sweep-{axis}.svg)\n" for axis in curves),
        f"## On the test split ({content['records']['test']:,} records)\n",
        markdown_table(
            ["system", *(f"#{m}" for m in metrics)],
            ([_TEST.get(name, name), *(score_text(scores[m], m) for m in metrics)] for name, scores in test.items()),
        ),
        "## Notes\n",
        "".join(f"- {escaped(note)}\n" for note in _notes(content)),
        "## Signatures\n",
        "".join(f"- {name}: `{signature}`\n" for name, signature in content["signatures"].items()),
    ]
    return "\n".join(part for part in parts if part)


def sweep_page(content: Mapping[str, Any]) -> str:
    """The sweep as a page."""
    key, metric = _key(content), content["metric"]
    best = next(group for group in content["settings"] if group["best"])
    test = content["test"]["systems"]
    places = digits(METRICS[metric].top or test["best"][metric]["high"])
    first, *rest = sentences(content)
    shown = [
        (f"best {_CALLED[axis]}", _value(best["settings"][axis])) for axis in content["axes"] if axis in best["settings"]
    ] + [
        (f"{metric} on test", f"{test['best'][metric]['score']:.{places}f}"),
        (f"{metric} of the base", f"{test['base'][metric]['score']:.{places}f}"),
        ("settings tried", f"{len(content['variants']):,}"),
    ]
    curves = "".join(
        f"<section><h2>{text(metric)} by {_CALLED[axis]}</h2>{curve}"
        '<div class="key"><span><i></i>the best</span><span>bars: 95 % bootstrap interval</span><span>dashed: base without prefix</span></div>'
        f'<p class="soft small">On the dev split. {_of_others(content)}</p></section>'
        for axis, points in content["curves"].items()
        if (curve := _curve(content, axis, points))
    )
    body = [
        '<header><p class="eyebrow">PrefixFleet sweep</p>'
        f'<div class="title"><h1>{text(key)}</h1></div><p class="soft">{text(_asked(content))}</p>'
        f'<ul class="lead"><li>{text(first)}</li>{"".join(f"<li>{text(sentence)}</li>" for sentence in rest)}</ul>{tiles(shown)}</header>',
        f'<section><h2>For the fleet file</h2><div class="text input">{text(content["best"]["fleet_file"].rstrip())}</div></section>',
        curves,
        f"<section><h2>Settings, by {text(metric)} on dev</h2>{_settings_table(content)}</section>",
        _test_section(content),
        f"<section><h2>How it was done</h2>{facts(_how(content))}<h3>Metric signatures</h3>{facts(content['signatures'])}"
        + "".join(f'<p class="soft small">{text(note)}</p>' for note in _notes(content))
        + "</section>",
        "<footer>The same figures are in sweep.json and sweep.md beside this page.</footer>",
    ]
    return page(f"{key}: sweep - PrefixFleet", "\n".join(body))


def _key(content: Mapping[str, Any]) -> str:
    return str(CustomerKey(content["customer"], content["task"]))


def _asked(content: Mapping[str, Any]) -> str:
    """`prefix length 1, 5, 10, 20 x learning rate 0.1, 0.3`."""
    varied = [f"{_CALLED[axis]} {', '.join(map(_value, values))}" for axis, values in content["axes"].items()]
    return " x ".join(varied) or "one setting"


def _setting(content: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    varied = [f"{_CALLED[axis]} {_value(settings[axis])}" for axis in content["axes"] if axis in settings]
    return ", ".join(varied) or "the only setting"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(group: Mapping[str, Any], metric: str) -> str:
    return " to ".join(score_text({"score": score}, metric) for score in group["seeds"])


def _curve(content: Mapping[str, Any], axis: str, points: Sequence[Mapping[str, Any]], standalone: bool = False) -> str:
    if any(isinstance(point["value"], str) for point in points):
        return ""  # words have no place on a scale
    return score_curve(points, content["base_dev"], _CALLED[axis], f"{content['metric']} on dev", standalone)


def _of_others(content: Mapping[str, Any]) -> str:
    return "At each value the best of the other settings." if sum(axis != "seed" for axis in content["axes"]) > 1 else ""


def _head(content: Mapping[str, Any]) -> list[str]:
    seeds = ["#range of seeds"] if "seed" in content["axes"] else []
    return [
        *(f"#{_CALLED[axis]}" for axis in content["axes"] if axis != "seed"),
        f"#{content['metric']}", *seeds, "#the best gains", "#dev loss", "#trained", "#stored", "#seconds", "",
    ]  # fmt: skip


def _rows(content: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The table's cells: text, or (`score` or `gain`, value) for what each format writes in its own way."""
    axes = [axis for axis in content["axes"] if axis != "seed"]
    seeds = "seed" in content["axes"]
    for group in content["settings"]:
        marks = [word for word, is_so in (("best", group["best"]), ("in the fleet file", group["current"])) if is_so]
        yield [
            *(_value(group["settings"][axis]) for axis in axes),
            ("score", group),
            *([_range(group, content["metric"]) if group["seeds"] else ""] if seeds else []),
            ("gain", group["behind"]),
            f"{group['dev_loss']:.3f}",
            f"{group['parameters']:,}",
            f"{group['bytes'] / 2**10:,.0f} KiB",
            f"{group['seconds']:,.1f}",
            ", ".join(marks),
        ]
    scored = [group["settings"] for group in content["settings"]]
    lost = {str(own): own for row in content["variants"] if (own := _own(row)) not in scored}
    for settings in lost.values():
        yield [*(_value(settings[axis]) for axis in axes), *("" for _ in _head(content)[len(axes) : -1]), "failed"]


def failures(content: Mapping[str, Any]) -> list[str]:
    """Why settings failed, each reason once."""
    named: dict[str, list[str]] = {}
    for row in content["variants"]:
        if "error" in row:
            named.setdefault(row["error"], []).append(_setting(content, row["settings"]))
    return [f"{'; '.join(settings)} failed: {reason}" for reason, settings in named.items()]


def _own(row: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's settings but for its seed."""
    return {axis: value for axis, value in row["settings"].items() if axis != "seed"}


def _cell(cell: tuple[str, Any], metric: str) -> str:
    kind, value = cell
    return "" if value is None else score_text(value, metric) if kind == "score" else gain_text(value)


def _settings_table(content: Mapping[str, Any]) -> str:
    metric, head = content["metric"], _head(content)
    places = digits(METRICS[metric].top or max(group["high"] for group in content["settings"]))
    rows = []
    for row in _rows(content):
        cells = []
        for title, cell in zip(head, row, strict=True):
            name = title.removeprefix("#")
            if isinstance(cell, str):
                cells.append(f'<td{" class=number" if title.startswith("#") else ""} data-of="{text(name)}">{text(cell)}</td>')
            elif cell[0] == "score":
                cells.append(score_cell(cell[1], name, places))
            else:
                cells.append(compared_cell(cell[1], name) if cell[1] else f'<td class="number soft" data-of="{text(name)}"></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return table(head, rows, "scores") + "".join(f'<p class="note small">{text(failure)}</p>' for failure in failures(content))


def _test_section(content: Mapping[str, Any]) -> str:
    test = content["test"]["systems"]
    metrics = list(test["best"])
    drawn = "".join(
        f"<h3>{text(metric)}</h3>"
        + score_rows(
            METRICS[metric].top,
            [scores[metric]["high"] for scores in test.values()],
            lambda top, metric=metric: (  # type: ignore[misc]  # bound now
                (
                    text(_TEST.get(name, name)),
                    score_plot(test["base"][metric], scores[metric], top),
                    f"{scores[metric]['score']:.{digits(METRICS[metric].top)}f}",
                )
                for name, scores in test.items()
                if name != "base"
            ),
        )
        for metric in metrics
    )
    rows = [
        f"<tr><th>{text(_TEST.get(name, name))}</th>"
        + "".join(score_cell(scores[m], m, digits(METRICS[m].top or scores[m]["high"])) for m in metrics)
        + "</tr>"
        for name, scores in test.items()
    ]
    key = '<div class="key"><span><i class="base"></i>base without prefix</span><span><i></i>with the prefix</span></div>'
    return (
        f"<section><h2>On the test split, {content['records']['test']:,} records</h2>"
        f"{table(['system', *(f'#{m}' for m in metrics)], rows, 'scores')}{drawn}{key}</section>"
    )


def _how(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "base": content["base"]["id"],
        "data_fingerprint": content["data_fingerprint"],
        "dev_records": content["records"]["dev"],
        "test_records": content["records"]["test"],
        **{_CALLED[axis]: values for axis, values in content["axes"].items()},
        **{f"{_CALLED[axis]} (not varied)": value for axis, value in content["fixed"].items()},
        **content["generation"],
        "bootstrap": content["bootstrap"],
        "made": content["made"],
    }


def _notes(content: Mapping[str, Any]) -> list[str]:
    return [
        *content["notes"].values(),
        "All settings were trained together, in mixed batches on one loaded base; seconds are shared by those side by side.",
        "The highest of several scores on dev flatters itself a little, the more so the more settings are tried: believe the test split.",
    ]
