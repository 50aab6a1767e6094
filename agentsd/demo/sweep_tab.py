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
from ..utils.progress import Progress
from .engine import SWEEP_METHODS, Engine, SweepRun
from .inputs import request_of
from .requests import ImageRequest
from .tab_parts import GenerationButtons, markdown_table, with_warnings


_METHODS = ["balanced", "fast", "tomesd", "agentsd"]


def sweep_tab(engine: Engine, image: list[Any]) -> None:
    """Fill the tab; it uses the controls of the image."""
    gr.Markdown(
        "One image drawn with several methods. Each is timed once, so small differences mean nothing: for reliable "
        "numbers, run `agentsd bench`."
    )
    methods = gr.CheckboxGroup(list(SWEEP_METHODS), value=_METHODS, label="Methods", elem_id="sweep-methods")
    ratios = gr.Textbox(
        "0.4",
        label="Ratios",
        info="From 0 to below 1, separated by commas, for the methods that merge tokens",
        max_length=200,
        elem_id="sweep-ratios",
    )
    gr.Examples(
        [[_METHODS, "0.4"], [["tomesd", "agentsd"], "0.2, 0.4, 0.6"], [["reuse-2", "reuse-3", "deepcache"], ""]],
        [methods, ratios],
        label="Examples",
        api_visibility="private",
    )
    buttons = GenerationButtons(engine, "sweep", "Sweep")
    gallery = gr.Gallery(
        label="Images",
        columns=3,
        height="max-content",
        object_fit="contain",
        format="png",
        interactive=False,
        elem_id="sweep-gallery",
        elem_classes=["captioned"],
    )
    numbers = gr.Markdown("", elem_classes=["numbers"], elem_id="sweep-numbers")
    plot = gr.Image(
        label="Fidelity against speed",
        show_label=False,
        interactive=False,
        elem_id="sweep-plot",
        elem_classes=["plot"],
        alt_text="A plot of each run: PSNR to the baseline's image, against its speed-up, timed once",
    )

    def run(session: str, progress: Progress, *values: Any) -> list[Any]:
        *of_image, names, text = values
        request = request_of(of_image)
        runs = engine.sweep(session, request, names, _ratios_of(text), progress)
        images = [(each.run.image, _caption(each)) for each in runs if each.run is not None]
        missing = [f"{each.name} did not run: {each.reason}." for each in runs if each.reason]
        warnings = [warning for each in runs if each.run is not None for warning in each.run.warnings]
        status = with_warnings(" ".join(missing) or f"{len(runs)} runs.", warnings)
        return [status, images, _numbers(runs), _plot(runs, request)]

    buttons.on_start(run, [*image, methods, ratios], [gallery, numbers, plot], gallery)


def _ratios_of(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"Ratios must be numbers separated by commas, such as 0.2, 0.4, but got {text!r}.") from None


def _caption(each: SweepRun) -> str:
    if each.method == "baseline" or each.speed_up is None:
        return each.name
    return f"{each.name}: {each.speed_up}, {decibels(each.psnr)}".replace(" dB", "\N{NO-BREAK SPACE}dB")


def _numbers(runs: Sequence[SweepRun]) -> str:
    lines: list[tuple[str, ...]] = [("method", "total (timed once)", "speed-up", "PSNR", "SSIM")]
    for each in runs:
        if each.run is not None and each.speed_up is not None:
            judged = ("", "", "")
            if each.method != "baseline":
                judged = (str(each.speed_up), decibels(each.psnr), similarity(each.ssim))
            lines.append((each.name, f"{each.run.time.total:.3f} s", *judged))
    return markdown_table(lines)


def _plot(runs: Sequence[SweepRun], request: ImageRequest) -> PIL.Image.Image | None:
    # An image that is the baseline's own has no distance from it, and none of them may be left.
    rows = [
        Row(
            request.model,
            each.method,
            each.ratio,
            request.height,
            request.width,
            rounds=1,
            of_baseline=None if each.speed_up is None else [each.speed_up.value],
            quality={"psnr": [each.psnr]},
        )
        for each in runs
        if each.speed_up is not None and each.psnr is not None and math.isfinite(each.psnr)
    ]
    if not rows:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return opened(plot_quality(rows, Path(folder) / "plot.png"))
