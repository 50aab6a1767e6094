"""A case and the row that is measured for it, and how each of its numbers is written in a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


# Fields that hold a quotient of times and the ends of its interval.
COMPARED = ("of_baseline", "step_of_baseline", "of_tomesd", "of_free")
# A reason that the table itself gives.
OUT_OF_MEMORY = "out of memory"


def named(method: str, ratio: float | None) -> str:
    """What a method at a ratio is called: `agentsd 0.4`, or `baseline` where there is no ratio."""
    return method if ratio is None else f"{method} {ratio:g}"


def short_name(model: str) -> str:
    """What to call a model in a table or a file name: the last part of its path or hub id."""
    return Path(model).name


@dataclass(frozen=True)
class Case:
    """What one row is measured of: a method at one setting. A size of `None` is the model's own."""

    model: str
    method: str
    ratio: float | None
    height: int | None
    width: int | None
    batch: int

    @property
    def name(self) -> str:
        """Its name among the cases of one model, size and batch."""
        return named(self.method, self.ratio)


@dataclass(frozen=True)
class Row:
    """
    One case: a method at one setting.

    Args:
        model (`str`): Name of the model.
        method (`str`): Name of the method.
        ratio (`float`, *optional*): Share of tokens merged, for methods that merge.
        height (`int`): Image height in pixels.
        width (`int`): Image width in pixels.
        batch (`int`): Images in one generation.
        steps (`int`, *optional*):
            Denoising steps of a generation; of calls of a UNet, how many there were, where the method needs several.
        rounds (`int`): Number of timed rounds.
        seconds (`float`, *optional*): Median seconds of a generation or call; of several calls, their mean.
        q1 (`float`, *optional*): Lower quartile of the seconds.
        q3 (`float`, *optional*): Upper quartile of the seconds.
        step_seconds (`float`, *optional*):
            Median seconds of a denoising step, where there is a generation: the mean of its steps, of which the first
            contains the text encoding.
        step_q1 (`float`, *optional*): Lower quartile of them.
        step_q3 (`float`, *optional*): Upper quartile of them.
        of_baseline (`list[float]`, *optional*):
            Median over the rounds of the baseline's seconds divided by this method's, with (given rounds enough)
            the ends of its 95% interval.
        step_of_baseline (`list[float]`, *optional*): The same of a denoising step.
        of_tomesd (`list[float]`, *optional*): The same for tomesd's seconds at the same ratio.
        of_free (`list[float]`, *optional*): The same for the attention-free model.
        peak_bytes (`int`, *optional*): Peak memory.
        launches (`float`, *optional*): Kernels launched in a step, on CUDA.
        images (`int`): Images drawn for judging.
        blank (`int`):
            How many of them are a single colour, by a safety checker or by any value that is not finite, with which
            an image is kept as a black one. No metric counts them.
        identical (`int`): How many are the same as the baseline's, pixel by pixel; they have no PSNR.
        quality (`dict[str, list[float]]`):
            Metric to value and, of sets large enough, the ends of its 95% interval; under `"fid_floor"` the FID of as
            many images of the reference itself, and under `"…_change"` the difference to the baseline's value with
            images of the same seeds. Under `"psnr_gain"` the PSNR less that of the baseline with as many steps as fit
            in the same time, in decibels.
        is_computed (`bool`): Whether the times were computed from other rows' times, round by round.
        reason (`str`, *optional*): Why the method did not run; all numbers are then missing.

    Examples:

    ```python
    >>> from agentsd.bench import Row
    >>> row = Row("emoji", "agentsd", 0.4, 256, 256, of_baseline=[1.1, 1.0, 1.2])
    >>> row.name, row.speedup
    ('agentsd 0.4', 1.1)
    ```
    """

    model: str
    method: str
    ratio: float | None
    height: int
    width: int
    batch: int = 1
    steps: int | None = None
    rounds: int = 0
    seconds: float | None = None
    q1: float | None = None
    q3: float | None = None
    step_seconds: float | None = None
    step_q1: float | None = None
    step_q3: float | None = None
    of_baseline: list[float] | None = None
    step_of_baseline: list[float] | None = None
    of_tomesd: list[float] | None = None
    of_free: list[float] | None = None
    peak_bytes: int | None = None
    launches: float | None = None
    images: int = 0
    blank: int = 0
    identical: int = 0
    quality: dict[str, list[float]] = field(default_factory=dict)
    is_computed: bool = False
    reason: str | None = None

    @property
    def name(self) -> str:
        """Method and ratio."""
        return named(self.method, self.ratio)

    @property
    def setting(self) -> tuple[str, int, int, int]:
        """What it has in common with the rows that it is compared with."""
        return self.model, self.height, self.width, self.batch

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the baseline."""
        return None if self.of_baseline is None else self.of_baseline[0]

    def without_intervals(self) -> "Row":
        """A copy with the values alone, for where there is no room for more."""
        compared: dict[str, Any] = {name: (getattr(self, name) or [])[:1] or None for name in COMPARED}
        return replace(self, **compared, quality={name: value[:1] for name, value in self.quality.items()})


def image_folder(case: Case | Row) -> Path:
    """
    Where the images of a case lie, below the folder of all images: a folder for its setting, in it one for its method.

    Examples:

    ```python
    >>> image_folder(Case("emoji", "agentsd", 0.4, 256, 256, 1)).as_posix()
    'emoji-256x256-batch1/agentsd-0.4'
    >>> image_folder(Case("emoji", "agentsd:sx=4", 0.4, 256, 256, 1)).as_posix()
    'emoji-256x256-batch1/agentsd-sx=4-0.4'
    ```
    """
    setting = f"{short_name(case.model)}-{case.width}x{case.height}-batch{case.batch}"
    # No file on Windows has a colon in its name.
    return Path(setting) / case.name.replace(" ", "-").replace(":", "-")


# Heading and text of a column; columns without any text are left out.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: f"{row.method} †" if row.is_computed else row.method,
    "ratio": lambda row: _number(row.ratio, "g"),
    "steps": lambda row: _number(row.steps, "d"),
    "median": lambda row: _seconds(row.seconds, " s") or _not_run(row),
    "quartiles": lambda row: _range(row.q1, row.q3),
    "speed-up": lambda row: _interval(row.of_baseline, ".3f"),
    "s/step": lambda row: _seconds(row.step_seconds),
    "step quartiles": lambda row: _range(row.step_q1, row.step_q3),
    "step speed-up": lambda row: _interval(row.step_of_baseline, ".3f"),
    "× tomesd": lambda row: _interval(row.of_tomesd, ".3f"),
    "× free": lambda row: _interval(row.of_free, ".3f"),
    "peak memory": lambda row: "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB",
    "launches/step": lambda row: _number(row.launches, ".0f"),
    "PSNR": lambda row: _interval(row.quality.get("psnr"), ".1f") or ("identical" if row.identical else ""),
    "vs fewer steps": lambda row: _interval(row.quality.get("psnr_gain"), "+.1f"),
    "SSIM": lambda row: _interval(row.quality.get("ssim"), ".3f"),
    "MS-SSIM": lambda row: _interval(row.quality.get("ms_ssim"), ".3f"),
    "LPIPS": lambda row: _interval(row.quality.get("lpips"), ".3f"),
    "FID": lambda row: _interval(row.quality.get("fid"), ".1f"),
    "Δ FID": lambda row: _interval(row.quality.get("fid_change"), "+.2f"),
    "KID": lambda row: _interval(row.quality.get("kid"), ".4f"),
    "Δ KID": lambda row: _interval(row.quality.get("kid_change"), "+.4f"),
    "CLIP score": lambda row: _interval(row.quality.get("clip"), ".1f"),
    "Δ CLIP score": lambda row: _interval(row.quality.get("clip_change"), "+.2f"),
    "blank": lambda row: f"{row.blank} of {row.images}" if row.blank else "",
}


def _not_run(row: Row) -> str:
    if row.reason is None:
        return ""
    return OUT_OF_MEMORY if row.reason == OUT_OF_MEMORY else "not run"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _seconds(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.3f}{unit}" if value < 10 else f"{value:.2f}{unit}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{_seconds(low)}–{_seconds(high)}"


def _interval(ends: Sequence[float] | None, form: str) -> str:
    if ends is None:
        return ""
    value, *interval = ends
    if not interval:
        return f"{value:{form}}"
    low, high = (f"{end:{form}}" for end in interval)
    # A dash between numbers with signs could be read as one of them.
    return f"{value:{form}} ({low}{' to ' if low[0] in '+-' else '–'}{high})"
