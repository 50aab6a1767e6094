"""Plots of rows: what is drawn where, and the images laid out."""

import PIL.Image

from agentsd.bench import Row, plots
from agentsd.bench.plots import pareto_front, save_plots


def row_of(method, ratio=None, **values):
    shared = {"model": "sd15", "height": 768, "width": 768, "batch": 1}
    return Row(method=method, ratio=ratio, **{**shared, **values})


def test_quality_is_plotted_and_images_are_laid_out(tmp_path):
    rows = [
        row_of("baseline", steps=4, seconds=2.0, of_baseline=[1.0], images=2),
        row_of("agentsd", 0.4, steps=4, seconds=1.0, of_baseline=[2.0], images=2, quality={"ssim": [0.9, 0.8, 0.95]}),
        row_of(
            "fewer-steps", 0.4, steps=2, seconds=1.0, of_baseline=[1.9], images=2, quality={"ssim": [0.7, 0.6, 0.8]}
        ),
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
    """A method that is slower and different is on no front: baseline is at 1 and 1."""
    fronts = []
    monkeypatch.setattr(plots, "pareto_front", lambda points: fronts.append(points) or pareto_front(points))
    rows = [
        row_of(
            "agentsd", 0.4, height=side, width=side, seconds=1.0, of_baseline=[0.9], quality={"ssim": [0.9, 0.8, 0.95]}
        )
        for side in (512, 768)
    ]
    files = [file.name for file in save_plots(rows, tmp_path, tmp_path / "images")]
    assert [name for name in files if name.startswith("quality-speed")] == [
        f"quality-speed-sd15-{side}x{side}-batch1.png" for side in (512, 768)
    ]
    assert fronts == [[(1.0, 1.0), (0.9, 0.9)]] * 2


def test_the_front_holds_what_nothing_beats():
    assert pareto_front([(1, 1), (2, 0.5), (1.5, 0.4), (0.9, 0.9)]) == [0, 1]
    assert pareto_front([(1, 1), (1, 1)]) in ([0], [1])


def test_quality_is_plotted_against_speed(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure) or file)
    row = Row("m", "agentsd", 0.4, 8, 8, of_baseline=[2.0], quality={"ssim": [0.9]})
    plots.plot_quality([row], tmp_path / "plot.png")
    points = [tuple(drawn.lines[0].get_xydata()[0]) for drawn in figures[0].axes[0].containers]
    assert (2.0, 0.9) in points
