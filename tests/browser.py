"""The browser that the tests of the web page drive. `python tests/browser.py` installs one where there is none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, Playwright, Request, expect, sync_playwright

from agentsd.demo.inputs import PRESET_INFO


# As root Chromium needs --no-sandbox; the others keep it from calling home.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

HELP = (
    "The tests of the web page need Chromium, and it could not be installed. Install it with `apt install chromium` "
    "(Debian), with `playwright install --with-deps chromium`, or by hand as `chromium` on the PATH."
)


def find_browser() -> str | None:
    """The path of a Chromium: the system's, or the one that Playwright installed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def install_browser() -> None:
    """Debian's package as root, Playwright's download elsewhere."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        ways = [["apt-get", "update", "-q"], ["apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium"]]
    else:
        ways = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    for command in ways:
        subprocess.run(command, check=False, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def start_browser(playwright: Playwright) -> Browser:
    path = find_browser()
    assert path, HELP
    return playwright.chromium.launch(executable_path=path, args=ARGUMENTS)


def set_number(page: Page, label: str, value: float) -> None:
    """Set one of Gradio's sliders by its number."""
    box = page.get_by_label(f"number input for {label}", exact=True)
    # A click waits until the box stands still: what is filled in as an accordion opens, Gradio sets back.
    box.click()
    box.fill(str(value))
    box.press("Tab")


def choose_preset(page: Page, name: str) -> None:
    """Choose a preset, and wait until it has filled in the controls."""
    preset = page.locator("#preset")
    preset.get_by_label(name, exact=True).check()
    # What is said of it comes with the values.
    expect(preset).to_contain_text(PRESET_INFO[name])


def choose_methods(page: Page, *names: str) -> None:
    """Have a sweep draw with these methods, and no other."""
    for label in page.locator("#sweep-methods label").all():
        label.get_by_role("checkbox").set_checked(label.inner_text().strip() in names)


def open_tab(page: Page, name: str) -> None:
    """Open a tab; where the page is narrow, Gradio keeps the last ones in a menu."""
    tab = page.get_by_role("tab", name=name)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown").get_by_text(name)
    tab.click()


def table(page: Page, name: str) -> dict[str, list[str]]:
    """The cells of a table of numbers, by the first cell of each row."""
    lines = page.locator(f"#{name} tr")
    expect(lines.first).to_be_visible()
    cells = lines.evaluate_all("lines => lines.map(line => [...line.cells].map(cell => cell.innerText.trim()))")
    return {line[0]: line[1:] for line in cells}


def compare(page: Page) -> dict[str, list[str]]:
    """Compare in one round, and return the numbers."""
    set_number(page, "Seconds of timing", 0)
    page.locator("#compare-start").click()
    expect(page.locator("#compare-status")).to_contain_text("Speed-up per step")
    return table(page, "compare-numbers")


def number(text: str) -> float:
    """The number that a cell begins with."""
    return float(re.match(r"[\d.]+", text)[0])


def watch_runs(page: Page) -> None:
    """Keep the streams by which Gradio's page hears of its runs, for `wait_for_end`."""
    page.streams = set()

    def begin(request: Request) -> None:
        if "/queue/data" in request.url:
            page.streams.add(request)

    def end(request: Request) -> None:
        page.streams.discard(request)

    page.on("request", begin)
    page.on("requestfinished", end)
    page.on("requestfailed", end)


def wait_for_end(page: Page) -> None:
    """Wait until the page has closed the stream of its last run: what it asks in that very moment, Gradio drops."""
    while page.streams:
        page.wait_for_timeout(20)


def is_running(page: Page) -> None:
    """Wait until the long run of a test has begun."""
    expect(page.get_by_text(re.compile(r"\d+/800"))).to_be_visible()


def start_long(page: Page) -> None:
    """Start a comparison of many steps, and wait until it runs."""
    set_number(page, "Steps", 800)
    page.locator("#compare-start").click()
    is_running(page)


if __name__ == "__main__":
    if find_browser() is None:
        install_browser()
        if find_browser() is None:
            sys.exit(HELP)
