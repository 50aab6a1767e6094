"""The folder of a run: nothing is mixed, lost or taken for what it is not."""

import pytest

from agentsd.bench import BenchError
from agentsd.bench.store import Log, RunFolder


def test_images_without_a_log_are_never_taken_for_those_of_this_run(tmp_path):
    """Their seeds, prompts and method are not known any more."""
    (tmp_path / "images" / "tiny-64x64-batch1" / "baseline").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(BenchError, match=r"images holds images, but no log"):
            RunFolder(tmp_path, {}, {}, resume=resume)


def test_a_log_that_cannot_be_read(tmp_path):
    RunFolder(tmp_path, {}, {}).cases.append({"method": "baseline"})
    (tmp_path / "cases.jsonl").write_text('{"method": "baseline"}\nnonsense\n')
    with pytest.raises(BenchError, match=r"Line 2 of .*cases\.jsonl"):
        RunFolder(tmp_path, {}, {}, resume=True)
    (tmp_path / "cases.jsonl").write_text('{"method": "baseline"}\n["baseline"]\n')
    with pytest.raises(BenchError, match=r"Line 2 of .*cases\.jsonl cannot be read \(it is not a JSON object\)"):
        RunFolder(tmp_path, {}, {}, resume=True)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(BenchError, match=r"settings\.json cannot be read \(it is not a JSON object\)"):
        RunFolder(tmp_path, {}, {}, resume=True)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(BenchError, match=r"settings\.json cannot be read"):
        RunFolder(tmp_path, {}, {}, resume=True)


def test_a_line_cut_off_in_writing_is_measured_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert Log(path).records == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n'


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match=r"Cannot write to .*Name another folder"):
        RunFolder(tmp_path / "file" / "below", {}, {})
