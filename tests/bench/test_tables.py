"""Tables of documents are those of recorded results."""

import json

import pytest
import torch

from agentsd.bench import BenchError, BenchSettings
from agentsd.bench.store import RunFolder
from agentsd.bench.tables import fill_tables, main
from agentsd.utils.environment import environment


def record_baseline(path):
    folder = RunFolder(path, BenchSettings.of_suite("cpu").to_dict(), environment("cpu", torch.float32))
    case = {"model": "sd15", "method": "baseline", "ratio": None, "height": 768, "width": 768, "batch": 1}
    folder.cases.append({**case, "rounds": 5, "seconds": 50.0, "q1": 49.0, "q3": 51.0, "of_baseline": [1.0]})


def test_tables_of_a_document_are_made_from_results(tmp_path):
    record_baseline(tmp_path / "results")
    document = tmp_path / "README.md"
    document.write_text("Before.\n<!-- results: results -->\nold\n<!-- /results -->\nAfter.\n")
    text = fill_tables(document)
    assert "| 768×768 | baseline |" in text
    assert "old" not in text
    assert text.startswith("Before.\n<!-- results: results -->\n")
    assert text.endswith("<!-- /results -->\nAfter.\n")
    document.write_text(text)
    assert fill_tables(document) == text
    document.write_text(text.replace("results: results", "results: results without quartiles, peak memory"))
    narrow = fill_tables(document)
    assert "| size | method | median | speed-up |" in narrow
    assert "- median: seconds per UNet call" in narrow
    document.write_text(text.replace("results: results", "results: results without FOD"))
    with pytest.raises(BenchError, match="no column 'FOD'"):
        fill_tables(document)


def test_results_of_several_machines(tmp_path):
    """Whoever sends in a folder needs to change no document by hand."""
    for name, cpu in {"b": "Slow CPU", "a": "Fast CPU"}.items():
        record_baseline(tmp_path / "machines" / name)
        file = tmp_path / "machines" / name / "environment.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "cpu": cpu, "threads": 2}))
    (tmp_path / "machines" / "unfinished").mkdir()
    document = tmp_path / "README.md"
    document.write_text("<!-- results: machines/* without quartiles -->\nold\n<!-- /results -->\n")
    text = fill_tables(document)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["### Fast CPU, 2 threads", "### Slow CPU, 2 threads"]
    assert text.count("| 768×768 | baseline |") == 2
    document.write_text(text)
    assert fill_tables(document) == text


def test_documents_without_a_table_are_left_alone(tmp_path, capsys):
    """As long as one of those that are named has one."""
    record_baseline(tmp_path / "results")
    with_table, without = tmp_path / "README.md", tmp_path / "INSTALL.md"
    with_table.write_text("<!-- results: results -->\nold\n<!-- /results -->\n")
    without.write_text("No table.")
    main([str(without), str(with_table)])
    assert "| 768×768 | baseline |" in with_table.read_text()
    assert without.read_text() == "No table."
    assert capsys.readouterr().out.split() == [str(with_table)]
    with pytest.raises(SystemExit, match="No results table"):
        main([str(without)])
