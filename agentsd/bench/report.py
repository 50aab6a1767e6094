"""What a benchmark hands back: its rows as a table for the terminal, Markdown, CSV and a page of HTML."""

import base64
import csv
import html
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .methods import agent_share, find_method, is_calibrated, is_fewer_steps
from .plots import save_plots
from .rows import COLUMNS, COMPARED, Row, short_name
from .schedule import CALL_STEPS
from .settings import SUITES
from .store import BenchError, read_log, read_object


_TEXT_COLUMNS = ("size", "method")
# A terminal has no room for these columns; they are in the reports.
NOT_IN_TERMINAL = (
    "s/step",
    "step quartiles",
    "step speed-up",
    "launches/step",
    "vs fewer steps",
    "Δ FID",
    "Δ KID",
    "Δ CLIP score",
)


@dataclass(frozen=True)
class BenchResult:
    """
    The outcome of a benchmark.

    Args:
        settings (`dict[str, Any]`): What was asked for.
        environment (`dict[str, Any]`): What it ran on.
        rows (`list[Row]`): The measurements.
        warnings (`list[str]`, *optional*):
            What libraries warned of that concerns what was asked for, such as a prompt that is too long.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings, run_bench
    >>> settings = BenchSettings(methods=("baseline",), sizes=((256, 256),), steps=2, repeats=1, memory=False)
    >>> result = run_bench(settings)
    >>> result.title
    'emoji: generations of 2 steps'
    >>> result.to_csv().splitlines()[0].split(",")[:4]
    ['model', 'method', 'ratio', 'height']
    ```
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What was measured, in one line."""
        models = ", ".join(dict.fromkeys(short_name(row.model) for row in self.rows))
        mode = self.settings.get("compile", False)
        compiled = f", torch.compile ({mode})" if isinstance(mode, str) else ", torch.compile" if mode else ""
        if SUITES[self.settings["suite"]].kind == "call":
            calls = "calls" if any(row.steps for row in self.rows) else "single calls"
            return f"UNet of the shape of {models}, random weights, {calls} with guidance{compiled}"
        scheduler = f" {self.settings['scheduler']}" if self.settings.get("scheduler") else ""
        return f"{models}: generations of {self.settings['steps']}{scheduler} steps{compiled}"

    def notes(self, intervals: bool = True, without: Collection[str] = ()) -> list[str]:
        """How to read the table that [`BenchResult.cells`] gives with the same arguments, in a few lines."""
        shown = self.cells(intervals, without)
        return _notes(self, shown[0], has_intervals=shown != self.cells(False, without))

    def table(self) -> Table:
        """The rows as a table for the terminal, without the notes."""
        table = Table(title=Text(self.title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        header, *lines = self.cells(intervals=False, without=NOT_IN_TERMINAL)
        for number, name in enumerate(header[1:]):
            # Headings break, so that the table fits a terminal of 80 columns.
            heading = name.replace("-", "-\n").replace(" ", "\n")
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        size = None
        for line in lines:
            if line[0] != size:
                size = line[0]
                table.add_section()
                table.add_row(Text(size, style="bold"))
            table.add_row(*map(Text, line[1:]))
        return table

    def to_markdown(self, without: Collection[str] = ()) -> str:
        """Title, table, notes and machine as Markdown, without the columns of these headings."""
        header, *lines = self.cells(without=without)
        rule = [":--" if name in _TEXT_COLUMNS else "--:" for name in header]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))
        notes = "\n".join(f"- {note}" for note in [*self.notes(without=without), self.machine()])
        return f"**{self.title}**\n\n{table}\n\n{notes}\n"

    def to_csv(self) -> str:
        """Every number of every row, a column each, below a header."""
        metrics = sorted({name for row in self.rows for name in row.quality})
        plain = [item.name for item in fields(Row) if item.name not in ("quality", *COMPARED)]
        spread = [f"{name}{end}" for name in (*COMPARED, *metrics) for end in ("", "_low", "_high")]
        out = io.StringIO()
        writer = csv.DictWriter(out, [*plain, *spread], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            values = {name: getattr(row, name) for name in plain}
            intervals = {**{name: getattr(row, name) for name in COMPARED}, **row.quality}
            for name in (*COMPARED, *metrics):
                ends = intervals.get(name) or []
                values |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=False))
            writer.writerow(values)
        return out.getvalue()

    def to_html(self, images: Sequence[Path] = ()) -> str:
        """A page that needs no other file, with these PNG files below the table."""
        header, *lines = self.cells()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>\n" for line in lines)
        notes = "".join(f"<li>{html.escape(note)}</li>\n" for note in [*self.notes(), self.machine()])
        shown = "".join(
            f'<figure><img alt="{html.escape(file.stem)}" src="data:image/png;base64,'
            f'{base64.b64encode(file.read_bytes()).decode()}"></figure>\n'
            for file in images
        )
        return _PAGE.format(title=html.escape(self.title), head=head, body=body, notes=notes, images=shown)

    def save(self, folder: str | Path) -> list[Path]:
        """
        Write `report.md`, `report.csv` and `report.html`, and plots where matplotlib is installed.

        Args:
            folder (`str` or `Path`): Created if it does not exist; files of these names in it are overwritten.

        Returns:
            `list[Path]`: The files written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plots = save_plots(self.rows, folder, folder / "images")
        files = {
            "report.md": self.to_markdown() + "".join(f"\n![{file.stem}]({file.name})\n" for file in plots),
            "report.csv": self.to_csv(),
            "report.html": self.to_html(plots),
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [*(folder / name for name in files), *plots]

    def cells(self, intervals: bool = True, without: Collection[str] = ()) -> list[list[str]]:
        """
        The table as text, its header first.

        Args:
            intervals (`bool`, defaults to `True`): Show the interval of a number beside it.
            without (`Collection[str]`, *optional*): Headings of columns to leave out.

        Returns:
            `list[list[str]]`: Lines of cells.

        Raises:
            BenchError: If there is no column of a heading that is to be left out.
        """
        rows = self.rows if intervals else [row.without_intervals() for row in self.rows]
        columns = {"size": self.size_of, **COLUMNS}
        unknown = [name for name in without if name not in columns]
        if unknown:
            raise BenchError(f"There is no column {unknown[0]!r} to leave out. Known: {', '.join(columns)}.")
        texts = {name: [text(row) for row in rows] for name, text in columns.items()}
        if len(set(texts["steps"])) == 1 and SUITES[self.settings["suite"]].kind == "generation":
            texts["steps"] = [""]
        shown = [name for name in columns if any(texts[name]) and name not in without]
        return [shown, *(list(cells) for cells in zip(*(texts[name] for name in shown), strict=True))]

    def size_of(self, row: Row) -> str:
        """Width and height of a row, with the model before and the batch behind where there are several."""
        has_models = len({row.model for row in self.rows}) > 1
        has_batches = any(row.batch != 1 for row in self.rows)
        before = f"{short_name(row.model)} " if has_models else ""
        return f"{before}{row.width}×{row.height}" + (f" batch {row.batch}" if has_batches else "")

    @property
    def machine_name(self) -> str:
        """The processor or GPU that it ran on."""
        known = self.environment
        if str(known.get("device")).startswith("cuda"):
            return known["gpu"]
        return f"{known['cpu']}, {known['threads']} threads"

    def machine(self) -> str:
        """What it ran on, in one line."""
        known = self.environment
        parts = [
            self.machine_name,
            *(f"{name} {known[name]}" for name in ("torch", "diffusers", "tomesd", "agentsd") if known.get(name)),
            *(f"{name} {known[name]}" for name in ("commit", "dtype", "sdpa", "malloc") if known.get(name)),
        ]
        return ", ".join(parts) + "."


def result_of(
    records: Sequence[Mapping[str, Any]], settings: dict[str, Any], environment: dict[str, Any]
) -> BenchResult:
    """The result of the records of `cases.jsonl`, which may be in any order: its rows have that of the settings."""
    rows = [Row(**record) for record in records]
    for name in dict.fromkeys(row.method for row in rows):
        find_method(str(name))  # a file that anybody wrote may name any

    def place(row: Row) -> tuple[int, ...]:
        methods, ratios = list(settings["methods"]), list(settings["ratios"])
        models = list(settings["models"])
        return (
            models.index(row.model),
            row.height * row.width,
            row.height,
            row.batch,
            methods.index(row.method),
            -1 if row.ratio is None else ratios.index(row.ratio),
        )

    rows = sorted(rows, key=place)
    return BenchResult(settings, environment, [_with_gain(row, rows) for row in rows])


def fewer_steps_psnr(curve: Sequence[tuple[float, float]], share: float) -> float | None:
    """
    The PSNR that fewer steps give in a share of the baseline's time, on the line between the points around it.

    `curve` has the share and the PSNR of some numbers of steps. Where it has no point on either side, nobody knows.

    Examples:

    ```python
    >>> fewer_steps_psnr([(0.5, 20.0), (0.75, 30.0)], 0.6), fewer_steps_psnr([(0.5, 20.0), (0.75, 30.0)], 0.8)
    (24.0, None)
    ```
    """
    points = sorted(curve)
    for (start, low), (end, high) in pairwise(points):
        if start <= share <= end and start < end:
            return low + (high - low) * (share - start) / (end - start)
    return None


def _with_gain(row: Row, rows: Sequence[Row]) -> Row:
    """A row with what its PSNR is above that of fewer steps in the same time, where there is a curve of them."""
    if "psnr" not in row.quality or not row.speedup or is_fewer_steps(row.method):
        return row
    curve = [
        (1 / other.speedup, other.quality["psnr"][0])
        for other in rows
        if other.setting == row.setting
        and is_fewer_steps(other.method)
        and not is_calibrated(other.method)
        and other.speedup
        and "psnr" in other.quality
    ]
    # Shares of time rather than seconds: they are paired within rounds.
    psnr = fewer_steps_psnr(curve, 1 / row.speedup)
    gain = {} if psnr is None else {"psnr_gain": [row.quality["psnr"][0] - psnr]}
    return replace(row, quality={**row.quality, **gain})


def load_result(folder: str | Path) -> BenchResult:
    """
    Read the folder that a benchmark wrote, finished or not.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `BenchResult`: Its rows so far.

    Raises:
        BenchError: If it is not such a folder, or a file cannot be read.

    Examples:

    ```python
    >>> from agentsd.bench import BenchSettings, load_result, run_bench
    >>> settings = BenchSettings(methods=("baseline",), sizes=((256, 256),), steps=2, repeats=1, memory=False)
    >>> result = run_bench(settings, out="bench-results")
    >>> load_result("bench-results").rows == result.rows
    True
    ```
    """
    folder = Path(folder)
    if not (folder / "cases.jsonl").is_file():
        raise BenchError(f"{folder} is not a results folder: it has no cases.jsonl.")
    values = []
    for name in ("settings.json", "environment.json"):
        try:
            values.append(read_object((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise BenchError(f"{folder / name} cannot be read ({error}).") from error
    try:
        result = result_of(read_log(folder / "cases.jsonl"), *values)
        result.to_markdown()  # what is missing in settings or environment shows only in a report
        return result
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{folder} was written by another version of agentsd: {error}.") from error


def _notes(result: BenchResult, shown: Collection[str], has_intervals: bool) -> list[str]:
    notes = [*_notes_on_times(result, shown), *_notes_on_images(result, shown)]
    if has_intervals:
        notes.append(
            "in brackets: 95% intervals, from a bootstrap over rounds or images (for FID and KID, a jackknife); "
            "none for fewer than five rounds or ten images."
        )
    failed = [(row, row.reason.rstrip(".")) for row in result.rows if row.reason]
    return [*notes, *(f"{row.name} at {result.size_of(row)} did not run: {reason}." for row, reason in failed)]


def _notes_on_times(result: BenchResult, shown: Collection[str]) -> Iterator[str]:
    settings, rows = result.settings, result.rows
    is_call = SUITES[settings["suite"]].kind == "call"
    if any(row.is_computed for row in rows):
        share = agent_share(settings["options"]) or 0.0
        yield (
            f"†: computed, not measured: in every round {share:g} of the agent phase's time plus {1 - share:g} of the "
            "ToMe phase's, as in a generation whose steps are spread evenly over the noise range."
        )
    if is_call and any(row.steps for row in rows):
        yield (
            f"{CALL_STEPS} steps: the mean of as many calls, one at each step of a run from noise to image; without "
            "steps: a single call."
        )
    if not settings["repeats"]:
        return
    yield (
        f"{'median and quartiles' if 'quartiles' in shown else 'median'}: seconds per "
        f"{'UNet call' if is_call else 'generation'}, over {_many(settings['repeats'], 'interleaved round')} in one "
        "process."
    )
    if "speed-up" in shown:
        yield "speed-up: the baseline's time divided by the method's in the same round; the median over the rounds."
    if per_step := [name for name in ("s/step", "step quartiles", "step speed-up") if name in shown]:
        yield f"{', '.join(per_step)}: of a denoising step, averaged over all; the first encodes the text too."
    others = {"× tomesd": "tomesd", "× free": "attention-free"}
    if compared := [name for name in others if name in shown]:
        yield (
            f"{', '.join(compared)}: the same, with the time of {' or '.join(others[name] for name in compared)} "
            "in place of the baseline's."
        )
    if any(row.method == "attention-free" for row in rows):
        yield (
            "attention-free: `to_out(to_v(x))` in place of self-attention in the patched layers, the reference for "
            "what faster attention can gain; its images are worthless."
        )
    if any(row.method == "fewer-steps" and row.steps for row in rows):
        yield "fewer-steps: baseline with as many steps as fit in agentsd's time."
    if any(is_fewer_steps(row.method) and not is_calibrated(row.method) and row.steps for row in rows):
        yield "fewer-steps-N%: baseline with N% of the steps."
    if "peak memory" in shown and not str(result.environment.get("device")).startswith("cuda"):
        yield "peak memory: of a process that runs this method alone, weights and libraries included."
    if "launches/step" in shown and not is_call:
        yield "launches/step: GPU kernels of a short generation, with encoders and VAE, divided by its steps."


def _notes_on_images(result: BenchResult, shown: Collection[str]) -> Iterator[str]:
    settings = result.settings
    if images := result.environment.get("images"):
        yield f"images: drawn and judged in another run, on {images}"
    if pairwise := [name for name in ("PSNR", "SSIM", "MS-SSIM", "LPIPS") if name in shown]:
        yield (
            f"{', '.join(pairwise)}: mean over {_many(settings['images'], 'image')} against the baseline's of the "
            "same seed and prompt; pixel-identical images have no PSNR."
        )
    if "vs fewer steps" in shown:
        yield (
            "vs fewer steps: PSNR less that of the baseline with as many steps as fit in the method's time, on the "
            "line between the two rows of fewer-steps-N% around it; empty where there are none around it."
        )
    if distances := [name for name in ("FID", "KID") if name in shown]:
        if settings["reference"] is None:
            other = "the baseline's images of the same seeds"
            meaning = " Where the interval of KID contains 0, this many images cannot tell the sets apart."
        else:
            is_own = settings["reference"] == "emoji"
            other = "fresh renders of what the model was trained on" if is_own else "the images given as --reference"
            meaning = ""
            if floors := [row.quality["fid_floor"] for row in result.rows if "fid_floor" in row.quality]:
                value, low, high = floors[0]
                meaning = (
                    f" For scale, as many images of the reference itself have FID {value:.1f} ({low:.1f}–{high:.1f})."
                )
        yield f"{', '.join(distances)}: distance to {other}, in the features of {settings['features']}.{meaning}"
    if any(name.startswith("Δ") for name in shown):
        yield (
            "Δ: difference to the value of the baseline's images of the same seeds. Where an interval contains 0, "
            "this many images cannot tell the method from the baseline."
        )
    if SUITES[settings["suite"]].has_images and settings["features"] is None:
        yield (
            "no FID, KID and CLIP score: for them, --features names an extractor (`inception`, or a CLIP model), and "
            "--reference the images to compare with."
        )


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #8886; padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
img {{ max-width: 100%; }}
figure {{ margin: 2rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table></div>
<ul>
{notes}</ul>
{images}</body>
</html>
"""
