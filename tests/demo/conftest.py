"""The page, served once a file, and a real browser."""

from pathlib import Path

import pytest
from browser import start_browser, watch_runs
from playwright.sync_api import expect, sync_playwright

from agentsd.demo import build_demo, launch_demo
from agentsd.demo.engine import Engine
from agentsd.demo.requests import Limits


ROOT = Path(__file__).parents[2]
RECORDED = sorted(file.parent for file in (ROOT / "notebooks" / "results").glob("*/cases.jsonl"))
# An image or a text comes when it comes: it is waited for, never read at once.
SLOW = 120_000
expect.set_options(timeout=SLOW)


@pytest.fixture(scope="module")
def engine(emoji_128):
    return Engine([emoji_128], device="cpu", limits=Limits(side=512, steps=800, sweep=6, waiting=1, seconds=10))


@pytest.fixture(scope="module")
def address(engine):
    demo = build_demo(engine, RECORDED)
    _, address, _ = launch_demo(demo, prevent_thread_lock=True, quiet=True)
    yield address
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield start_browser(playwright)


@pytest.fixture
def open_page(browser, address):
    contexts = []

    def open_page(width=1280, height=900, query=""):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(SLOW)
        page.seen = []
        page.on("request", lambda request: page.seen.append(request.url))
        watch_runs(page)
        page.goto(address + query)
        expect(page.get_by_role("button", name="Compare", exact=True)).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
