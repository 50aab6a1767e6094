"""The web page: compare, see what is merged, sweep over methods, look at benchmarks. Needs the extra `demo`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..bench import load_result
from .benchmark_tab import benchmark_tab
from .compare_tab import compare_tab
from .engine import Engine
from .events import forget_on_leaving
from .inputs import image_inputs, patch_inputs, prompt_inputs
from .sweep_tab import sweep_tab
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
.report { overflow-x: auto; }
.report pre { white-space: pre; }
/* On a narrow screen the images come before what is seldom changed. */
@media (max-width: 768px) {
  .settings { order: 1; }
  .numbers th, .numbers td { font-size: 0.85em; padding: 0.4em; }
}
"""


def build_demo(engine: Engine, results: Sequence[str | Path] = ()) -> gr.Blocks:
    """
    Build the web page.

    Args:
        engine (`Engine`): What generates.
        results (`Sequence[str | Path]`): Folders of benchmark results that visitors may look at.

    Returns:
        `gradio.Blocks`: The page; [`launch_demo`] serves it.

    Raises:
        BenchError: If a folder has no results.

    Examples:

    ```python
    >>> from agentsd.demo import build_demo
    >>> from agentsd.demo.engine import Engine
    >>> build_demo(Engine()).title
    'agentsd'
    ```
    """
    recorded: dict[str, Path] = {}
    times: Counter[str] = Counter()
    for folder in map(Path, results):
        name = f"{folder.name}: {load_result(folder).title}"
        times[name] += 1
        # Numbered where they are the same: visitors do not learn where they lie.
        recorded[name if times[name] == 1 else f"{name} ({times[name]})"] = folder
    with gr.Blocks(title="agentsd", analytics_enabled=False, delete_cache=_DELETE_CACHE) as demo:
        gr.Markdown(
            "# agentsd\nStable Diffusion with agent attention: the same image with and without it, how long each "
            "takes, and what changes."
        )
        prompts = prompt_inputs(engine)
        with gr.Row():
            with gr.Column(scale=1, min_width=300, elem_classes=["settings"]):
                asked = [*prompts, *image_inputs(engine)]
                patch = patch_inputs()
            with gr.Column(scale=2, min_width=340), gr.Tabs():
                with gr.Tab("Compare"):
                    compare_tab(engine, asked, patch)
                with gr.Tab("Tokens"):
                    tokens_tab(engine, asked, patch)
                with gr.Tab("Sweep"):
                    sweep_tab(engine, asked)
                with gr.Tab("Benchmark"):
                    benchmark_tab(recorded)
        forget_on_leaving(demo, engine)
    # The engine has its own line, from which a generation can also be stopped while it waits.
    return demo.queue(max_size=4 * (engine.limits.waiting + 1), default_concurrency_limit=None, api_open=False)


def launch_demo(
    demo: gr.Blocks, host: str | None = None, port: int | None = None, share: bool = False, **options: Any
) -> Any:
    """
    Serve the web page.

    Args:
        demo (`gradio.Blocks`): From [`build_demo`].
        host (`str`, *optional*):
            Address to listen on; by default `GRADIO_SERVER_NAME` of the environment, or else only this machine.
        port (`int`, *optional*): Port; by default the first free one from 7860.
        share (`bool`, defaults to `False`): Open a public link through Gradio's servers.
        options: Passed to `gradio.Blocks.launch`.

    Returns:
        What `gradio.Blocks.launch` returns: the app, its local address and its public one.

    Raises:
        OSError: If the port is taken.

    Examples:

    ```python
    >>> from agentsd.demo import build_demo, launch_demo
    >>> from agentsd.demo.engine import Engine
    >>> demo = build_demo(Engine())
    >>> _, address, _ = launch_demo(demo, prevent_thread_lock=True, quiet=True)
    >>> address.startswith("http://127.0.0.1")
    True
    >>> demo.close(verbose=False)
    ```
    """
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
