"""The tab that draws one image by several methods at several ratios."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from ..bench.plots import plot_quality
from ..bench.rows import Row
from ..utils.images import opened
from ..utils.metrics import decibels, similarity
from .engine import SWEEP_METHODS, Engine, SweepRun
from .events import buttons, on_start
from .inputs import wish_of
from .queue import Progress, Stopped
from .requests import Wish
from .texts import gain, markdown_table, seconds


def sweep_tab(engine: Engine, asked: list[Any]) -> None:
    """
    Fill the tab.

    Args:
        engine (`Engine`): What generates.
        asked (`list[Component]`): From `prompt_inputs` and `image_inputs`.
    """
    gr.Markdown("One image drawn with several methods, each timed once. For reliable numbers, run `agentsd bench`.")
    methods = gr.CheckboxGroup(
        list(SWEEP_METHODS), value=["tomesd", "agentsd"], label="Methods", elem_id="sweep-methods"
    )
    ratios = gr.Textbox(
        "0.2, 0.4, 0.6",
        label="Ratios",
        info="From 0 to below 1, separated by commas",
        max_length=200,
        elem_id="sweep-ratios",
    )
    gr.Examples(
        [[["tomesd", "agentsd"], "0.2, 0.4, 0.6"], [["agentsd-agent", "agentsd-tome", "agentsd"], "0.4"]],
        [methods, ratios],
        label="Examples",
        api_visibility="private",
    )
    start, status = buttons(engine, "Sweep", "sweep")
    gallery = gr.Gallery(
        label="Images",
        columns=3,
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        elem_id="sweep-gallery",
    )
    numbers = gr.Markdown("", elem_classes=["numbers"], elem_id="sweep-numbers")
    plot = gr.Image(
        label="Quality against speed",
        show_label=False,
        interactive=False,
        elem_id="sweep-plot",
        alt_text="A plot of each run: structural similarity to the image without any method, against its speed-up",
    )

    def run(visitor: str, progress: Progress, *values: Any) -> list[Any]:
        *wished, names, text = values
        wish = wish_of(wished)
        try:
            runs = engine.sweep(visitor, wish, names, _ratios_of(text), progress)
        except Stopped:
            return ["Stopped.", *[gr.skip()] * 3]
        for warning in [warning for each in runs if each.run is not None for warning in each.run.warnings]:
            gr.Warning(warning)
        images = [(each.run.image, _caption(each)) for each in runs if each.run is not None]
        missing = [f"{each.name} did not run: {each.reason}." for each in runs if each.reason]
        return [" ".join(missing) or f"{len(runs)} runs.", images, _sweep_numbers(runs), _sweep_plot(runs, wish)]

    on_start(start, run, [*asked, methods, ratios], [status, gallery, numbers, plot], gallery, "sweep")


def _ratios_of(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"Ratios must be numbers separated by commas, such as 0.2, 0.4, but got {text!r}.") from None


def _caption(each: SweepRun) -> str:
    if each.method == "baseline" or each.speed_up is None:
        return each.name
    return f"{each.name}: {each.speed_up:.2f}×, {decibels(each.psnr)}"


def _sweep_numbers(runs: Sequence[SweepRun]) -> str:
    lines: list[tuple[str, ...]] = [("method", "per step", "speed-up", "PSNR", "SSIM")]
    for each in runs:
        if each.run is not None and each.speed_up is not None:
            judged = ("", "") if each.method == "baseline" else (decibels(each.psnr), similarity(each.ssim))
            name = f"{each.name} (cached)" if each.is_cached else each.name
            lines.append((name, seconds(each.run.time.seconds_per_step), gain(each.speed_up), *judged))
    return markdown_table(lines)


def _sweep_plot(runs: Sequence[SweepRun], wish: Wish) -> PIL.Image.Image:
    rows = [
        Row(
            wish.model,
            each.method,
            each.ratio,
            wish.height,
            wish.width,
            of_baseline=None if each.speed_up is None else [each.speed_up],
            quality={"ssim": [each.ssim]},
        )
        for each in runs
        if each.speed_up is not None and each.ssim is not None and math.isfinite(each.ssim)
    ]
    with tempfile.TemporaryDirectory() as folder:
        return opened(plot_quality(rows, Path(folder) / "plot.png"))
