"""A run's page in a real browser. Run by ``make test-browser``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forge.training.report.run_report import write_report
from tests.support.browser import SCHEMES, boxes, opened, outside, started_browser
from tests.support.run_pages import whole_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(whole_run(tmp_path_factory.mktemp("runs") / "lighthouse"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_asks_for_nothing_says_nothing_and_does_not_overflow(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    with opened(browser, page, width, scheme) as watch:
        for folded in watch.page.locator("details").all():
            folded.locator("summary").click()
        assert watch.page.evaluate("document.documentElement.scrollWidth") <= width
        assert outside(watch.page) == []
        assert watch.requests == [page.as_uri()]
        assert watch.messages == []


def test_both_losses_are_drawn_in_colours_of_their_own_in_either_scheme(browser: Browser, page: Path) -> None:
    painted: dict[str, dict[str, str]] = {}
    for scheme in SCHEMES:
        with opened(browser, page, 1280, scheme) as watch:
            marks = boxes(watch.page, "#loss .mark")
            assert all(max(mark["width"], mark["height"]) > 10 for mark in marks)
            painted[scheme] = {mark["series"]: mark["stroke"] for mark in marks}
            painted[scheme]["paper"] = watch.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert painted[scheme].keys() == {"train", "held-out", "paper"}
        assert len(set(painted[scheme].values())) == 3
    assert painted["light"]["held-out"] != painted["dark"]["held-out"]


def test_a_link_of_the_contents_leads_to_its_section(browser: Browser, page: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, page, 390) as watch:
        watch.page.locator("nav a", has_text="Files").click()
        expect(watch.page.locator("#files h2")).to_be_in_viewport()
