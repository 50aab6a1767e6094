"""The tab that compares: the same image without agentsd and with it."""

from typing import Any

import gradio as gr

from ..compare import Comparison
from ..utils.metrics import decibels, similarity
from .engine import Engine
from .events import buttons, on_start
from .inputs import config_of, wish_of
from .queue import Progress, Stopped
from .texts import gain, markdown_table, seconds


# The slider has no option for what its images are called.
_DESCRIBE_IMAGES = """() => {
    const texts = ["The image without agentsd", "The image with agentsd"];
    document.querySelectorAll("#compare-slider img").forEach((image, index) => { image.alt = texts[index % 2]; });
}"""


def compare_tab(engine: Engine, asked: list[Any], patch: list[Any]) -> None:
    """
    Fill the tab.

    Args:
        engine (`Engine`): What generates.
        asked (`list[Component]`): From `prompt_inputs` and `image_inputs`.
        patch (`list[Component]`): From `patch_inputs`.
    """
    start, status = buttons(engine, "Compare", "compare")
    slider = gr.ImageSlider(
        label="Without agentsd (left) and with it (right)",
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="compare-slider",
    )
    numbers = gr.Markdown("", elem_classes=["numbers"], elem_id="compare-numbers")
    difference = gr.Image(
        label="Difference",
        type="pil",
        format="png",
        interactive=False,
        elem_id="compare-difference",
        alt_text="Where the two images differ: black where they agree, brighter where they differ more",
    )
    with gr.Accordion("What was patched", open=False):
        table = gr.Markdown("", elem_classes=["report"], elem_id="compare-report")

    def run(visitor: str, progress: Progress, *values: Any) -> list[Any]:
        wish, config = wish_of(values[: len(asked)]), config_of(values[len(asked) :])
        try:
            comparison, is_cached = engine.compare(visitor, wish, config, progress)
        except Stopped:
            return ["Stopped. Any images below are from the previous run.", *[gr.skip()] * 4]
        for warning in comparison.warnings:
            gr.Warning(warning)
        return [
            _summary(comparison, is_cached),
            (comparison.baseline, comparison.agentsd),
            _numbers(comparison, is_cached),
            gr.update(value=comparison.difference, label=f"Difference, {comparison.difference_scale} times as bright"),
            f"```text\n{comparison.report}\n```",
        ]

    outputs = [status, slider, numbers, difference, table]
    on_start(start, run, [*asked, *patch], outputs, slider, "compare").then(js=_DESCRIBE_IMAGES)


def _summary(comparison: Comparison, is_cached: bool) -> str:
    earlier = " The time without agentsd is from an earlier run." if is_cached else ""
    return f"Speed-up per step: {gain(comparison.speed_up)}.{earlier}"


def _numbers(comparison: Comparison, is_cached: bool) -> str:
    plain, patched = comparison.baseline_run, comparison.agentsd_run
    steps = (seconds(run.time.seconds_per_step) for run in (plain, patched))
    totals = (seconds(run.time.total) for run in (plain, patched))
    return markdown_table(
        [
            ("", "without (cached)" if is_cached else "without", "with agentsd", "speed-up"),
            ("per step", *steps, gain(comparison.speed_up)),
            ("total", *totals, gain(comparison.total_speed_up)),
            ("peak memory", plain.peak, patched.peak, ""),
            ("PSNR", "", decibels(comparison.psnr), ""),
            ("SSIM", "", similarity(comparison.ssim), ""),
        ]
    )
