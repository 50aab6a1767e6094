"""What a benchmark hands back, as a table for people and as JSON for programs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """
    One method at one ratio and size.

    Args:
        method (`str`): Name of the method.
        ratio (`float`, *optional*): Share of tokens merged, for methods that merge.
        height (`int`): Picture height in pixels.
        width (`int`): Picture width in pixels.
        rounds (`int`): Number of timed rounds.
        median (`float`, *optional*): Median seconds.
        q1 (`float`, *optional*): Lower quartile of the seconds.
        q3 (`float`, *optional*): Upper quartile of the seconds.
        speedup (`float`, *optional*): Median over the rounds of vanilla's seconds divided by this method's.
        of_tomesd (`float`, *optional*): This speed-up divided by tomesd's at the same size and ratio.
        of_attention_free (`float`, *optional*): This speed-up divided by that of the attention-free model.
        peak_bytes (`int`, *optional*): Highest peak memory of any round.
        is_computed (`bool`): Whether the times were computed from other rows' times, round by round.
        reason (`str`, *optional*): Why the method did not run; all numbers are then missing.
    """

    method: str
    ratio: float | None
    height: int
    width: int
    rounds: int = 0
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    speedup: float | None = None
    of_tomesd: float | None = None
    of_attention_free: float | None = None
    peak_bytes: int | None = None
    is_computed: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class BenchResult:
    """
    The outcome of a benchmark.

    Args:
        title (`str`): What was timed, in one line.
        settings (`dict[str, Any]`): What was asked for.
        environment (`dict[str, Any]`): What it ran on.
        rows (`list[Row]`): The measurements.
        notes (`list[str]`): How to read them; shown below the table.
    """

    title: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """
        Everything as plain values.

        Returns:
            `dict[str, Any]`: Ready for JSON.
        """
        return asdict(self)

    def table(self) -> Table:
        """
        The rows as a table for the terminal.

        Returns:
            `rich.table.Table`: For `rich.print`. The notes are not part of it.
        """
        table = Table(title=self.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        header, *lines = self._cells()
        for number, name in enumerate(header[1:]):
            # Headings break, so that the table fits a terminal of 80 columns.
            heading = name.replace("-", "-\n").replace(" ", "\n")
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        size = None
        for line in lines:
            if line[0] != size:
                size = line[0]
                table.add_section()
                table.add_row(f"[bold]{size}")
            table.add_row(*line[1:])
        return table

    def to_markdown(self) -> str:
        """
        Title, table, notes and environment as Markdown.

        Returns:
            `str`: Markdown text, ending in a newline.
        """
        header, *lines = self._cells()
        rule = [":--" if number < 2 else "--:" for number in range(len(header))]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))
        notes = "\n".join(f"- {note}" for note in [*self.notes, self._machine()])
        return f"**{self.title}**\n\n{table}\n\n{notes}\n"

    def save(self, folder: str | Path) -> list[Path]:
        """
        Write `result.json` and `table.md`.

        Args:
            folder (`str` or `Path`): Made if it is not there; files of these names in it are replaced.

        Returns:
            `list[Path]`: The files written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data, text = folder / "result.json", folder / "table.md"
        data.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        text.write_text(self.to_markdown(), encoding="utf-8")
        return [data, text]

    def _cells(self) -> list[list[str]]:
        """The table as text, header first; comparisons and memory only where some row has them."""
        optional = {
            "× tomesd": [_number(row.of_tomesd) for row in self.rows],
            "× free": [_number(row.of_attention_free) for row in self.rows],
            "peak memory": [f"{row.peak_bytes / 2**30:.2f} GiB" if row.peak_bytes else "" for row in self.rows],
        }
        optional = {name: column for name, column in optional.items() if any(column)}
        lines = [["size", "method", "ratio", "median", "quartiles", "speed-up", *optional]]
        for number, row in enumerate(self.rows):
            name = f"{row.method} †" if row.is_computed else row.method
            start = [f"{row.width}×{row.height}", name, "" if row.ratio is None else f"{row.ratio:g}"]
            if row.reason is not None:
                lines.append([*start, "not run", "", "", *("" for _ in optional)])
                continue
            times = [f"{_seconds(row.median)} s", f"{_seconds(row.q1)}–{_seconds(row.q3)}", _number(row.speedup)]
            lines.append([*start, *times, *(column[number] for column in optional.values())])
        return lines

    def _machine(self) -> str:
        known = self.environment
        on_gpu = str(known.get("device")).startswith("cuda")
        parts = [
            known["gpu"] if on_gpu else f"{known['cpu']}, {known['threads']} threads",
            *(f"{name} {known[name]}" for name in ("torch", "diffusers", "tomesd", "agentsd") if known.get(name)),
            *(f"{name} {known[name]}" for name in ("commit", "dtype") if known.get(name)),
        ]
        return ", ".join(parts) + "."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"
