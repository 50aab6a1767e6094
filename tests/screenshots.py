"""Takes the README's images of the web page: `python tests/screenshots.py apps/screenshots`."""

import sys
from pathlib import Path

from browser import choose_preset, open_tab, set_number, start_browser
from playwright.sync_api import Page, expect, sync_playwright

from agentsd.demo import build_demo, launch_demo
from agentsd.demo.engine import Engine


RESULTS = sorted(file.parent for file in (Path(__file__).parents[1] / "notebooks" / "results").glob("*/cases.jsonl"))
SLOW = 120_000


def visit(page: Page, address: str, prompt: str) -> None:
    page.set_default_timeout(SLOW)
    page.goto(address)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    set_number(page, "Steps", 20)


def take(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    demo = build_demo(Engine(["emoji"]), RESULTS)
    _, address, _ = launch_demo(demo, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = start_browser(playwright)
        for width, theme in ((1280, "light"), (1280, "dark"), (390, "light")):
            page = browser.new_page(viewport={"width": width, "height": 1000})
            visit(page, f"{address}?__theme={theme}", "a pineapple")
            page.locator("#compare-start").click()
            expect(page.locator("#compare-numbers table")).to_be_visible(timeout=SLOW)
            page.screenshot(path=folder / f"compare-{width}-{theme}.png", full_page=True)
            if (width, theme) != (1280, "light"):
                continue
            choose_preset(page, "paper")  # which has agents
            open_tab(page, "Tokens")
            page.locator("#tokens-start").click()
            expect(page.locator("#tokens-drawing img")).to_be_visible(timeout=SLOW)
            page.screenshot(path=folder / "tokens.png", full_page=True)
            open_tab(page, "Sweep")
            page.locator("#sweep-start").click()
            expect(page.locator("#sweep-numbers table")).to_be_visible(timeout=SLOW)
            page.locator("#sweep-plot").scroll_into_view_if_needed()  # it is loaded where it can be seen
            expect(page.locator("#sweep-plot img")).to_be_visible(timeout=SLOW)
            page.screenshot(path=folder / "sweep.png", full_page=True)
            open_tab(page, "Benchmark")
            page.get_by_label("Recorded results").click()
            page.get_by_role("option").first.click()
            expect(page.locator("#benchmark-plots img").first).to_be_visible(timeout=SLOW)
            page.wait_for_timeout(1000)  # it fades in
            page.screenshot(path=folder / "benchmark.png", full_page=True)
    demo.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]))
