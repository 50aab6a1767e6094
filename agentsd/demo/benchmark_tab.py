"""The tab that shows recorded benchmarks."""

import functools
import html
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from ..bench import BenchError, load_result
from ..bench.plots import save_plots
from ..utils.images import opened
from .tab_parts import with_messages


_FILES = ("settings.json", "environment.json", "cases.jsonl")
# The page is not wide enough for these columns; they are in the reports.
_LEFT_OUT = (
    *("quartiles", "s/step", "step quartiles", "step speed-up", "launches/step"),
    *("Δ FID", "Δ KID", "Δ CLIP score"),
)
_MOST_BYTES = 2**20
_MOST_ROWS = 500
_MOST_MODELS = 8
# One at a time, since plots take time that somebody else's run would miss.
_drawing = threading.Lock()


def benchmark_tab(recorded: dict[str, Path]) -> None:
    """Fill the tab with folders of results, by what to call them."""
    gr.Markdown("Results of `agentsd bench --out FOLDER`.")
    choice = gr.Dropdown(
        list(recorded), value=None, label="Recorded results", visible=bool(recorded), elem_id="benchmark-choice"
    )
    upload = gr.File(
        label="Or a results folder from your machine",
        file_count="directory",
        type="filepath",
        height=140,
        elem_id="benchmark-upload",
    )
    table = gr.Markdown("", elem_classes=["numbers", "results"], elem_id="benchmark-table")
    plots = gr.Gallery(
        label="Plots",
        columns=2,
        fit_columns=False,
        height="max-content",
        object_fit="contain",
        format="png",
        interactive=False,
        elem_id="benchmark-plots",
        elem_classes=["captioned", "plots"],
    )

    @_or_message
    def show_recorded(name: str | None) -> tuple[str, list[tuple[PIL.Image.Image, str]]]:
        # A name, never a path: what a page sends cannot lead anywhere else.
        return _result_shown(recorded[name], recorded[name] / "images") if name in recorded else ("", [])

    @_or_message
    def show_uploaded(files: list[str] | None) -> tuple[str, list[tuple[PIL.Image.Image, str]]]:
        if not files:
            return "", []
        wanted = {Path(file).name: Path(file) for file in files if Path(file).name in _FILES}
        if sum(file.stat().st_size for file in wanted.values()) > _MOST_BYTES:
            raise ValueError("These results are too large to show here: the limit is 1 MB.")
        with tempfile.TemporaryDirectory() as folder:
            for name, file in wanted.items():
                shutil.copy(file, Path(folder) / name)
            # Their images are not looked for: an upload must not name files of this machine.
            return _result_shown(Path(folder), None)

    # Past Gradio's queue: a choice made in the very moment in which the one before ends would be dropped there.
    common = {"queue": False, "api_visibility": "private"}
    # One that is made before that is answered after it. A dropdown tells of each choice twice as `input`, and the
    # second answer could take the place of a later choice's.
    choice.change(show_recorded, [choice], [table, plots], trigger_mode="always_last", **common)
    upload.change(show_uploaded, [upload], [table, plots], **common)


def _or_message(show: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a table, what went wrong: of events past its queue Gradio shows no error."""
    show = with_messages(show)

    @functools.wraps(show)
    def call(*args: Any) -> Any:
        try:
            return show(*args)
        except gr.Error as error:
            # It may repeat a name from the file, which must not become part of the page.
            return f"**Error:** {html.escape(error.message, quote=False)}", []

    return call


def _result_shown(folder: Path, images: Path | None) -> tuple[str, list[tuple[PIL.Image.Image, str]]]:
    """The table, and the plots drawn anew from the rows: no file of the folder itself is sent."""
    try:
        result = load_result(folder)
    except BenchError as error:
        # A page does not learn where it lies.
        raise ValueError(str(error).replace(f"{folder}/", "").replace(str(folder), "This")) from error
    if len(result.rows) > _MOST_ROWS or len({row.model for row in result.rows}) > _MOST_MODELS:
        raise ValueError(f"Results of at most {_MOST_ROWS} rows and {_MOST_MODELS} models can be shown here.")
    with _drawing, tempfile.TemporaryDirectory() as scratch:
        files = save_plots(result.rows, Path(scratch), images)
        return _broken_lines(result.to_markdown(without=_LEFT_OUT)), [(opened(file), file.stem) for file in files]


def _broken_lines(text: str) -> str:
    """Break the cells of tables before their intervals."""
    lines = text.splitlines()
    return "\n".join(line.replace(" (", "<br>(") if line.startswith("|") else line for line in lines)
