"""The pages say what the files say, load nothing, and show hostile text as text."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.records import Record
from pipeline.evaluation.markdown import customer_markdown, escaped
from pipeline.evaluation.page import long_text, loss_curve, scale, score_plot, signed, text
from pipeline.evaluation.report import customer_report, fleet_report
from pipeline.evaluation.run import evaluate_job
from pipeline.files import read_json, write_json

from ..sweep.conftest import Swept

HOSTILE = "</style></div><script>document.body.innerHTML='owned'</script><img src=x onerror=alert(1)>\" onload='x'"


class Page(HTMLParser):
    """Elements and visible text of a page; complains about elements that are not closed in order."""

    VOID = frozenset({"meta", "br", "link", "input"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def pages(make_job, engine) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """prefix.json, metrics.json and decision.json of an evaluated customer."""
    return evaluated(make_job("acme"), engine)


@pytest.fixture
def full_pages(make_job, engine, tmp_path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The same with a champion, a prompt baseline, metrics of other units, and slices."""
    records = [
        Record(
            [7] * (i + 1),
            [1],
            f"x {i}",
            [f"Place number {i} is a quiet house by the river."],
            {"kind": HOSTILE if i % 3 else "b"},
        )
        for i in range(12)
    ]
    job = make_job("acme", records=records)
    customer = job.customers[0]
    there = tmp_path / "champion"
    there.mkdir()
    config = read_json(Path(customer.prefix_dir) / "prefix.json", 1)
    write_json(there / "prefix.json", {**config, "weights_sha256": "5" * 64})
    engine.answers[str(there)] = lambda prompt: "Place number 1 is a house"
    evaluation = dataclasses.replace(
        customer.evaluation,
        metrics=["bleu", "chrf", "ter", "perplexity"],
        slices=["kind"],
        prompt_baseline=True,
        instruction=HOSTILE,
    )
    customer = dataclasses.replace(customer, champion_dir=str(there), evaluation=evaluation)
    return evaluated(dataclasses.replace(job, customers=[customer]), engine)


def evaluated(job, engine) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    customer = job.customers[0]
    engine.answers[customer.prefix_dir] = lambda prompt: f"Place number {prompt[0]} is a quiet house"
    evaluate_job(job, engine.load)
    folder = Path(customer.evaluation_dir)
    return (
        read_json(Path(customer.prefix_dir) / "prefix.json", 1),
        read_json(folder / "metrics.json", 1),
        read_json(folder / "decision.json", 1),
    )


def record(n: int, base: str, prefix: str) -> dict[str, Any]:
    return {"input": f"input {n}", "references": ["a quiet house by the river"], "base": base, "prefix": prefix, "fields": {}}


def test_customer_page_shows_decision_reasons_scores_counts_and_lineage(pages) -> None:
    prefix, metrics, decision = pages
    shown = Page(customer_report(prefix, metrics, decision, [record(1, "a", "a quiet house")])).text
    assert "acme promote" in shown
    for reason in decision["reasons"]:
        assert reason in shown
    for system in ("base", "prefix"):
        for score in metrics["scores"][system].values():
            assert f"{score['low']:.1f} to {score['high']:.1f}" in shown
    for value in (
        prefix["digest"],
        prefix["weights_sha256"],
        prefix["lineage"]["data_fingerprint"],
        *metrics["signatures"].values(),
    ):
        assert value in shown
    assert "rows quarantined" in shown
    assert "0.005" in shown


def outputs(base: str, prefix: str) -> dict[str, Any]:
    return {**record(1, base, prefix), "prompt": "told", "champion": "a house"}


def test_page_with_champion_and_prompt_baseline_compares_all_four(full_pages) -> None:
    prefix, metrics, decision = full_pages
    assert list(metrics["scores"]) == ["base", "prompt", "champion", "prefix"]
    page = Page(customer_report(prefix, metrics, decision, [outputs("a", "a quiet house")]))
    assert "over the champion" in page.text
    assert "gain over the champion" in page.text
    assert "lower is better" in page.text
    assert "bleu by slice" in page.text
    for system in ("base", "prompt", "champion", "prefix"):
        assert f"{system}, chrF" in page.text
    assert "compared with the champion: 1 of 1 are better" in page.text
    # One for each metric, one for each value of the slice.
    assert sum((a.get("class") or "").startswith("plot") for _, a in page.tags) == 4 + 2
    assert HOSTILE in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})


def test_markdown_has_the_figures_of_the_page_and_no_markup_of_others(full_pages) -> None:
    prefix, metrics, decision = full_pages
    shown = customer_markdown(prefix, metrics, decision)
    assert shown.startswith(f"# acme: {decision['decision']}\n")
    bleu = metrics["scores"]["champion"]["bleu"]
    assert f"{bleu['score']:.2f} ({bleu['low']:.2f} to {bleu['high']:.2f})" in shown
    assert "| ter (lower is better) |" in shown
    assert "&lt;script&gt;" in shown
    assert "<" not in shown
    assert metrics["signatures"]["bleu"] in shown


def test_markdown_text_is_without_effect() -> None:
    assert escaped("[a](http://x) `b` | <b>\n# c") == r"\[a\]\(http://x\) \`b\` \| &lt;b&gt; \# c"


def test_largest_wins_and_largest_losses_come_first(pages) -> None:
    good, half, bad = "a quiet house by the river", "a quiet house", "zzz"
    generations = [
        record(1, bad, half),
        record(2, bad, good),
        record(3, half, half),
        record(4, good, half),
        record(5, good, bad),
    ]
    shown = Page(customer_report(*pages, generations)).text
    assert "2 of 5 are better with the prefix, 2 worse, 1 equal" in shown
    places = [shown.index(f"input {n}") for n in (2, 1, 5, 4)]
    assert places == sorted(places)
    assert "input 3" not in shown
    assert shown.index("Largest wins") < places[0] < shown.index("Largest losses") < places[2]


def test_hostile_text_is_shown_as_text_and_nothing_is_loaded(pages) -> None:
    prefix, metrics, decision = pages
    prefix["prompt"]["template"] = HOSTILE + "{input}"
    decision["reasons"] = [HOSTILE]
    metrics["notes"] = {"bleu": HOSTILE}
    generations = [{"input": HOSTILE, "references": [HOSTILE], "base": "", "prefix": HOSTILE, "fields": {HOSTILE: HOSTILE}}]
    page = Page(customer_report(prefix, metrics, decision, generations))
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "img", "link", "iframe", "object", "form"})
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset")]
    assert HOSTILE in page.text
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0] is not None
    assert policy[0].startswith("default-src 'none'")


def test_pages_refer_to_nothing_on_the_network(pages) -> None:
    source = customer_report(*pages, [record(1, "a", "b")])
    # Names of the SVG vocabularies look like addresses and are never fetched.
    assert set(re.findall(r"https?://[^\s\"'<]+", source)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in source


def test_control_characters_and_lone_surrogates_can_be_written() -> None:
    shown = text("a\x00b\x1bc\ud800d\te\n")
    assert shown == "a\ufffdb\ufffdc\ufffdd\te\n"
    shown.encode("utf-8")


def test_long_and_empty_texts_have_a_defined_look() -> None:
    assert "[… 7000 characters more]" in long_text("x" * 10_000)
    assert "(empty)" in long_text("")
    assert 'dir="auto"' in long_text("بيت")


def test_loss_curve_draws_both_losses_in_the_pages_own_colours() -> None:
    history = [{"step": s, "loss": 3 - s / 50} for s in range(1, 101)] + [{"step": s, "dev_loss": 3 - s / 60} for s in (50, 100)]
    svg = loss_curve(history, best_step=100)
    Page(svg)
    for colour in ("var(--accent)", "var(--accent-soft)", "var(--soft)", "var(--line)"):
        assert colour in svg
    assert not re.findall(r"#[0-9a-f]{6}", svg.replace("#ffffff", "#")), "a colour that does not follow light and dark"
    assert loss_curve(history, best_step=100) == svg


def test_without_finite_losses_there_is_no_curve_but_a_page(pages) -> None:
    assert loss_curve([], None) == ""
    assert loss_curve([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}], None) == ""
    pages[0]["training"]["history"] = []
    assert "No losses were recorded" in customer_report(*pages, [record(1, "a", "b")])


def test_scale_is_round_and_holds_all_scores() -> None:
    assert [scale(100, s) for s in ([], [0.0], [20.0], [20.1], [99.0], [100.0])] == [20, 20, 20, 40, 100, 100]
    assert scale(None, [2.0, 4.0]) == pytest.approx(4.2) and scale(None, []) > 0
    plot = score_plot({"score": 5.0}, {"score": 15.0, "low": 10.0, "high": 20.0}, 20.0)
    assert 'cx="25.00%"' in plot
    assert 'cx="75.00%"' in plot
    assert 'x1="50.00%" x2="100.00%"' in plot


def test_a_small_gain_is_not_shown_as_none() -> None:
    assert [signed(g) for g in (0.04, -0.3, 12.34, 0.0)] == ["+0.04", "-0.30", "+12.3", "+0.00"]


def fleet_rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "key": "acme",
            "status": "done",
            "rows_used": 1200,
            "quarantined": 4,
            "metric": "bleu",
            "signature": "nrefs:1|tok:13a",
            "base_score": 10.0,
            "score": {"score": 42.5, "low": 40.0, "high": 45.0},
            "decision": "promote",
            "reasons": ["better"],
            "version": 3,
            "alias": "champion",
            "seconds": 61.2,
            "report": folder / "evaluations" / "acme" / "default" / "0 #?" / "report.html",
            "error": None,
        },
        {
            "key": "bistro/menu",
            "status": "done",
            "metric": "bleu",
            "signature": "nrefs:var|tok:13a",
            "base_score": 20.0,
            "score": {"score": 19.0, "low": 18.0, "high": 20.0},
            "decision": "reject",
        },
        {"key": "cafe", "status": "failed", "error": HOSTILE, "base_score": None, "score": None, "report": None},
    ]


def test_fleet_page_lists_everybody_who_failed_and_why_and_links_relative(tmp_path) -> None:
    path = tmp_path / "reports" / "demo.html"
    fleet_report(fleet_rows(tmp_path), path)
    page = Page(path.read_text(encoding="utf-8"))
    assert "demo 1 failed" in page.text
    assert f"cafe {HOSTILE}" in page.text
    assert "1,200" in page.text
    assert "v3 champion" in page.text
    assert "+32.5" in page.text
    assert "bleu nrefs:1|tok:13a; nrefs:var|tok:13a" in page.text
    assert "-1.0" in page.text
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert links == {"../evaluations/acme/default/0%20%23%3F/report.html"}
    assert page.text.index("acme") < page.text.index("bistro/menu")
    assert sum((a.get("class") or "").startswith("plot") for _, a in page.tags) == 2
    content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert content["customers"][0]["score"] == {"score": 42.5, "low": 40.0, "high": 45.0}
    shown = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| acme | promote | 1,200 | 4 | bleu | 10.00 |  | 42.50 (40.00 to 45.00) | +32.5 | v3 champion | 61 |" in shown
    assert "- bleu: `nrefs:1|tok:13a; nrefs:var|tok:13a`" in shown
    assert "<" not in shown


def test_fleet_page_of_failures_or_of_nobody_is_a_page(tmp_path) -> None:
    for rows in ([], [{"key": "cafe", "status": "failed", "error": "no data"}]):
        fleet_report(rows, tmp_path / "f.html")
        assert "median gain" in Page((tmp_path / "f.html").read_text(encoding="utf-8")).text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)")
def test_a_browser_renders_the_pages_without_a_console_error_or_sideways_scrolling(
    full_pages, make_job, engine, tmp_path
) -> None:
    prefix, metrics, decision = full_pages
    report, fleet, grid = tmp_path / "report.html", tmp_path / "demo.html", tmp_path / "sweep.html"
    swept = Swept(make_job("bistro", records=[]), tmp_path / "sweep", engine)
    for length in (1, 10, 20):
        swept.add(length, lambda n, length=length: "number " * length)
    swept.fail(60, HOSTILE)
    sweep = swept.score()
    grid.write_text((swept.folder / "report" / "sweep.html").read_text(encoding="utf-8"), encoding="utf-8")
    generations = [outputs(HOSTILE, "a quiet house")]
    report.write_text(customer_report(prefix, metrics, decision, generations, sweep), encoding="utf-8")
    fleet_report(fleet_rows(tmp_path), fleet)
    # Two frames as wide as a phone and a desktop; a frame's own document says how wide it came out.
    frames = "".join(
        f"<iframe src='{page.name}' style='width:{width}px;height:4000px'></iframe>"
        for page in (report, fleet, grid)
        for width in (390, 1280)
    )
    measure = (
        "onload=()=>{document.title=[...document.querySelectorAll('iframe')].map(f=>{const d=f.contentDocument;"
        "return [d.documentElement.scrollWidth-f.clientWidth,"
        "[...d.querySelectorAll('td,th')].filter(c=>c.scrollWidth>c.clientWidth+1).length,d.querySelectorAll('table').length,"
        "d.querySelectorAll('svg.plot circle').length,d.querySelectorAll('svg.curve').length].join(':')}).join(' ')}"
    )
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{measure}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-sync", "--disable-component-update", "--enable-logging=stderr", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    measured = re.findall(r"<title>(.*?)</title>", done.stdout)[0].split()
    assert "CONSOLE" not in done.stderr, done.stderr
    # Tables, dots and curves of the customer's page, the fleet's and the sweep's, each as wide as a phone and a desktop.
    expected = [(3, 12, 2)] * 2 + [(2, 4, 0)] * 2 + [(2, 6, 1)] * 2
    for one, seen in zip(measured, expected, strict=True):
        beyond, overlapping, *found = map(int, one.split(":"))
        assert beyond <= 0, "the page is wider than its window"
        assert overlapping == 0, "text runs out of its cell into the next"
        assert tuple(found) == seen
    # The text of a script in the data is text: the body was not replaced.
    alone = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", report.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "owned" in Page(alone.stdout).text
    assert "CONSOLE" not in alone.stderr
