"""The report in a real browser: Debian's chromium, headless, driven by Playwright over a pipe.

Run by ``make test-browser``. Without a browser these tests fail: a page that nobody opened is not a page that works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forge.training.backends import BACKENDS
from harness.report.__main__ import main
from tests.support.browser import SCHEMES, boxes, opened, outside, started_browser
from tests.support.recorded_gate import ARMS, CLAIMS, Gate, whole_gate

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

WIDTHS = (390, 820, 1440)
A4_PIXELS = 680  # 180 mm, what the print style leaves of the page, at 96 pixels an inch
_SPECKLE = 1.0  # pixels: less is no content


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gate")
    assert main([str(whole_gate(directory).write()), "-o", str(directory / "out")]) == 0
    return directory / "out" / "report.html"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_asks_for_nothing_and_says_nothing(browser: Browser, report: Path, width: int, scheme: str) -> None:
    with opened(browser, report, width, scheme) as watch:
        watch.page.mouse.wheel(0, 20_000)
        assert watch.requests == [report.as_uri()]
        assert watch.messages == []


def test_the_watch_sees_what_it_watches_for(browser: Browser, report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    planted = '<img src="file:///nowhere.png"><script>console.log("planted"); null.planted</script>'
    path = tmp_path / "planted.html"
    path.write_text(text.replace("<main>", f"<main>{planted}"), encoding="utf-8")
    with opened(browser, path) as watch:  # the page's own policy stops both, and says so
        assert len([message for message in watch.messages if "Content Security Policy" in message]) == 2
    path.write_text(re.sub(r"<meta http-equiv.*?>", "", text).replace("<main>", f"<main>{planted}"), encoding="utf-8")
    with opened(browser, path) as watch:
        assert any("nowhere.png" in url for url in watch.requests)
        assert any("planted" in message for message in watch.messages)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_chart_has_marks_of_some_size_inside_itself(browser: Browser, report: Path, width: int) -> None:
    with opened(browser, report, width) as watch:
        charts = {box["chart"]: box for box in boxes(watch.page, "figure > svg")}
        marks = boxes(watch.page, "figure .mark")
    assert len(charts) > 15
    assert {mark["chart"] for mark in marks} == charts.keys()
    for mark in marks:
        chart = charts[mark["chart"]]
        assert max(mark["width"], mark["height"]) > _SPECKLE, mark
        assert mark["x"] >= chart["x"] - 6
        assert mark["right"] <= chart["right"] + 6
        assert mark["y"] >= chart["y"] - 6
        assert mark["bottom"] <= chart["bottom"] + 6
    bars = [mark for mark in marks if mark["chart"].startswith(("time-", "peak-", "phases-", "ablation-"))]
    assert bars
    assert all(min(bar["width"], bar["height"]) > _SPECKLE for bar in bars)


def test_a_chart_of_axes_alone_would_be_noticed(browser: Browser, report: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    text = report.read_text(encoding="utf-8")
    path.write_text(re.sub(r'(<g class="mark"[^>]*>).*?</g>', r"\1</g>", text), encoding="utf-8")
    with opened(browser, path) as watch:
        assert any(max(mark["width"], mark["height"]) <= _SPECKLE for mark in boxes(watch.page, "figure .mark"))


def test_backends_differ_in_colour_and_every_scheme_has_its_own(browser: Browser, report: Path) -> None:
    painted: dict[str, dict[str, str]] = {}
    for scheme in SCHEMES:
        with opened(browser, report, scheme=scheme) as watch:
            marks = boxes(watch.page, "#time-genome_full .mark")
            painted[scheme] = {mark["series"]: mark["fill"] for mark in marks}
            painted[scheme]["paper"] = watch.page.evaluate("getComputedStyle(document.body).backgroundColor")
            painted[scheme]["ink"] = watch.page.evaluate("getComputedStyle(document.body).color")
    names = (*BACKENDS, "paper", "ink")
    for colours in painted.values():
        assert len({colours[name] for name in names}) == len(names)
        assert "rgb(0, 0, 0)" not in colours.values()  # what a variable that does not resolve falls back to
    assert all(painted["light"][name] != painted["dark"][name] for name in names)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_to_the_side(browser: Browser, report: Path, width: int) -> None:
    with opened(browser, report, width) as watch:
        assert watch.page.evaluate("document.documentElement.scrollWidth") <= width
        assert outside(watch.page) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_texts_in_charts_are_legible_and_do_not_lie_on_each_other(browser: Browser, report: Path, width: int) -> None:
    with opened(browser, report, width) as watch:
        charts = {box["chart"]: box for box in boxes(watch.page, "figure > svg")}
        texts = [box for box in boxes(watch.page, "figure svg text") if box["text"]]
    for text in texts:
        chart = charts[text["chart"]]
        assert text["font"] * chart["width"] / 380 >= 7, text
        assert text["right"] <= width, text
        assert text["x"] >= 0, text
    collisions = []
    for number, one in enumerate(texts):
        for other in texts[number + 1 :]:
            across = min(one["right"], other["right"]) - max(one["x"], other["x"])
            down = min(one["bottom"], other["bottom"]) - max(one["y"], other["y"])
            if one["chart"] == other["chart"] and across > 1 and down > 0.45 * min(one["height"], other["height"]):
                collisions.append((one["chart"], one["text"], other["text"]))
    assert collisions == []


def test_a_run_is_one_click_from_the_number_it_made(browser: Browser, report: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, report, 390) as watch:
        link = watch.page.locator("#claim-genome_full_speed td.runs a").first
        target = link.get_attribute("href")
        assert target is not None
        link.click()
        row = watch.page.locator(f'[id="{target[1:]}"]')
        expect(row).to_be_in_viewport()
        assert watch.page.url.endswith(target)
        assert "completed" in row.inner_text()


def test_on_paper_it_is_dark_on_light_and_fits(browser: Browser, report: Path) -> None:
    with opened(browser, report, A4_PIXELS, "dark") as watch:
        watch.page.emulate_media(media="print", color_scheme="dark")
        assert watch.page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 28, 26)"
        fill = boxes(watch.page, "#time-genome_full .mark")[0]["fill"]
        assert not watch.page.locator("nav").is_visible()
        assert watch.page.evaluate("document.documentElement.scrollWidth") <= A4_PIXELS
        printed = watch.page.pdf(prefer_css_page_size=True, format="A4")
    with opened(browser, report, A4_PIXELS, "light") as watch:
        assert boxes(watch.page, "#time-genome_full .mark")[0]["fill"] == fill
    assert printed.startswith(b"%PDF")
    assert 5 < len(re.findall(rb"/Type /Page\b", printed)) < 25


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_a_pass_is_not_painted_as_one(browser: Browser, tmp_path: Path, scheme: str) -> None:
    gate = Gate(tmp_path)
    claims = {claim.name: claim for claim in CLAIMS}
    for workload, num_planned in (("genome_full", 2), ("legacy_256", 5)):
        arms = [ARMS[workload, name] for name in ("legacy", "unsloth")]
        runs = [[gate.run(arm, workload) for _ in range(2)] for arm in arms]
        gate.claim(claims[f"{workload}_speed"], *runs, num_planned)
    assert main([str(gate.write()), "-o", str(tmp_path / "out")]) == 0
    with opened(browser, tmp_path / "out" / "report.html", scheme=scheme) as watch:
        colours = {
            name: watch.page.eval_on_selector(selector, "element => getComputedStyle(element).color")
            for name, selector in {"pass": ".badge.pass", "open": ".badge.incomplete", "headline": "h1"}.items()
        }
        assert watch.page.locator("#verdicts .badge.incomplete").count() == 5
        assert watch.page.locator("h1").inner_text() == "… INCOMPLETE"
    assert colours["headline"] == colours["open"] != colours["pass"]
