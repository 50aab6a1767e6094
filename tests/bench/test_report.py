"""Reports of a benchmark: the same numbers as table, Markdown, CSV, page and plots."""

import csv
import importlib.util
import io
import json
import re
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console

from agentsd.bench import BenchError, BenchSettings, load_result
from agentsd.bench.report import fewer_steps_psnr, result_of
from agentsd.bench.store import RunFolder
from agentsd.utils.environment import environment


@pytest.fixture
def facts():
    return environment("cpu", torch.float32)


def record(method, ratio=None, **values):
    shared = {"model": "sd15", "height": 768, "width": 768, "batch": 1}
    return {"method": method, "ratio": ratio, **shared, **values}


RECORDS = [
    record("tomesd", 0.4, height=512, width=512, reason="tomesd is not installed"),
    record("baseline", height=512, width=512, rounds=5, seconds=2.0, q1=1.9, q3=2.1, of_baseline=[1.0]),
    record("attention-free", rounds=5, seconds=28.0, q1=27.0, q3=29.0, of_baseline=[1.667]),
    record("baseline", rounds=5, seconds=50.0, q1=49.0, q3=51.0, of_baseline=[1.0]),
    record("tomesd", 0.4, rounds=5, seconds=37.5, q1=37.0, q3=38.0, of_baseline=[1.3333]),
    record(
        "agentsd-agent",
        0.4,
        rounds=5,
        seconds=31.234,
        q1=31.0,
        q3=31.987,
        of_baseline=[1.6, 1.55, 1.66],
        of_tomesd=[1.2, 1.14, 1.26],
        of_free=[0.96, 0.95, 0.98],
        peak_bytes=7 * 2**30,
    ),
]


def test_rows_are_sorted(facts):
    result = result_of(RECORDS, BenchSettings.of_suite("cpu").to_dict(), facts)
    assert [(row.height, row.method) for row in result.rows] == [
        (512, "baseline"),
        (512, "tomesd"),
        (768, "baseline"),
        (768, "agentsd-agent"),
        (768, "tomesd"),
        (768, "attention-free"),
    ]


def test_a_table_fits_a_terminal(facts):
    result = result_of(RECORDS, BenchSettings.of_suite("cpu").to_dict(), facts)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    for word in ("768×768", "agentsd-agent", "31.23 s", "31.00–31.99", "1.600", "0.960", "7.00 GiB", "not run"):
        assert word in text


def test_a_table_of_quality_fits_a_terminal(facts):
    quality = {
        "psnr": [21.5, 20.0, 23.0],
        "ssim": [0.81, 0.8, 0.82],
        "ms_ssim": [0.9, 0.89, 0.91],
        "clip": [80.0, 79.0, 81.0],
        "clip_change": [-0.5, -0.9, -0.1],
    }
    rows = [
        record("baseline", steps=20, rounds=5, seconds=2.0, q1=1.9, q3=2.1, step_seconds=0.1, of_baseline=[1.0]),
        record(
            "agentsd",
            0.4,
            steps=20,
            rounds=5,
            seconds=1.9,
            q1=1.8,
            q3=2.0,
            step_seconds=0.09,
            step_q1=0.08,
            step_q3=0.095,
            of_baseline=[1.05],
            step_of_baseline=[1.11, 1.1, 1.12],
            quality=quality,
            images=64,
        ),
    ]
    settings = {**BenchSettings.of_suite("quality").to_dict(), "models": ("sd15",)}
    result = result_of(rows, settings, facts)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result.table())
    assert "…" not in console.export_text()
    assert "21.5 (20.0–23.0)" in result.to_markdown()
    assert "| -0.50 (-0.90 to -0.10) |" in result.to_markdown()
    assert "| 1.050 | 0.090 | 0.080–0.095 | 1.110 (1.100–1.120) |" in result.to_markdown()
    assert "s/step, step quartiles, step speed-up: of a denoising step" in result.to_markdown()
    assert "1.11,1.1,1.12" in result.to_csv()
    assert "mean over 64 images" in result.to_markdown()
    without_features = result_of(rows, {**settings, "features": None, "reference": None}, facts)
    assert any(
        note.startswith("no FID, KID and CLIP score: for them, --features") for note in without_features.notes()
    )
    assert "95% intervals" in result.to_markdown()
    assert not any("95%" in note for note in result.notes(intervals=False)), "the terminal has no room for them"


CURVE = [(75, 1.3, 30.0), (50, 2.0, 24.0), (25, 3.8, 20.0)]


def with_curve(*rows):
    """The result of some rows beside the baseline with fewer steps."""
    fewer = [
        record(f"fewer-steps-{percent}%", steps=percent, of_baseline=[speed], quality={"psnr": [psnr]})
        for percent, speed, psnr in CURVE
    ]
    methods = [row["method"] for row in (*rows, *fewer)]
    settings = {**BenchSettings.of_suite("quality").to_dict(), "models": ("sd15",), "methods": methods}
    return result_of([*rows, *fewer], settings, environment("cpu", torch.float32))


def test_methods_are_compared_with_fewer_steps_in_the_same_time():
    """Against the formula: a line in time, not in speed."""
    result = with_curve(
        record("baseline", steps=100, of_baseline=[1.0]),
        record("reuse-2", steps=100, of_baseline=[1.6], quality={"psnr": [35.0, 34.0, 36.0]}),
        record("deepcache", steps=100, of_baseline=[2.0], quality={"psnr": [23.0]}),
        record("todo", steps=100, of_baseline=[1.1], quality={"psnr": [31.0]}),
        record("fast", steps=100, of_baseline=[5.0], quality={"psnr": [19.0]}),
    )
    part = (1 / 1.6 - 1 / 2.0) / (1 / 1.3 - 1 / 2.0)
    gains = {row.method: row.quality.get("psnr_gain") for row in result.rows}
    assert gains["reuse-2"] == [pytest.approx(35.0 - (24.0 + part * (30.0 - 24.0)))]
    assert gains["deepcache"] == [pytest.approx(-1.0)], "at a measured point, that point itself"
    assert not any(gains[name] for name in gains if name not in ("reuse-2", "deepcache")), "none beyond the curve"
    markdown = result.to_markdown()
    assert "| PSNR | vs fewer steps |" in markdown
    assert "| 23.0 | -1.0 |" in markdown
    assert "vs fewer steps: PSNR less that of the baseline with as many steps as fit" in markdown
    assert "fewer-steps-N%: baseline with N% of the steps." in markdown
    assert "psnr_gain" in result.to_csv().splitlines()[0]


def test_fewer_steps_of_another_size_are_no_comparison():
    result = with_curve(record("reuse-2", height=512, steps=100, of_baseline=[1.6], quality={"psnr": [35.0]}))
    assert "psnr_gain" not in result.rows[0].quality
    assert "vs fewer steps" not in result.to_markdown()


def test_the_curve_has_no_value_beyond_its_ends():
    curve = [(0.5, 24.0), (0.25, 20.0)]
    assert [fewer_steps_psnr(curve, share) for share in (0.2, 0.25, 0.375, 0.5, 0.51)] == [
        None,
        20.0,
        22.0,
        24.0,
        None,
    ]
    assert fewer_steps_psnr(curve[:1], 0.5) is None


def test_what_did_not_run_is_told_apart(facts):
    rows = [record("tomesd", 0.4, model=model, batch=batch, reason="no.") for model in "ab" for batch in (1, 2)]
    settings = {**BenchSettings.of_suite("speed", repeats=1).to_dict(), "models": ("a", "b")}
    notes = result_of(rows, settings, facts).notes()
    assert any("over 1 interleaved round in one process." in note for note in notes)
    assert notes[-4:] == [
        f"tomesd 0.4 at {model} 768×768 batch {batch} did not run: no." for model in "ab" for batch in (1, 2)
    ]


def test_every_report_is_written(facts, tmp_path):
    folder = RunFolder(tmp_path, BenchSettings.of_suite("cpu").to_dict(), facts)
    for row in RECORDS:
        folder.cases.append(row)
    result = load_result(tmp_path)
    files = {file.name: file for file in result.save(tmp_path)}
    assert set(files) == {"report.md", "report.csv", "report.html", "speed-size-sd15.png"}
    markdown = files["report.md"].read_text()
    assert "| 768×768 | agentsd-agent | 0.4 | 31.23 s |" in markdown
    assert "tomesd 0.4 at 512×512 did not run: tomesd is not installed." in markdown
    rows = list(csv.DictReader(io.StringIO(files["report.csv"].read_text())))
    (agent,) = [row for row in rows if row["method"] == "agentsd-agent"]
    assert (agent["seconds"], agent["of_tomesd"], agent["of_free_low"]) == ("31.234", "1.2", "0.95")
    assert "| 1.600 (1.550–1.660) | 1.200 (1.140–1.260) | 0.960 (0.950–0.980) |" in markdown
    page = files["report.html"].read_text()
    assert "<td>31.23 s</td>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs nothing but itself
    with PIL.Image.open(files["speed-size-sd15.png"]) as plot:
        assert np.ptp(np.asarray(plot)) > 100


def test_without_matplotlib_there_are_no_plots_but_all_else(facts, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = result_of(RECORDS, BenchSettings.of_suite("cpu").to_dict(), facts).save(tmp_path)
    assert [file.name for file in files] == ["report.md", "report.csv", "report.html"]


def test_brackets_in_the_name_of_a_model_are_no_markup_in_the_terminal(facts):
    """Nor is what stands in brackets an interval."""
    rows = [
        {**record("baseline", seconds=1.0, of_baseline=[1.0]), "model": name} for name in ("a [b] (2)", "c [fp16]")
    ]
    settings = {**BenchSettings().to_dict(), "models": ("a [b] (2)", "c [fp16]")}
    result = result_of(rows, settings, facts)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    assert "a [b] (2) 768×768" in text
    assert "c [fp16] 768×768" in text
    assert not any("95%" in note for note in result.notes())


def test_what_comes_from_a_user_is_no_markup_in_the_page(facts):
    rows = [{**record("baseline"), "model": "<script>", "reason": "<b>"}]
    settings = {**BenchSettings().to_dict(), "models": ("<script>",)}
    page = result_of(rows, settings, facts).to_html()
    assert "<script>" not in page
    assert "<b>" not in page


def test_a_folder_that_holds_no_results(facts, tmp_path):
    with pytest.raises(BenchError, match="not a results folder"):
        load_result(tmp_path)
    folder = RunFolder(tmp_path, BenchSettings().to_dict(), facts)
    folder.cases.append({"method": "baseline", "speed": 3})
    with pytest.raises(BenchError, match="another version"):
        load_result(tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text())["agentsd"]
    (tmp_path / "cases.jsonl").write_text("")
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(BenchError, match="another version"):
        load_result(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(BenchError, match=r"settings\.json cannot be read"):
            load_result(tmp_path)


def test_a_report_of_a_gpu_names_it(facts):
    on_gpu = {**facts, "device": "cuda:0", "gpu": "NVIDIA H100"}
    result = result_of(RECORDS, BenchSettings.of_suite("cpu").to_dict(), on_gpu)
    assert result.machine().startswith("NVIDIA H100,")
    assert not any("of a process that runs this method alone" in note for note in result.notes())
