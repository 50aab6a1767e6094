"""The tab that shows recorded benchmarks."""

import shutil
import tempfile
from pathlib import Path

import gradio as gr
import PIL.Image

from ..bench import load_result
from ..bench.plots import save_plots
from ..pictures import opened
from .events import answered


def benchmark_tab(recorded: dict[str, Path]) -> None:
    """
    Fill the tab.

    Args:
        recorded (`dict[str, Path]`): Folders of results, by what to call them.
    """
    gr.Markdown("Results of `agentsd bench --out FOLDER`.")
    choice = gr.Dropdown(
        list(recorded), value=None, label="Recorded results", visible=bool(recorded), elem_id="benchmark-choice"
    )
    upload = gr.File(
        label="Or a folder of results from your machine",
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
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        elem_id="benchmark-plots",
    )

    @answered
    def show_recorded(name: str | None) -> tuple[str, list[tuple[PIL.Image.Image, str]]]:
        # A name, never a path: what visitors send cannot lead anywhere else.
        return _result_shown(recorded[name]) if name in recorded else ("", [])

    @answered
    def show_uploaded(files: list[str] | None) -> tuple[str, list[tuple[PIL.Image.Image, str]]]:
        if not files:
            return "", []
        with tempfile.TemporaryDirectory() as folder:
            for file in files:
                if Path(file).suffix in (".json", ".jsonl"):
                    shutil.copy(file, Path(folder) / Path(file).name)
            return _result_shown(Path(folder))

    choice.input(show_recorded, [choice], [table, plots], api_visibility="private")
    upload.change(show_uploaded, [upload], [table, plots], api_visibility="private")


def _result_shown(folder: Path) -> tuple[str, list[tuple[PIL.Image.Image, str]]]:
    """The table, and the plots drawn anew from the rows: no file of the folder itself is sent."""
    result = load_result(folder)
    with tempfile.TemporaryDirectory() as scratch:
        files = save_plots(result, Path(scratch), folder / "images")
        return result.to_markdown(), [(opened(file), file.stem) for file in files]
