"""The pieces that the HTML reports are put together from: escaping, the page around it, tables, score plots, the loss curve.

A page is one file that loads nothing: its style and drawings are inside, and a content security policy forbids everything else,
since the texts shown are customers' and models' and may be hostile. Light or dark follows the reader's system. Knows nothing of
evaluations.
"""

import contextlib
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f6f3;--card:#fff;--ink:#1b1d20;--soft:#5b626b;--line:#e1e2de;--accent:#1361cf;
--accent-soft:#7fb0f5;--base:#868d96;--champion:#b26a00;--champion-soft:#e0b36d;--good:#11713f;--good-bg:#e0f3e8;--bad:#ab3016;--bad-bg:#fbe8e2}
@media (prefers-color-scheme:dark){:root{--bg:#131518;--card:#1b1e22;--ink:#e8eaed;--soft:#a0a7b0;--line:#30343a;
--accent:#6aa9ff;--accent-soft:#33598f;--base:#8b929b;--champion:#f0a742;--champion-soft:#7a571f;--good:#6fd39d;--good-bg:#15342440;--bad:#ff9a80;--bad-bg:#4a1d1340}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:28px 20px 56px}
a{color:var(--accent)}
h1{font-size:30px;line-height:1.2;margin:0;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 14px}
h3{font-size:15px;margin:22px 0 8px}
h3:first-of-type{margin-top:0}
p{margin:0 0 10px}
p,li{overflow-wrap:anywhere}
.more{margin-top:20px}
.more p{margin:8px 0 0}
tbody th .small{font-weight:400;display:block}
.eyebrow{color:var(--soft);font-size:14px;margin:0 0 4px}
.soft{color:var(--soft)}
.small{font-size:14px}
.title{display:flex;flex-wrap:wrap;align-items:center;gap:8px 14px}
.badge{display:inline-block;border-radius:99px;padding:2px 12px;font-size:14px;font-weight:600;white-space:nowrap;
color:var(--soft);border:1px solid var(--line)}
.badge.good{color:var(--good);background:var(--good-bg);border-color:transparent}
.badge.bad{color:var(--bad);background:var(--bad-bg);border-color:transparent}
.good{color:var(--good)}.bad{color:var(--bad)}
.lead{margin:12px 0 0;padding-left:20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:22px 0 0}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:12px 16px}
.tile b{display:block;font-size:24px;line-height:1.25;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile span{color:var(--soft);font-size:14px}
section{padding:20px;margin-top:16px}
.two{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:0 16px}
.middle{align-items:center}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:8px 14px 8px 0;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:14px;white-space:nowrap;padding-top:0}
th:last-child,td:last-child{padding-right:0}
tbody th{font-weight:600}
.scale td{border:0;padding:0}
.number{text-align:right;white-space:nowrap}
.interval{display:block;color:var(--soft);font-size:13px}
.key{display:flex;flex-wrap:wrap;gap:2px 18px;color:var(--soft);font-size:14px;margin:10px 0 0}
.key i{display:inline-block;width:10px;height:10px;border-radius:99px;margin-right:6px;background:var(--accent)}
.key i.base{background:none;border:2px solid var(--base)}
.key i.line{height:2px;width:16px;background:var(--accent-soft);vertical-align:4px;border-radius:0}
.key i.dev{height:3px;width:16px;vertical-align:4px;border-radius:0}
.key i.champion{background:var(--champion);border-radius:0;transform:rotate(45deg) scale(.85)}
.key i.prompt{background:var(--base);width:3px;height:13px;border-radius:0;vertical-align:-2px}
.plot{display:block;width:100%;height:22px;overflow:visible}
.plot.tall{height:28px}
.badge.keep{color:var(--champion);border-color:var(--champion)}
.rows{display:grid;grid-template-columns:fit-content(34%) minmax(0,1fr) auto;gap:2px 14px;align-items:center}
.rows>:first-child,.rows>*{min-width:0;overflow-wrap:anywhere}
.axis{height:18px;overflow:visible;width:100%;display:block}
.axis text{fill:var(--soft);font-size:12px}
.curve{width:100%;height:auto;display:block;max-width:640px}
dl{margin:0;display:grid;grid-template-columns:fit-content(45%) minmax(0,1fr);gap:5px 16px;font-size:14px}
dt{color:var(--soft);overflow-wrap:anywhere}
dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap;font-variant-numeric:tabular-nums}
.sample{border-top:1px solid var(--line);padding:14px 0}
.sample:last-child{padding-bottom:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.input{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Noto Sans Mono",monospace;font-size:13.5px;margin-bottom:10px}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:16px;font-size:15px}
.answers h4{margin:0 0 3px;font-size:13px;font-weight:500;color:var(--soft)}
.answers>*{min-width:0}
.answers .ours{box-shadow:inset 3px 0 0 var(--accent);padding-left:12px}
.note{border-left:3px solid var(--bad);padding-left:12px}
footer{color:var(--soft);font-size:14px;margin-top:24px}
@media (max-width:760px){
main{padding:20px 14px 40px}
h1{font-size:25px}
section{padding:16px}
.two,.answers{grid-template-columns:minmax(0,1fr)}
.answers{gap:10px}
.middle{row-gap:14px}
.rows{grid-template-columns:fit-content(42%) minmax(0,1fr) auto;font-size:14px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}
.scores thead{display:none}
.scores tr{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:2px 12px;padding:12px 0;border-top:1px solid var(--line)}
.scores tr:first-child{border-top:0;padding-top:0}
.scores .scale{padding:0;border:0}
.scores th,.scores td{border:0;padding:0;text-align:left}
.scores th,.scores td.wide{grid-column:1/-1;width:auto!important}
.scores td.number{white-space:normal}
.scores th{overflow-wrap:anywhere}
.scores td[data-of]::before{content:attr(data-of);display:block;color:var(--soft);font-size:13px}
}
@media print{section,.tile{break-inside:avoid}}
"""

# Nothing may be loaded or run, whatever a customer's text holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

# Stand-ins that matplotlib draws with and that are then replaced by the page's own colours, so that the curve follows light and
# dark too; second, what a drawing in a file of its own has.
_COLOURS = {
    "#010101": ("var(--soft)", "#5b626b"),
    "#020202": ("var(--line)", "#e1e2de"),
    "#030303": ("var(--accent)", "#1361cf"),
    "#040404": ("var(--accent-soft)", "#7fb0f5"),
    "#050505": ("var(--card)", "#ffffff"),
}
_SOFT, _LINE, _ACCENT, _FAINT, _CARD = _COLOURS

_SHOWN_CHARACTERS = 3000


def text(value: object) -> str:
    """`value` as HTML text that is safe in content and in quoted attributes."""
    # Control characters are not allowed in HTML and lone surrogates not in UTF-8; a model can produce the former, a customer's
    # JSON the latter.
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value).replace("\r\n", "\n"))
    return html.escape(shown, quote=True)


def long_text(value: str, style: str = "") -> str:
    """A customer's or model's text in its own direction (Arabic runs right to left), cut if it is very long."""
    cut = (
        f"{value[:_SHOWN_CHARACTERS]} [… {len(value) - _SHOWN_CHARACTERS} characters more]"
        if len(value) > _SHOWN_CHARACTERS
        else value
    )
    return f'<div class="text {style}" dir="auto">{text(cut) if cut else "<span class=soft>(empty)</span>"}</div>'


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def tiles(content: Iterable[tuple[str, str]]) -> str:
    """Large figures with a caption each; both are plain text."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{text(figure)}</b><span>{text(name)}</span></div>' for name, figure in content)
        + "</div>"
    )


def facts(content: Mapping[str, Any]) -> str:
    """Names and values, nested mappings spread out as `outer.inner`."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in _flat(content)) + "</dl>"


def _flat(content: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        label = f"{before}{name}".replace("_", " ")
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{label}.")
        elif value is None or value in ({}, []):
            yield label, "none"
        elif isinstance(value, bool):
            yield label, "yes" if value else "no"
        elif isinstance(value, float):
            yield label, f"{value:.6g}"
        elif isinstance(value, list):
            yield label, ", ".join(map(str, value))
        elif isinstance(value, str) and (value != value.strip() or "\n" in value):
            yield label, repr(value)  # so that a template's blanks and line ends can be seen
        else:
            yield label, str(value)


def table(head: Sequence[str], rows: Iterable[str], style: str = "") -> str:
    """A table; a column whose title begins with `#` holds numbers. `rows` are `<tr>` elements."""
    titles = "".join(f'<th class="number">{text(t[1:])}</th>' if t.startswith("#") else f"<th>{text(t)}</th>" for t in head)
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def score_cell(score: Mapping[str, float] | None, of: str, places: int = 1) -> str:
    """A table cell with a score and its interval below; `of` is the column's name where a phone shows no head."""
    if score is None:
        return f'<td class="number soft" data-of="{text(of)}">none</td>'
    interval = f'<span class="interval">{score["low"]:.{places}f} to {score["high"]:.{places}f}</span>' if "low" in score else ""
    return f'<td class="number" data-of="{text(of)}">{score["score"]:.{places}f}{interval}</td>'


def gain_cell(gain: float | None) -> str:
    """A table cell with a signed difference, positive where it is better."""
    if gain is None:
        return '<td class="number soft" data-of="gain">none</td>'
    return f'<td class="number {_colour(gain)}" data-of="gain">{signed(gain)}</td>'


def compared_cell(compared: Mapping[str, Any] | None, of: str) -> str:
    """A table cell with a gain, its interval and its p-value. Without a p-value (too few records) it has no colour."""
    if compared is None:
        return f'<td class="number soft" data-of="{text(of)}">none</td>'
    low, high = signed(compared["low"]), signed(compared["high"])
    certain = compared["p"] is not None and (compared["low"] > 0 or compared["high"] < 0)
    tested = "no p" if compared["p"] is None else f"p {p_value(compared['p'])}"
    return (
        f'<td class="number {_colour(compared["gain"]) if certain else "soft"}" data-of="{text(of)}">{signed(compared["gain"])}'
        f'<span class="interval">{low} to {high}, {tested}</span></td>'
    )


def p_value(p: float) -> str:
    """A p-value as people write it."""
    return f"{p:.3f}" if p >= 0.001 else "&lt; 0.001"


def signed(gain: float) -> str:
    """A difference in points with its sign; small ones with two digits, so that a gain never reads +0.0."""
    return f"{gain:+.2f}" if abs(gain) < 1 else f"{gain:+.1f}"


def _colour(gain: float) -> str:
    return "good" if gain > 0 else "bad" if gain < 0 else "soft"


def score_plot(
    base: Mapping[str, float], prefix: Mapping[str, float], top: float, others: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """One row of a score plot on a scale from 0 to `top`: a ring at the base's score, a dot at the prefix's, whiskers for 95 %.

    Of `others`, `champion` is a diamond with whiskers, and `prompt` a small bar. Places are percentages, so the row is as wide as its place
    allows while dots and strokes keep their size.
    """

    def at(value: float) -> str:
        return f"{100 * min(max(value / top, 0.0), 1.0):.2f}%"

    def whisker(score: Mapping[str, float], colour: str, y: float = 11) -> str:
        if "low" not in score:
            return ""
        ends = f'x1="{at(score["low"])}" x2="{at(score["high"])}"'
        return f'<line {ends} y1="{y:g}" y2="{y:g}" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'

    shown = dict(others or {})
    label = ", ".join(
        f"{name} {score['score']:.{digits(top)}f}" for name, score in {"base": base, **shown, "prefix": prefix}.items()
    )
    marks = ""
    if "prompt" in shown:
        x = at(shown["prompt"]["score"])
        marks += f'<line x1="{x}" x2="{x}" y1="4" y2="18" stroke="var(--base)" stroke-width="2.5"/>'
    if "champion" in shown:
        champion = shown["champion"]
        # A nested picture brings the diamond to a place in percent.
        marks += (
            whisker(champion, "var(--champion-soft)", 18)
            + f'<svg x="{at(champion["score"])}" y="18" overflow="visible"><path d="M0-5.5 5.5 0 0 5.5-5.5 0Z" fill="var(--champion)"/></svg>'
        )
    return (
        f'<svg class="plot{" tall" if "champion" in shown else ""}" role="img" aria-label="{label}"><title>{label}</title>'
        '<line x1="0" x2="100%" y1="11" y2="11" stroke="var(--line)"/>'
        f"{whisker(base, 'var(--base)')}{whisker(prefix, 'var(--accent-soft)')}{marks}"
        f'<circle cx="{at(base["score"])}" cy="11" r="4.5" fill="var(--card)" stroke="var(--base)" stroke-width="2"/>'
        f'<circle cx="{at(prefix["score"])}" cy="11" r="5.5" fill="var(--accent)"/></svg>'
    )


def digits(top: float | None) -> int:
    """Decimal places of a score on a scale that ends at `top`: one in points of 100, three on short scales."""
    return 1 if top is not None and top >= 20 else 3


def score_axis(top: float) -> str:
    """The scale below rows of `score_plot`, from 0 to `top`."""
    anchors = ["start", "middle", "middle", "middle", "end"]
    ticks = "".join(
        f'<text x="{25 * i}%" y="13" text-anchor="{anchor}">{top * i / 4:g}</text>' for i, anchor in enumerate(anchors)
    )
    return f'<svg class="axis" aria-hidden="true">{ticks}</svg>'


def scale(end: float | None, scores: Iterable[float]) -> float:
    """The end of a drawn scale that starts at 0 and holds all `scores`.

    Args:
        end: of the metric's own scale. With 100 (points) it is a multiple of 20, so that four ticks are round.
    """
    highest = max(scores, default=0.0)
    return min(100.0, max(20.0, 20.0 * math.ceil(highest / 20.0))) if end == 100 else max(1e-9, highest) * 1.05


def score_rows(end: float | None, scores: Iterable[float], lines: Callable[[float], Iterable[tuple[str, str, str]]]) -> str:
    """Rows of a name, a `score_plot` and a figure below one another on one scale, with the scale below where it has round ticks.

    Args:
        end: of the metric's own scale.
        scores: what has to find room.
        lines: the end of the drawn scale -> the rows, each three pieces of HTML.
    """
    top = scale(end, scores)
    rows = "".join(f'<div>{name}</div>{plot}<div class="number">{figure}</div>' for name, plot, figure in lines(top))
    axis = f"<div></div>{score_axis(top)}<div></div>" if end == 100 else ""
    return f'<div class="rows">{rows}{axis}</div>'


def loss_curve(history: Sequence[Mapping[str, Any]], best_step: int | None) -> str:
    """Training and dev loss by step as inline SVG, from entries `{step, loss}` and `{step, dev_loss}`; empty without any."""
    series = {
        name: [
            (entry["step"], entry[name])
            for entry in history
            if isinstance(entry.get(name), int | float) and math.isfinite(entry[name])
        ]
        for name in ("loss", "dev_loss")
    }
    if not any(series.values()):
        return ""
    with _figure() as (figure, axes):
        if series["loss"]:
            axes.plot(*zip(*series["loss"], strict=True), color=_FAINT, linewidth=1.6)
        if series["dev_loss"]:
            axes.plot(*zip(*series["dev_loss"], strict=True), color=_ACCENT, linewidth=2.2, marker="o", markersize=4.5)
        if best_step is not None:
            axes.axvline(best_step, color=_SOFT, linewidth=1, linestyle=(0, (2, 3)))
        from matplotlib.ticker import MaxNLocator

        axes.set_xlabel("step", color=_SOFT)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_ylabel("loss per token (nats)", color=_SOFT)
        return _svg(figure, "loss by step")


def score_curve(
    points: Sequence[Mapping[str, Any]], base: Mapping[str, float] | None, across: str, up: str, standalone: bool = False
) -> str:
    """Score by a number that was varied, as inline SVG: dots with whiskers for 95 %, the best one filled; empty without two points.

    Args:
        points: `value`, `score`, `low`, `high` and `best` of each.
        base: the score without prefix, a level line.
        across: what was varied.
        up: what the score is.
        standalone: a file of its own, in the light page's colours, instead of a part of a page.
    """
    ordered = sorted(points, key=lambda point: float(point["value"]))
    if len(ordered) < 2:
        return ""
    values, scores = [float(point["value"]) for point in ordered], [point["score"] for point in ordered]
    with _figure() as (figure, axes):
        if base is not None:
            axes.axhline(base["score"], color=_SOFT, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.plot(values, scores, color=_ACCENT, linewidth=1.8)
        axes.vlines(
            values, [p["low"] for p in ordered], [p["high"] for p in ordered], color=_FAINT, linewidth=3, capstyle="round"
        )
        axes.plot(
            values, scores, color=_ACCENT, linewidth=0, marker="o", markersize=6, markerfacecolor=_CARD, markeredgewidth=1.8
        )
        best = [(value, point["score"]) for value, point in zip(values, ordered, strict=True) if point["best"]]
        axes.plot(*zip(*best, strict=True), color=_ACCENT, linewidth=0, marker="o", markersize=8)
        from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

        if min(values) > 0 and max(values) >= 8 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(across, color=_SOFT)
        axes.set_ylabel(up, color=_SOFT)
        axes.margins(x=0.06)
        return _svg(figure, f"{up} by {across}", standalone)


@contextlib.contextmanager
def _figure() -> Iterator[tuple[Any, Any]]:
    """An empty figure and its axes, in the look that all drawings here have."""
    # Without pyplot: no global state, no display, nothing to close.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Text stays text (the reader's font), and equal curves give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "prefixfleet", "font.size": 11}):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.tick_params(length=0, colors=_SOFT)
        axes.spines[:].set_visible(False)
        yield figure, axes


def _svg(figure: Any, label: str, standalone: bool = False) -> str:
    """A figure as SVG, with a page's own colours or (standalone) those of a light one on white."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    drawn = io.StringIO()
    FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    if standalone:
        for stand_in, (_, light) in _COLOURS.items():
            svg = svg.replace(stand_in, light)
        return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # the figure's white background
    svg = re.sub(r'<g id="patch_2">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # the axes' white background
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, (colour, _) in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg class="curve" role="img" aria-label="{text(label)}" viewBox="\1">',
        svg,
        count=1,
    )
