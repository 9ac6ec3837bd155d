"""A headless Chromium for tests of the viewer's page, kept off every network but this machine's loopback."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def chromium() -> str | None:
    """The browser's program; None if this machine has none."""
    return next((found for name in ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser. Skips where there is none, or no playwright to drive it."""
    program = chromium()
    if program is None:
        pytest.skip("no chromium is installed; apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page of the viewer, and everything that it complained of or asked for.

    Args:
      page: the browser's.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(15_000)
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}") if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, address: str) -> Tab:
        """Go to an address, and wait until the run is there."""
        if self.page.url.startswith("http"):
            self.page.goto("about:blank")  # an address that differs in its fragment alone would load nothing
        self.page.goto(address)
        return self.until("window.tsdiffPage && tsdiffPage.state.tree && tsdiffPage.state.run")

    def painted(self) -> Tab:
        """Wait until the tree has been drawn."""
        return self.until("performance.getEntriesByName('tsdiff-painted').length")

    def until(self, expression: str, seconds: float = 20.0) -> Tab:
        """Wait until an expression is true. (Playwright's own way evaluates text in the page, which the page's policy forbids.)"""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {expression}"
            time.sleep(0.03)
        return self

    def state(self, name: str) -> Any:
        """A part of what the page shows; sets as lists."""
        return self.page.evaluate("name => { const value = tsdiffPage.state[name]; return value instanceof Set ? [...value] : value }", name)

    def settled(self) -> None:
        """Wait until what was changed has been told and drawn."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def spot(self, node: int) -> dict[str, float] | None:
        """Where a node is drawn, in the window; None where it is folded away."""
        return self.page.evaluate(
            "node => { const at = tsdiffPage.locate(node); const box = document.getElementById('tree').getBoundingClientRect(); return at && {x: at.x + box.x, y: at.y + box.y} }",
            node,
        )

    def click(self, node: int) -> None:
        """Press a node of the tree with the mouse."""
        spot = self.spot(node)
        assert spot is not None, f"node {node} is not shown"
        self.page.mouse.click(spot["x"], spot["y"])
        self.settled()

    def text(self, selector: str) -> str:
        """What an element says."""
        return self.page.inner_text(selector)


def file_address(path: Path, fragment: str = "") -> str:
    """A file as a browser opens it."""
    return path.resolve().as_uri() + (f"#{fragment}" if fragment else "")
