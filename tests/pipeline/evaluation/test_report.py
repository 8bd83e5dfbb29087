"""The pages say what the files say, load nothing, and show hostile text as text."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.page import long_text, loss_curve, score_plot, signed, text, top_of_scale
from pipeline.evaluation.report import customer_report, fleet_report
from pipeline.evaluation.run import evaluate_job
from pipeline.files import read_json

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
    job = make_job("acme")
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
    assert [top_of_scale(s) for s in ([], [0.0], [20.0], [20.1], [99.0], [100.0])] == [20, 20, 20, 40, 100, 100]
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
    assert "-1.0" in page.text
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert links == {"../evaluations/acme/default/0%20%23%3F/report.html"}
    assert page.text.index("acme") < page.text.index("bistro/menu")
    assert sum(a.get("class") == "plot" for _, a in page.tags) == 2


def test_fleet_page_of_failures_or_of_nobody_is_a_page(tmp_path) -> None:
    for rows in ([], [{"key": "cafe", "status": "failed", "error": "no data"}]):
        fleet_report(rows, tmp_path / "f.html")
        assert "median gain" in Page((tmp_path / "f.html").read_text(encoding="utf-8")).text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_renders_the_customer_page_without_a_console_error(pages, tmp_path) -> None:
    prefix, metrics, decision = pages
    path = tmp_path / "report.html"
    path.write_text(customer_report(prefix, metrics, decision, [record(1, HOSTILE, "a quiet house")]), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-sync",
        "--disable-component-update",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("<table") == 1
    assert done.stdout.count('class="curve"') == 1
    assert "owned" in Page(done.stdout).text  # as text: the script did not replace the body
    assert "CONSOLE" not in done.stderr
