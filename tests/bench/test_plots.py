"""Plots of rows: what is drawn where, and the images laid out."""

import PIL.Image
import pytest

from agentsd.bench import METHODS, Row, plots
from agentsd.bench.methods import is_fewer_steps
from agentsd.bench.plots import pareto_front, save_plots


def row_of(method, ratio=None, **values):
    shared = {"model": "sd15", "height": 768, "width": 768, "batch": 1}
    return Row(method=method, ratio=ratio, **{**shared, **values})


def test_quality_is_plotted_and_images_are_laid_out(tmp_path):
    rows = [
        row_of("baseline", steps=4, seconds=2.0, of_baseline=[1.0], images=2),
        row_of(
            "agentsd", 0.4, steps=4, seconds=1.0, of_baseline=[2.0], images=2, quality={"psnr": [30.0, 29.0, 31.0]}
        ),
        row_of("fewer-steps", 0.4, steps=2, seconds=1.0, of_baseline=[1.9], images=2, quality={"psnr": [25.0]}),
    ]
    colours = {"baseline": (200, 0, 0), "agentsd-0.4": (0, 200, 0), "fewer-steps-0.4": (0, 0, 200)}
    for name, colour in colours.items():
        for index in range(2):
            file = tmp_path / "images" / "sd15-768x768-batch1" / name / f"{index:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (64, 64), colour).save(file)
    files = {file.name: file for file in save_plots(rows, tmp_path, tmp_path / "images")}
    assert set(files) == {"quality-speed-sd15-768x768-batch1.png", "images-sd15-768x768-batch1.png"}
    with PIL.Image.open(files["images-sd15-768x768-batch1.png"]) as sheet:
        lines = [sheet.getpixel((sheet.width - 50, sheet.height * (2 * line + 1) // 6)) for line in range(3)]
    assert lines == list(colours.values())


def test_intervals_are_drawn_where_there_are_some():
    assert plots._lengths([[0.75, 0.5, 1.0], [0.5]]) == [[0.25, 0.0], [0.25, 0.0]]


def test_each_setting_has_a_plot_of_its_own_with_baseline_in_it(tmp_path, monkeypatch):
    """A method that is slower and different is on no front: baseline is at 1, and its images are its own."""
    fronts = []
    monkeypatch.setattr(plots, "pareto_front", lambda points: fronts.append(points) or pareto_front(points))
    rows = [
        row_of(
            "agentsd",
            0.4,
            height=side,
            width=side,
            seconds=1.0,
            of_baseline=[0.9],
            quality={"psnr": [30.0, 29.0, 31.0]},
        )
        for side in (512, 768)
    ]
    files = [file.name for file in save_plots(rows, tmp_path, tmp_path / "images")]
    assert [name for name in files if name.startswith("quality-speed")] == [
        f"quality-speed-sd15-{side}x{side}-batch1.png" for side in (512, 768)
    ]
    assert fronts == [[(1.0, float("inf")), (0.9, 30.0)]] * 2


def test_the_front_holds_what_nothing_beats():
    assert pareto_front([(1, 1), (2, 0.5), (1.5, 0.4), (0.9, 0.9)]) == [0, 1]
    assert pareto_front([(1, 1), (1, 1)]) in ([0], [1])


@pytest.fixture
def figures(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure) or file)
    return drawn


def many_rows():
    """Every method at one setting; the fewer steps, the faster and the farther away."""
    names = [name for name in METHODS if name != "baseline" and not is_fewer_steps(name)]
    rows = [
        row_of(name, of_baseline=[1.1 + index % 5 / 4], quality={"psnr": [24.0 + index, 23.0 + index, 25.0 + index]})
        for index, name in enumerate(names)
    ]
    for percent in (75, 50, 25):
        quality = {"psnr": [percent / 4]}
        rows.append(row_of(f"fewer-steps-{percent}%", steps=percent, of_baseline=[100 / percent], quality=quality))
    return rows


def test_quality_is_plotted_against_speed(figures, tmp_path):
    rows = many_rows()
    plots.plot_quality(
        [row_of("baseline", of_baseline=[1.0], quality={}), row_of("todo", of_baseline=[1.0]), *rows],
        tmp_path / "plot.png",
    )
    (axes,) = figures[0].axes
    points = [tuple(point) for drawn in axes.containers for point in drawn.lines[0].get_xydata()]
    assert sorted(points) == sorted((row.speedup, row.quality["psnr"][0]) for row in rows)
    texts = [note.get_text() for note in axes.texts]
    assert texts == [row.method for row in rows[:-3]] + ["75 steps", "50 steps", "25 steps"]


def test_without_any_psnr_the_plot_is_of_ssim(figures, tmp_path):
    plots.plot_quality([row_of("todo", of_baseline=[1.2], quality={"ssim": [0.9]})], tmp_path / "plot.png")
    plots.plot_quality(
        [row_of("todo", of_baseline=[1.2], quality={"ssim": [0.9], "psnr": [30.0]})], tmp_path / "b.png"
    )
    drawn = [(figure.axes[0].get_ylabel(), figure.axes[0].texts[0].xy) for figure in figures]
    assert drawn == [
        ("SSIM to the baseline's image", (1.2, 0.9)),
        ("PSNR to the baseline's image in dB", (1.2, 30.0)),
    ]


def test_fewer_steps_are_a_line_and_the_front_is_drawn(figures, tmp_path):
    rows = many_rows()
    plots.plot_quality(rows, tmp_path / "plot.png")
    lines = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in figures[0].axes[0].lines}
    assert lines["baseline with fewer steps"] == [(100 / 75, 75 / 4), (2.0, 12.5), (4.0, 6.25)]
    points = [(row.speedup, row.quality["psnr"][0]) for row in rows]
    assert lines["Pareto front"] == [points[index] for index in pareto_front(points)]
    assert (4.0, 6.25) in lines["Pareto front"], "nothing else is as fast"


def test_labels_of_a_plot_cover_neither_each_other_nor_points(figures, tmp_path):
    plots.plot_quality(many_rows(), tmp_path / "plot.png")
    (axes,) = figures[0].axes
    boxes = [note.get_window_extent() for note in axes.texts]
    assert sum(box.count_overlaps(boxes) - 1 for box in boxes) == 0
    points = axes.transData.transform([note.xy for note in axes.texts])
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_ratios_are_named_where_there_are_several(figures, tmp_path):
    rows = [row_of("tomesd", ratio, of_baseline=[1 + ratio], quality={"psnr": [30.0]}) for ratio in (0.3, 0.5)]
    plots.plot_quality(rows, tmp_path / "plot.png")
    assert [note.get_text() for note in figures[0].axes[0].texts] == ["tomesd 0.3", "tomesd 0.5"]
    plots.plot_quality(rows[:1], tmp_path / "plot.png")
    assert [note.get_text() for note in figures[1].axes[0].texts] == ["tomesd"]


def test_a_method_is_a_line_over_the_ratio(figures, tmp_path):
    """Whatever order the ratios were given in; what has none is a point."""
    rows = [
        row_of("tomesd", ratio, of_baseline=[1 + ratio], quality={"psnr": [40 - 20 * ratio]})
        for ratio in (0.5, 0.1, 0.3)
    ]
    plots.plot_quality([*rows, row_of("todo", of_baseline=[1.4], quality={"psnr": [29.0]})], tmp_path / "plot.png")
    lines = [[tuple(point) for point in drawn.lines[0].get_xydata()] for drawn in figures[0].axes[0].containers]
    assert lines == [[(1.1, 38.0), (1.3, 34.0), (1.5, 30.0)], [(1.4, 29.0)]]
    assert all(drawn.lines[0].get_linestyle() == "-" for drawn in figures[0].axes[0].containers)
