"""The web page: compare, see what is merged, sweep over methods, look at benchmarks. Needs the extra `demo`."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ..bench import load_result
from .benchmark_tab import benchmark_tab
from .compare_tab import compare_tab
from .engine import Engine
from .inputs import image_inputs, patch_inputs, prompt_inputs
from .sweep_tab import sweep_tab
from .tab_parts import stop_on_leaving
from .tokens_tab import tokens_tab


# Uploaded results are text and small images.
_LARGEST_UPLOAD = "50mb"
# How often Gradio looks for files to delete, and how old they must be, in seconds.
_DELETE_CACHE = (3600, 3600)
# Only fonts that every system has: the page must work without a network.
_THEME = gr.themes.Default(
    font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "Menlo", "Consolas", "monospace")
)
_CSS = """
.numbers { overflow-x: auto; }
.numbers table { width: 100%; }
.numbers th, .numbers td { overflow-wrap: normal; text-align: right; white-space: nowrap; word-break: normal; }
.numbers th:first-child, .numbers td:first-child, .results th:nth-child(2), .results td:nth-child(2) {
  text-align: left;
}
.results th, .results td { font-size: 0.85em; padding: 0.4em; }
.results th { white-space: normal; }
.report { overflow-x: auto; }
.report pre { white-space: pre; }
/* Below the buttons, which would cover what is best. */
.plot img { padding-top: 2.2em; }
/* Captions below the images, in full. */
.captioned .gallery-item { height: auto; }
.captioned .thumbnail-lg { aspect-ratio: auto; height: auto; }
.captioned .thumbnail-lg > img { height: auto; }
.captioned .caption-label { border: 0; max-width: none; opacity: 1; position: static; white-space: normal; }
/* On a narrow screen the images come before what is seldom changed. */
@media (max-width: 768px) {
  .settings { order: 1; }
  .numbers th, .numbers td { font-size: 0.85em; padding: 0.4em; }
  .numbers:not(.results) th, .numbers:not(.results) td { white-space: normal; }
  .captioned .grid-container { --grid-cols: 2 !important; }
  .plots .grid-container { --grid-cols: 1 !important; }
}
"""


def build_demo(engine: Engine, results: Sequence[str | Path] = ()) -> gr.Blocks:
    """The web page, with folders of benchmark results to show; [`launch_demo`] serves it."""
    with gr.Blocks(title="agentsd", analytics_enabled=False, delete_cache=_DELETE_CACHE) as demo:
        gr.Markdown(
            "# agentsd\nStable Diffusion with agent attention and feature reuse: the same image with and without "
            "them, how long each takes, and what changes."
        )
        with gr.Column() as of_prompt:
            prompt = prompt_inputs(engine)
        with gr.Row():
            with gr.Column(scale=1, min_width=300, elem_classes=["settings"]) as of_image:
                with gr.Column() as of_patch:
                    patch = patch_inputs(engine)
                image = [*prompt, *image_inputs(engine)]
            with gr.Column(scale=2, min_width=340), gr.Tabs():
                for name, fill, draws, patches in (
                    ("Compare", partial(compare_tab, engine, image, patch), True, True),
                    ("Tokens", partial(tokens_tab, engine, image, patch), True, True),
                    ("Sweep", partial(sweep_tab, engine, image), True, False),
                    ("Benchmark", partial(benchmark_tab, _named_results(results)), False, False),
                ):
                    with gr.Tab(name) as tab:
                        fill()
                    # Each tab shows the controls that it uses. Past the queue, which may be full.
                    tab.select(
                        _visibility(draws, draws, patches),
                        outputs=[of_prompt, of_image, of_patch],
                        queue=False,
                        show_progress="hidden",
                        api_visibility="private",
                    )
        stop_on_leaving(demo, engine)
    return demo.queue(max_size=engine.limits.waiting, default_concurrency_limit=None, api_open=False)


def _visibility(*shown: bool) -> Callable[[], list[gr.Column]]:
    return lambda: [gr.Column(visible=is_shown) for is_shown in shown]


def _named_results(folders: Sequence[str | Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    times: Counter[str] = Counter()
    for folder in map(Path, folders):
        name = f"{folder.name}: {load_result(folder).title}"
        times[name] += 1
        # Numbered where they are the same: the page does not show where they lie.
        named[name if times[name] == 1 else f"{name} ({times[name]})"] = folder
    return named


def launch_demo(
    demo: gr.Blocks, host: str | None = None, port: int | None = None, share: bool = False, **options: Any
) -> Any:
    """Serve the page on this machine, unless `host` or `GRADIO_SERVER_NAME` says otherwise; see `gr.Blocks.launch`."""
    return demo.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=_THEME,
        css=_CSS,
        max_file_size=_LARGEST_UPLOAD,
        footer_links=["settings"],
        **options,
    )
