"""The notebooks run on the embedded model and on the recorded results, and are committed with what they print."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert [file.stem for file in NOTEBOOKS] == ["01_quickstart", "02_how_it_works", "03_speed_and_quality"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(file):
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": file.parent}}).execute()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_has_its_outputs_and_is_small(file):
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(output.output_type in ("display_data", "execute_result") for cell in cells for output in cell.outputs)
    assert file.stat().st_size < 1_500_000
    assert not re.search(r"site-packages|Traceback|/home/|/root/", file.read_text(encoding="utf-8"))
