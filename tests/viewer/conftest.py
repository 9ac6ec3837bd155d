"""One browser for all tests of the page."""

from __future__ import annotations

import pytest
from browser import Tab, launched


@pytest.fixture(scope="session")
def chromium_browser():
    """A headless Chromium; the tests that need it are skipped where there is none."""
    with launched() as browser:
        yield browser


@pytest.fixture
def new_tab(chromium_browser):
    """Opens tabs, each with storage of its own; afterwards none of them may have complained."""
    opened = []

    def make(**options):
        context = chromium_browser.new_context(**({"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | options))
        tab = Tab(context.new_page())
        opened.append((context, tab))
        return tab

    yield make
    for context, _ in opened:
        context.close()
    assert [tab.complaints for _, tab in opened] == [[] for _ in opened]
