"""The web page in a real browser: every tab, its numbers, stopping, and errors."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import (
    choose_methods,
    choose_preset,
    compare,
    is_running,
    number,
    open_tab,
    set_number,
    start_long,
    table,
    wait_for_end,
)
from playwright.sync_api import expect

from agentsd.bench import load_result
from agentsd.demo.inputs import PRESET_INFO
from agentsd.utils.generation import RunTime


ROOT = Path(__file__).parents[2]
RECORDED = sorted(file.parent for file in (ROOT / "notebooks" / "results").glob("*/cases.jsonl"))
RESULTS = ROOT / "notebooks" / "results" / "cpu"
# Milliseconds between two looks at a page.
POLLING = 100


def test_compare_shows_both_images_and_true_numbers(open_page):
    page = open_page()
    choose_preset(page, "paper")
    page.get_by_label("Prompt", exact=True).fill("a red heart")
    set_number(page, "Steps", 3)
    numbers = compare(page)
    for row in ("per step", "total"):
        before, after, gain = numbers[row]
        ratio = number(before) / number(after)
        assert abs(number(gain) - ratio) < 0.02 * ratio + 0.01
        assert gain.endswith("×, timed once")
    assert all(0.3 < number(text) < 20 for text in numbers["peak memory"][:2])
    assert 10 < number(numbers["PSNR"][1]) < 60
    assert 0.3 < number(numbers["SSIM"][1]) < 1
    expect(page.locator("#compare-status")).to_contain_text("timed once")
    for place in (0, 1):
        expect(page.locator("#compare-slider img").nth(place)).to_have_js_property("naturalWidth", 128)
    expect(page.locator("#compare-difference img")).to_have_attribute("alt", re.compile("differ"))
    expect(page.locator("#compare-difference")).to_contain_text("times as bright")
    page.get_by_text("What was patched").click()
    expect(page.locator("#compare-report")).to_contain_text(re.compile(r"\b256\b"))

    # The same again, timed for longer.
    set_number(page, "Seconds of timing", 10)
    page.locator("#compare-start").click()
    # Looked for often: it does not stay long.
    page.wait_for_function("document.body.innerText.includes('agentsd, round 3')", polling=20)
    expect(page.locator("#compare-status")).to_contain_text(re.compile(r"\d× \(\d.*–\d.*\).* rounds"))
    expect(page.locator("#compare-numbers")).not_to_contain_text("timed once")


@pytest.mark.parametrize(
    "before, after, text",
    [
        ([1.0], [0.5], "2.00×, timed once"),
        ([1.0, 1.1, 1.0], [1.1, 1.0, 1.0], r"1.00× \(0...–1...\), no difference measured"),
        ([1.0, 1.01, 1.0], [0.5, 0.5, 0.5], r"2.01× \(1.9.–2...\)"),
    ],
)
def test_compare_shows_intervals(open_page, engine, monkeypatch, before, after, text):
    compare_once = engine.compare

    def timed(run, rounds):
        return replace(run, rounds=[RunTime([seconds, seconds], 3 * seconds) for seconds in rounds])

    def compare_with_times(*args):
        comparison = compare_once(*args)
        baseline, variant = timed(comparison.baseline_run, before), comparison.variants["agentsd"]
        variant = replace(variant, baseline=baseline, run=timed(variant.run, after))
        return replace(comparison, baseline_run=baseline, variants={"agentsd": variant})

    monkeypatch.setattr(engine, "compare", compare_with_times)
    page = open_page()
    set_number(page, "Steps", 1)
    assert re.fullmatch(text, compare(page)["per step"][2])
    expect(page.locator("#compare-status")).to_have_text(
        re.compile(rf"Speed-up per step: {text}\. .*timed once|rounds")
    )


def test_every_image_and_field_has_a_name(open_page):
    page = open_page()
    set_number(page, "Steps", 1)
    compare(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button')]
            .filter(field => field.offsetParent && field.type !== 'hidden')
            .filter(field => !(field.labels?.length || field.getAttribute('aria-label') || field.title
                || field.getAttribute('aria-labelledby') || field.innerText.trim()
                || field.placeholder || field.querySelector('img[alt]:not([alt=""])')))
            .map(field => field.outerHTML)"""
    )
    assert nameless == []
    expect(page.locator("#compare-difference img")).to_be_visible()
    expect(page.locator("img:visible:not([alt]), img:visible[alt='']")).to_have_count(0)


def test_a_click_stops_a_run(open_page):
    page = open_page()
    expect(page.locator("#compare-stop")).to_be_disabled()  # nothing runs
    start_long(page)
    page.locator("#compare-stop").click()
    expect(page.locator("#compare-status")).to_contain_text("Stopped", timeout=10_000)
    expect(page.locator("#compare-stop")).to_be_disabled()
    wait_for_end(page)
    set_number(page, "Steps", 1)
    compare(page)
    expect(page.locator("#compare-stop")).to_be_disabled()


def test_stopping_ends_what_runs_on_its_own_tab_only(open_page):
    page = open_page()
    start_long(page)
    open_tab(page, "Tokens")
    page.locator("#tokens-start").click()
    expect(page.get_by_text("queue: 1/1")).to_be_visible()
    page.locator("#tokens-stop").click()
    expect(page.locator("#tokens-status")).to_contain_text("Stopped")
    expect(page.locator("#tokens-drawing")).not_to_contain_text("queue")
    open_tab(page, "Compare")
    is_running(page)
    page.locator("#compare-stop").click()
    expect(page.locator("#compare-status")).to_contain_text("Stopped")


def start_short(page, tab, *methods):
    """Start what a tab draws: timed once, or by these methods only."""
    open_tab(page, tab)
    if tab == "Compare":
        set_number(page, "Seconds of timing", 0)
    if tab == "Sweep":
        choose_methods(page, *methods)
    page.locator(f"#{tab.lower()}-start").click()


def status_of(page, tab):
    return page.locator(f"#{tab.lower()}-status")


def test_a_image_that_is_none_is_a_warning_in_every_tab(open_page, engine, monkeypatch):
    bias = engine._pipes["emoji"].vae.decoder.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    page = open_page()
    set_number(page, "Steps", 1)
    for tab, names in {
        "Compare": ["without agentsd", "with agentsd"],
        "Tokens": ["with agentsd"],
        "Sweep": ["without agentsd", "with balanced", "with tomesd 0.4"],
    }.items():
        start_short(page, tab, "balanced", "tomesd")
        for name in names:
            warning = status_of(page, tab).get_by_text(f"The image {name} has values that are not finite")
            expect(warning).to_be_visible()
        wait_for_end(page)


def test_a_prompt_that_is_too_long_is_a_warning_in_every_tab(open_page):
    """Once, however often the image is drawn."""
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("apple " * 120)
    set_number(page, "Steps", 1)
    warning = "longer than the 77 tokens that the model reads"
    for count, tab in enumerate(("Compare", "Tokens", "Sweep"), 1):
        start_short(page, tab, "balanced", "tomesd")
        expect(status_of(page, tab).get_by_text(warning)).to_be_visible()
        wait_for_end(page)
        expect(page.get_by_text(warning)).to_have_count(count)


def test_tokens_shows_what_was_merged_at_each_step(open_page):
    page = open_page()
    choose_preset(page, "paper")
    set_number(page, "Steps", 4)
    open_tab(page, "Tokens")
    page.locator("#tokens-start").click()
    status = page.locator("#tokens-status")
    expect(status).to_have_text("Step 1: 256 tokens merged to 154, 16 agents.")
    image = page.locator("#tokens-drawing img")
    first = image.get_attribute("src")
    set_number(page, "Step", 4)
    expect(status).to_have_text("Step 4: 256 tokens merged to 154, no agents (token merging only).")
    expect(image).not_to_have_attribute("src", first)
    expect(image).to_have_js_property("naturalWidth", 768)


def test_tokens_says_why_there_are_none(open_page):
    """With the preset that the page starts with, and an image that is too small for it."""
    page = open_page()
    set_number(page, "Steps", 8)
    open_tab(page, "Tokens")
    page.locator("#tokens-start").click()
    expect(page.locator("#tokens-status")).to_contain_text("no layer of this image has more than 256 tokens")
    expect(page.locator("#tokens-drawing img")).to_have_js_property("naturalWidth", 128)


@pytest.mark.parametrize("width", [1280, 390])
def test_sweep_compares_methods(open_page, width):
    page = open_page(width, height=3000)  # images are loaded where they can be seen
    set_number(page, "Steps", 8)
    open_tab(page, "Sweep")
    methods = page.locator("#sweep-methods")
    for name, is_checked in {"balanced": True, "fast": True, "tomesd": True, "agentsd": True, "todo": False}.items():
        expect(methods.get_by_label(name, exact=True)).to_be_checked(checked=is_checked)
    choose_methods(page, "balanced", "agentsd")
    page.get_by_label("Ratios").fill("0.3, 0.6")
    page.locator("#sweep-start").click()
    numbers = table(page, "sweep-numbers")
    names = ["balanced", "agentsd 0.3", "agentsd 0.6"]  # a preset that merges keys has a ratio of its own
    assert list(numbers) == ["method", "baseline", *names]
    assert numbers["method"][0] == "total (timed once)"
    assert numbers["baseline"][1:] == ["", "", ""]
    assert all(re.fullmatch(r"\d+\.\d\d×, timed once", numbers[name][1]) for name in names)
    assert number(numbers["agentsd 0.6"][2]) < number(numbers["agentsd 0.3"][2]) < 60
    gallery = page.locator("#sweep-gallery")
    for name in names:
        expect(gallery.get_by_text(re.compile(rf"{name}: .*×, timed once, .*dB"))).to_be_visible()
    # All images in full, without scrolling inside their box, and so are their captions.
    page.wait_for_function(
        """() => {
            const gallery = document.querySelector('#sweep-gallery');
            const box = gallery.getBoundingClientRect();
            const images = [...gallery.querySelectorAll('img')].filter(image => image.naturalWidth === 128);
            return images.length === 4
                && images.every(image => {
                    const shown = image.getBoundingClientRect();
                    return Math.min(shown.width, shown.height) > 100 && shown.top >= box.top
                        && shown.bottom <= box.bottom && shown.left >= box.left && shown.right <= box.right;
                })
                && [gallery, ...gallery.querySelectorAll('*')].every(part =>
                    getComputedStyle(part).overflowY === 'visible' || part.scrollHeight <= part.clientHeight + 1)
                && [...gallery.querySelectorAll('.caption-label')].every(part => part.scrollWidth <= part.clientWidth);
        }""",
        polling=POLLING,
    )
    page.wait_for_function("document.querySelector('#sweep-plot img')?.naturalWidth > 500", polling=POLLING)
    page.get_by_label("Ratios").fill("0.3; 0.6")
    page.locator("#sweep-start").click()
    expect(page.get_by_text("must be numbers separated by commas")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_each_tab_shows_the_controls_that_it_uses(open_page, width):
    page = open_page(width)
    set_number(page, "Steps", 7)
    page.get_by_role("button", name="Token merging").click()
    set_number(page, "Ratio", 0.7)
    page.get_by_label("Prompt", exact=True).fill("a red heart")
    image = [
        "Prompt",
        "Negative prompt",
        "Model",
        "Seed",
        "number input for Steps",
        "number input for Height in pixels",
    ]
    patch = ["number input for Ratio", "number input for Agent phase"]
    for name, has_image, has_patch in (
        ("Sweep", True, False),
        ("Benchmark", False, False),
        ("Tokens", True, True),
        ("Benchmark", False, False),
        ("Compare", True, True),
    ):
        open_tab(page, name)
        expect(page.locator("#preset")).to_be_visible(visible=has_patch)
        for labels, is_shown in ((image, has_image), (patch, has_patch)):
            for label in labels:
                expect(page.get_by_label(label, exact=True)).to_be_visible(visible=is_shown)
    expect(page.get_by_label("number input for Steps", exact=True)).to_have_value("7")
    expect(page.get_by_label("number input for Ratio", exact=True)).to_have_value("0.7")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red heart")


def test_a_preset_comes_first_and_shows_what_it_sets(open_page):
    """What is shown is what runs; what is changed then is no preset any more."""
    page = open_page()
    preset = page.locator("#preset")
    expect(preset.get_by_label("balanced", exact=True)).to_be_checked()
    for name in ("Ratio", "Interval"):
        expect(page.get_by_label(f"number input for {name}", exact=True)).to_be_hidden()
    choose_preset(page, "fast")
    for name in ("Token merging", "Feature reuse"):
        page.get_by_role("button", name=name).click()
    shown = {"Ratio": "0.9", "Agent phase": "0", "Smallest layer": "2048", "Interval": "3", "Branch": "0"}
    for name, value in shown.items():
        expect(page.get_by_label(f"number input for {name}", exact=True)).to_have_value(value)
    expect(preset).to_contain_text("A tenth of the keys in large layers")
    set_number(page, "Ratio", 0.2)
    expect(preset.get_by_label("custom", exact=True)).to_be_checked()
    expect(page.get_by_label("number input for Interval", exact=True)).to_have_value("3")
    set_number(page, "Ratio", 0.9)
    expect(preset.get_by_label("fast", exact=True)).to_be_checked()
    page.get_by_label("Also merge in cross-attention").check()
    expect(preset.get_by_label("custom", exact=True)).to_be_checked()


def test_what_is_chosen_while_an_answer_is_on_its_way_is_not_dropped(open_page):
    page = open_page()
    waiting = []
    page.route("**/run/predict", lambda route: waiting.append(route))
    preset = page.locator("#preset")
    for name in ("fast", "paper"):
        preset.get_by_label(name, exact=True).check()
    page.wait_for_timeout(500)
    page.route("**/run/predict", lambda route: route.continue_())  # what is asked from now on
    # In whatever order a server answers what it was asked at once.
    for route in reversed(waiting):
        with page.expect_response("**/run/predict"):
            route.continue_()
    expect(preset).to_contain_text(PRESET_INFO["paper"])
    page.get_by_role("button", name="Token merging").click()
    expect(page.get_by_label("number input for Ratio", exact=True)).to_have_value("0.4")


def test_compare_runs_the_preset_that_is_chosen(open_page):
    """Nobody has opened what is folded away."""
    page = open_page()
    choose_preset(page, "fast")
    set_number(page, "Steps", 8)
    numbers = compare(page)
    assert 10 < number(numbers["PSNR"][1]) < 60
    page.get_by_text("What was patched").click()
    expect(page.locator("#compare-report")).to_contain_text("1 step of 3 runs the whole UNet")
    expect(page.locator("#compare-report")).to_contain_text("fewer than `min_tokens=2048`")
    expect(page.get_by_text("Feature reuse is off")).to_have_count(0)


def test_too_few_steps_for_feature_reuse_are_a_warning_in_every_tab(open_page):
    page = open_page()
    set_number(page, "Steps", 2)
    for tab in ("Compare", "Tokens", "Sweep"):
        start_short(page, tab, "balanced", "fast")
        status = status_of(page, tab)
        expect(status).to_contain_text("Warning: Feature reuse is off in runs of fewer than 8 steps; this one has 2.")
        assert status.inner_text().count("Feature reuse") == 1
        wait_for_end(page)


def test_benchmark_shows_recorded_and_uploaded_results(open_page, tmp_path):
    page = open_page()
    open_tab(page, "Benchmark")
    asked = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/run/predict") else None)
    for place, folder in enumerate(RECORDED):
        page.get_by_label("Recorded results").click()
        page.get_by_role("option").nth(place).click()
        expect(page.locator("#benchmark-table")).to_contain_text(load_result(folder).title)
        expect(page.locator("#benchmark-table tr")).to_have_count(len(load_result(folder).rows) + 1)
        # Nothing is cut off.
        page.wait_for_function(
            """() => {
                const box = document.querySelector('#benchmark-table');
                return box.querySelector('table').scrollWidth <= box.clientWidth;
            }""",
            polling=POLLING,
        )
        if any(folder.glob("*-s*-*.png")):
            expect(page.locator("#benchmark-plots img").first).to_be_visible()
    assert len(asked) == len(RECORDED)  # a second answer to a choice could come after that to the next one
    upload = page.locator("#benchmark-upload input[type=file]")
    (tmp_path / "cases.jsonl").write_text("")
    upload.set_input_files(tmp_path)
    expect(page.get_by_text("settings.json cannot be read")).to_be_visible()


def test_what_is_out_of_range_is_a_message(open_page):
    page = open_page()
    set_number(page, "Height in pixels", 68)
    page.locator("#compare-start").click()
    expect(page.get_by_text("multiples of 8")).to_be_visible()
    assert "Traceback" not in page.content()


def test_new_seeds_are_rolled(open_page):
    page = open_page()
    page.get_by_role("button", name="New seed").click()
    expect(page.get_by_label("Seed", exact=True)).not_to_have_value("0")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_comes_from_elsewhere_and_all_fits(open_page, address, width, theme):
    page = open_page(width, query=f"?__theme={theme}")
    for name in ("Compare", "Tokens", "Sweep", "Benchmark"):
        open_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    assert [url for url in page.seen if not url.startswith((address, "data:", "blob:"))] == []
