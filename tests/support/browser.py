"""Pages in a real browser: Debian's chromium, headless, driven by Playwright over a pipe."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SCHEMES = ("light", "dark")


@dataclass
class Watch:
    """A page with everything it asked for and said."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Chromium. Fails the test where there is none: a page that nobody opened is not a page that works."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.fail("no chromium here; as root: apt-get install --no-install-recommends chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@contextmanager
def opened(browser: Browser, path: Path, width: int = 1440, scheme: str = "light") -> Iterator[Watch]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    watch = Watch(context.new_page())
    watch.page.on("request", lambda request: watch.requests.append(request.url))
    watch.page.on("console", lambda message: watch.messages.append(message.text))
    watch.page.on("pageerror", lambda error: watch.messages.append(str(error)))
    watch.page.goto(path.as_uri(), wait_until="networkidle")
    try:
        yield watch
    finally:
        context.close()


def boxes(page: Page, selector: str) -> list[dict[str, Any]]:
    """What is painted where: position, colours, the chart it is in and its text."""
    found = page.eval_on_selector_all(
        selector,
        """elements => elements.map(element => {
            const box = element.getBoundingClientRect();
            const shape = element.querySelector("path, use") ?? element;
            const style = getComputedStyle(shape);
            const chart = element.closest("figure")?.id ?? "";
            return {x: box.x, y: box.y, width: box.width, height: box.height, right: box.right, bottom: box.bottom,
                    fill: style.fill, stroke: style.stroke, series: element.dataset.series ?? "", chart,
                    font: parseFloat(style.fontSize), text: element.textContent.trim()};
        })""",
    )
    assert isinstance(found, list)
    return found


def outside(page: Page) -> list[str]:
    """What is painted to the right of the window, but for what scrolls in a box of its own."""
    found = page.eval_on_selector_all(
        "body *",
        """elements => elements
            .filter(element => !element.closest(".scroll"))
            .filter(element => element.getBoundingClientRect().right > innerWidth + 0.5)
            .map(element => element.tagName + " " + element.textContent.slice(0, 60))""",
    )
    assert isinstance(found, list)
    return found
