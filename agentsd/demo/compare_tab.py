"""The tab that compares: the same image without agentsd and with it."""

from typing import Any

import gradio as gr

from ..utils.progress import Progress
from .engine import Engine
from .inputs import config_of, request_of
from .tab_parts import GenerationButtons, markdown_table, with_warnings


# The slider has no option for what its images are called.
_DESCRIBE_IMAGES = """() => {
    const texts = ["The image without agentsd", "The image with agentsd"];
    document.querySelectorAll("#compare-slider img").forEach((image, index) => { image.alt = texts[index % 2]; });
}"""


def compare_tab(engine: Engine, image: list[Any], patch: list[Any]) -> None:
    """Fill the tab; it uses the controls of the image and of the patch."""
    longest = engine.limits.seconds
    seconds = gr.Slider(
        0,
        longest,
        value=longest,
        step=1,
        label="Seconds of timing",
        info="Both are timed in turn until a difference is clear, at most this long; 0 times each once",
        elem_id="compare-seconds",
    )
    buttons = GenerationButtons(engine, "compare", "Compare")
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

    def run(session: str, progress: Progress, *values: Any) -> list[Any]:
        *of_image_and_patch, longest = values
        request = request_of(of_image_and_patch[: len(image)])
        config = config_of(of_image_and_patch[len(image) :], engine.device)
        comparison = engine.compare(session, request, config, longest, progress)
        rows = comparison.rows()
        per_step = rows[1]
        return [
            with_warnings(f"Speed-up per step: {per_step[-1]}. {comparison.timing}", comparison.warnings),
            (comparison.baseline, comparison.agentsd),
            markdown_table(rows),
            gr.update(value=comparison.difference, label=f"Difference, {comparison.difference_scale} times as bright"),
            f"```text\n{comparison.report}\n```",
        ]

    running = buttons.on_start(run, [*image, *patch, seconds], [slider, numbers, difference, table], slider)
    running.then(js=_DESCRIBE_IMAGES)
