"""Plots of a benchmark's rows: quality against speed, speed against size, and a grid of images."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from .methods import BASELINE
from .rows import Row, image_folder, short_name


_ORIGIN = (1.0, 1.0)  # neither faster nor different
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
        if len({(row.height, row.width) for row in rows}) > 1:
            files += [_plot_sizes(rows, model, folder) for model in dict.fromkeys(row.model for row in rows)]
        for setting in dict.fromkeys(row.setting for row in rows if "ssim" in row.quality):
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
    Plot similarity to the baseline's images against speed, with the baseline itself and the Pareto front.

    The rows are those of one setting; without a speed-up or SSIM, they are left out.
    """
    judged = [row for row in rows if "ssim" in row.quality and row.speedup is not None and row.method != BASELINE]
    figure, axes = _figure()
    points = [_ORIGIN, *((row.speedup or 0.0, row.quality["ssim"][0]) for row in judged)]
    axes.plot(*_ORIGIN, "k*", markersize=10, label="baseline")
    for method in dict.fromkeys(row.method for row in judged):
        mine = [row for row in judged if row.method == method]
        middle = [row.quality["ssim"][0] for row in mine]
        ends = _lengths([row.quality["ssim"] for row in mine])
        speeds = [row.speedup for row in mine]
        axes.errorbar(speeds, middle, yerr=ends, fmt="o", capsize=3, label=method)
        for row, x, y in zip(mine, speeds, middle, strict=True):
            note = f"{row.steps} steps" if method == "fewer-steps" else _number(row.ratio)
            axes.annotate(note, (x or 0.0, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    front = [points[index] for index in pareto_front(points)]
    ring = {"marker": "o", "markersize": 14, "fillstyle": "none"}
    axes.plot(*zip(*front, strict=True), color="grey", linestyle=":", **ring, label="Pareto front")
    axes.axvline(1, color="grey", linewidth=0.8)
    is_timed_once = all(row.rounds == 1 for row in judged)
    axes.set_xlabel("speed-up over the baseline" + (" (timed once)" if judged and is_timed_once else ""))
    has_intervals = any(len(row.quality["ssim"]) > 1 for row in judged)
    axes.set_ylabel("SSIM to the baseline's image" + (" (95% interval)" if has_intervals else ""))
    axes.legend()
    return _save(figure, file)


def _lengths(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """How far intervals reach below and above their values; nowhere where there is none."""
    below = [value - (ends[0] if ends else value) for value, *ends in values]
    return [below, [(ends[1] if ends else value) - value for value, *ends in values]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


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
    axes.legend(title=short_name(model))
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
    labels = [row.name if row.method != "fewer-steps" else f"{row.name}\n{row.steps} steps" for row, _ in lines]
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
