"""Plots of a benchmark's rows: quality against speed, speed against size, and a grid of images."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from .methods import BASELINE, is_fewer_steps
from .rows import Row, image_folder, short_name


# How close images are to the baseline's: what is written at the axis, and the value of the baseline itself.
_CLOSENESS = {
    "psnr": ("PSNR to the baseline's image in dB", float("inf")),
    "ssim": ("SSIM to the baseline's image", 1.0),
}
# Where a label may stand: points to the right of and above what it belongs to, and which of its ends is there.
_LABEL_PLACES = (
    (6, 4, "left"),
    (6, -10, "left"),
    (-6, 4, "right"),
    (-6, -10, "right"),
    (0, 11, "center"),
    (0, -18, "center"),
    (12, 14, "left"),
    (12, -20, "left"),
    (-12, 14, "right"),
    (-12, -20, "right"),
)
_GRID_IMAGES = 6
_GRID_SIDE = 192


def save_plots(rows: Sequence[Row], folder: Path, images: Path | None = None) -> list[Path]:
    """
    Draw every plot that the rows allow, as PNG files in a folder; without matplotlib, only grids of images.

    `images` is the folder of the run's images; without it, there are no grids.
    """
    rows = [row for row in rows if row.reason is None]
    files = []
    if importlib.util.find_spec("matplotlib") is not None:
        timed = [row for row in rows if row.speedup is not None]
        if len({(row.height, row.width) for row in timed}) > 1:
            files += [_plot_sizes(timed, model, folder) for model in dict.fromkeys(row.model for row in timed)]
        for setting in dict.fromkeys(row.setting for row in rows if row.quality.keys() & _CLOSENESS):
            mine = [row for row in rows if row.setting == setting]
            if any(row.speedup is not None for row in mine):
                files.append(plot_quality(mine, folder / f"quality-speed-{image_folder(mine[0]).parent}.png"))
    return files + (_draw_grids(rows, folder, images) if images is not None else [])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """
    The indices of points that no other point beats in both directions, by rising first value.

    Examples:

    ```python
    >>> pareto_front([(1.0, 3.0), (2.0, 2.0), (1.5, 1.0)])
    [0, 1]
    ```
    """
    best, front = float("-inf"), []
    for index in sorted(range(len(points)), key=lambda index: points[index], reverse=True):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front[::-1]


def plot_quality(rows: Sequence[Row], file: Path) -> Path:
    """
    Plot how close images are to the baseline's against speed, with the Pareto front: in PSNR, or SSIM without any.

    The rows are those of one setting; those without a speed-up or that metric are left out. So is the baseline, whose
    images have no distance from themselves; what is slower is on no front all the same. The baseline with fewer steps
    is a line, and so is each method over the ratio.
    """
    metric = "psnr" if any("psnr" in row.quality for row in rows) else "ssim"
    title, best = _CLOSENESS[metric]
    judged = [row for row in rows if metric in row.quality and row.speedup is not None and row.method != BASELINE]
    figure, axes = _figure()
    points = [(row.speedup or 0.0, row.quality[metric][0]) for row in judged]
    front = [points[index - 1] for index in pareto_front([(1.0, best), *points]) if index > 0]
    ring = {"marker": "o", "markersize": 14, "fillstyle": "none"}
    if front:
        axes.plot(*zip(*front, strict=True), color="grey", linestyle=":", **ring, label="Pareto front")
    fewer = sorted(
        (row for row in judged if is_fewer_steps(row.method)), key=lambda row: (row.speedup or 0.0, row.steps or 0)
    )
    if len(fewer) > 1:
        line = [(row.speedup, row.quality[metric][0]) for row in fewer]
        axes.plot(*zip(*line, strict=True), color="black", linewidth=1, label="baseline with fewer steps")
    for method in dict.fromkeys(row.method for row in judged):
        mine = sorted((row for row in judged if row.method == method), key=lambda row: row.ratio or 0.0)
        middle = [row.quality[metric][0] for row in mine]
        ends = _lengths([row.quality[metric] for row in mine])
        color = "black" if is_fewer_steps(method) else None
        speeds = [row.speedup for row in mine]
        form = {"fmt": "o-", "linewidth": 0.8, "markersize": 5, "capsize": 3, "elinewidth": 0.8}
        axes.errorbar(speeds, middle, yerr=ends, color=color, **form)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.margins(x=0.12, y=0.1)
    is_timed_once = all(row.rounds == 1 for row in judged)
    axes.set_xlabel("speed-up over the baseline" + (" (timed once)" if judged and is_timed_once else ""))
    has_intervals = any(len(row.quality[metric]) > 1 for row in judged)
    axes.set_ylabel(title + (" (95% interval)" if has_intervals else ""))
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    has_ratios = len({row.ratio for row in judged} - {None}) > 1
    _place_labels(figure, axes, [_label(row, has_ratios) for row in judged], points)
    return _save(figure, file)


def _label(row: Row, has_ratios: bool) -> str:
    if is_fewer_steps(row.method):
        return f"{row.steps} steps"
    return row.name if has_ratios else row.method


def _place_labels(figure: Any, axes: Any, labels: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write a label beside each point, where it covers no other label and no point if there is such a place."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # only now is it known where things are
    figure.set_layout_engine("none")
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(points)] if points else []
    for label, point in zip(labels, points, strict=True):
        note = axes.annotate(label, point, xytext=(0, 0), textcoords="offset points", fontsize=8)
        overlaps = []
        for place in _LABEL_PLACES:
            note.xyann, horizontal = place[:2], place[2]
            note.set_horizontalalignment(horizontal)
            box = note.get_window_extent()
            is_inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            overlaps.append(box.count_overlaps(taken) + (0 if is_inside else len(points)))
            if not overlaps[-1]:
                break
        x, y, horizontal = _LABEL_PLACES[overlaps.index(min(overlaps))]
        note.xyann = (x, y)
        note.set_horizontalalignment(horizontal)
        taken.append(note.get_window_extent())


def _lengths(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """How far intervals reach below and above their values; nowhere where there is none."""
    below = [value - (ends[0] if ends else value) for value, *ends in values]
    return [below, [(ends[1] if ends else value) - value for value, *ends in values]]


def _plot_sizes(rows: list[Row], model: str, folder: Path) -> Path:
    mine = [row for row in rows if row.model == model and row.speedup is not None]
    figure, axes = _figure()
    for name, batch in dict.fromkeys((row.name, row.batch) for row in mine):
        line = [row for row in mine if (row.name, row.batch) == (name, batch)]
        is_reference = name == "attention-free"
        axes.plot(
            [(row.height * row.width) ** 0.5 for row in line],
            [row.speedup or 0.0 for row in line],
            marker="" if is_reference else "o",
            linestyle="--" if is_reference else "-",
            color="black" if is_reference else None,
            label=name if batch == 1 else f"{name}, batch {batch}",
        )
    axes.set_xlabel("side of the image in pixels")
    axes.set_ylabel("speed-up over the baseline")
    figure.legend(title=short_name(model), loc="outside right upper")
    return _save(figure, folder / f"speed-size-{short_name(model)}.png")


def _figure() -> tuple[Any, Any]:
    # Not by pyplot, which belongs to whoever draws on a screen, and to one thread.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=110)
    return file


def _draw_grids(rows: list[Row], folder: Path, images: Path) -> list[Path]:
    """One sheet a setting: a line of the first images for each method."""
    files = []
    for setting in dict.fromkeys(row.setting for row in rows):
        mine = [row for row in rows if row.setting == setting]
        lines = [(row, sorted((images / image_folder(row)).glob("*.png"))) for row in mine]
        # Rows may come from a file that anybody wrote, and name a folder that is none of the run's.
        lines = [(row, found[:_GRID_IMAGES]) for row, found in lines if found and _is_inside(found[0], images)]
        if lines:
            file = folder / f"images-{image_folder(mine[0]).parent}.png"
            _draw_grid(lines).save(file)
            files.append(file)
    return files


def _is_inside(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def _draw_grid(lines: list[tuple[Row, list[Path]]]) -> PIL.Image.Image:
    font = PIL.ImageFont.load_default(size=16)
    labels = [f"{row.name}\n{row.steps} steps" if is_fewer_steps(row.method) else row.name for row, _ in lines]
    label, gap = 16 + max(round(font.getlength(line)) for text in labels for line in text.split("\n")), 4
    columns = max(len(files) for _, files in lines)
    sheet = PIL.Image.new("RGB", (label + columns * (_GRID_SIDE + gap), len(lines) * (_GRID_SIDE + gap)), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for number, (text, (_, files)) in enumerate(zip(labels, lines, strict=True)):
        top = number * (_GRID_SIDE + gap)
        draw.text((8, top + _GRID_SIDE // 2), text, fill="black", font=font, anchor="lm")
        for column, file in enumerate(files):
            with PIL.Image.open(file) as image:
                small = image.convert("RGB").resize((_GRID_SIDE, _GRID_SIDE), PIL.Image.Resampling.LANCZOS)
            sheet.paste(small, (label + column * (_GRID_SIDE + gap), top))
    return sheet
