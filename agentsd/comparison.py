"""What came of a comparison: images, times and fidelity, as numbers, as a table, and as files."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from .patch_report import PatchReport
from .utils.generation import Run, RunTime
from .utils.images import difference_map, side_by_side
from .utils.metrics import decibels, fidelity, similarity
from .utils.timing import SpeedUp


if TYPE_CHECKING:
    from rich.table import Table

# The one variant of a comparison with one configuration.
ONLY = "agentsd"


@dataclass(frozen=True)
class PatchedRun:
    """A run with the patch, and how it compares with the one without (`baseline`)."""

    run: Run
    baseline: Run
    report: PatchReport

    @cached_property
    def speed_up(self) -> SpeedUp:
        """How many times faster a step is."""
        return step_speed_up(self.baseline.rounds, self.run.rounds)

    @cached_property
    def total_speed_up(self) -> SpeedUp:
        """How many times faster the whole generation is, with text encoding and decoding."""
        return SpeedUp.of([time.total for time in self.baseline.rounds], [time.total for time in self.run.rounds])

    @cached_property
    def fidelity(self) -> tuple[float | None, float | None]:
        """PSNR and SSIM of the image."""
        return fidelity(self.run.values, self.baseline.values)

    @cached_property
    def difference(self) -> tuple[PIL.Image.Image, int]:
        """Where the images differ, and how many times that was brightened."""
        return difference_map(self.baseline.image, self.run.image)

    def to_dict(self) -> dict[str, Any]:
        """All but the run itself, ready for JSON."""
        psnr, ssim = self.fidelity
        return {
            "speed_up": self.speed_up.value,
            "speed_up_interval": self.speed_up.interval,
            "total_speed_up": self.total_speed_up.value,
            "total_speed_up_interval": self.total_speed_up.interval,
            "psnr": psnr if psnr is not None and math.isfinite(psnr) else None,
            "ssim": ssim,
            "is_identical": psnr == math.inf,
            "difference_scale": self.difference[1],
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True)
class Comparison:
    """
    An image generated from one seed without the patch (`baseline`) and with it (`agentsd`), as [`compare`] returns it.

    Of several patches, `agentsd` and all numbers are those of the first; `variants` has them all.

    Args:
        baseline_run (`Run`): Image, times and peak memory without the patch.
        variants (`dict[str, PatchedRun]`):
            The same with each patch, what it did to each layer, and how the two compare. A single patch is called
            `"agentsd"`.
        settings (`dict[str, Any]`): What was generated, and how.
        environment (`dict[str, Any]`): Machine and versions that it ran on.

    Examples:

    ```python
    >>> import agentsd
    >>> pipe = agentsd.AgentSDPipeline.from_pretrained("emoji")
    >>> options = {"height": 256, "width": 256, "seconds": 0, "progress": lambda *step: None}
    >>> comparison = pipe.compare("red apple", steps=2, **options)
    >>> comparison.agentsd.size, comparison.ssim < 1
    ((256, 256), True)
    >>> comparison.rounds, comparison.speed_up_interval  # in no seconds, one round is timed
    (1, None)
    >>> comparison.save("comparison")["side_by_side"].name
    'side_by_side.png'
    >>> presets = pipe.compare("red apple", configs=["balanced", "fast"], steps=8, **options)
    >>> {name: variant.speed_up.value > 0 for name, variant in presets.variants.items()}
    {'balanced': True, 'fast': True}
    ```
    """

    baseline_run: Run
    variants: dict[str, PatchedRun]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def _variant(self) -> PatchedRun:
        return next(iter(self.variants.values()))

    @property
    def _is_several(self) -> bool:
        return len(self.variants) > 1

    @property
    def baseline(self) -> PIL.Image.Image:
        """The image without the patch."""
        return self.baseline_run.image

    @property
    def agentsd_run(self) -> Run:
        """Image, times and peak memory with the patch."""
        return self._variant.run

    @property
    def agentsd(self) -> PIL.Image.Image:
        """The image with the patch."""
        return self.agentsd_run.image

    @property
    def baseline_time(self) -> RunTime:
        """Time without the patch, the median over the rounds."""
        return self.baseline_run.time

    @property
    def agentsd_time(self) -> RunTime:
        """Time with the patch, the median over the rounds."""
        return self.agentsd_run.time

    @property
    def rounds(self) -> int:
        """How often each image was timed."""
        return len(self.baseline_run.rounds)

    @property
    def speed_up(self) -> float:
        """How many times faster a step is with the patch."""
        return self._variant.speed_up.value

    @property
    def speed_up_interval(self) -> tuple[float, float] | None:
        """Its 95% interval, or `None` if each image was timed once."""
        return self._variant.speed_up.interval

    @property
    def is_difference_measured(self) -> bool | None:
        """Whether that interval leaves out 1, or `None` if there is none."""
        return self._variant.speed_up.is_difference

    @property
    def total_speed_up(self) -> float:
        """How many times faster the whole generation is, with text encoding and decoding."""
        return self._variant.total_speed_up.value

    @property
    def psnr(self) -> float | None:
        """Peak signal-to-noise ratio in decibels, infinite for identical images, `None` if one is not finite."""
        return self._variant.fidelity[0]

    @property
    def ssim(self) -> float | None:
        """Structural similarity, `None` if an image is not finite or has less than 11 pixels on a side."""
        return self._variant.fidelity[1]

    @property
    def difference(self) -> PIL.Image.Image:
        """Where the two images differ, brightened `difference_scale` times."""
        return self._variant.difference[0]

    @property
    def difference_scale(self) -> int:
        """How many times the difference is brightened."""
        return self._variant.difference[1]

    @property
    def report(self) -> PatchReport:
        """What the patch did to each layer."""
        return self._variant.report

    @property
    def warnings(self) -> list[str]:
        """
        What is wrong with the images: not finite, black, replaced by the safety checker; and what the libraries warned
        of that concerns what was asked for, such as a prompt that is too long.
        """
        runs = [self.baseline_run, *(variant.run for variant in self.variants.values())]
        return list(dict.fromkeys(warning for run in runs for warning in run.warnings))

    @property
    def timing(self) -> str:
        """How the times were taken, in one line."""
        if self.rounds == 1:
            return "Each image timed once, after a warm-up."
        rounds = f"{self.rounds} rounds in alternating order, after a warm-up"
        return f"Times are medians of {rounds}; speed-ups are means over rounds, with 95% intervals."

    @cached_property
    def side_by_side(self) -> PIL.Image.Image:
        """All images with labels; of two, also their difference."""
        panels = [(self.baseline, _label("baseline" if self._is_several else "without agentsd", self.baseline_time))]
        for name, variant in self.variants.items():
            panels.append((variant.run.image, _label(name if self._is_several else f"with {name}", variant.run.time)))
        if not self._is_several:
            # Pillow's font has no multiplication sign.
            panels.append((self.difference, f"difference, {self.difference_scale} times as bright"))
        images, labels = zip(*panels, strict=True)
        return side_by_side(list(images), list(labels))

    def rows(self) -> list[tuple[str, ...]]:
        """Times and fidelity as the cells of a table, the headings first; several patches have a column each."""
        return self._rows_of_several() if self._is_several else self._rows_of_one()

    def _rows_of_several(self) -> list[tuple[str, ...]]:
        runs, variants = [self.baseline_run, *(each.run for each in self.variants.values())], self.variants.values()
        return [
            ("", "baseline", *self.variants),
            ("per step", *(f"{run.time.seconds_per_step:.3f} s" for run in runs)),
            ("speed-up per step", "", *(str(each.speed_up) for each in variants)),
            ("total", *(f"{run.time.total:.3f} s" for run in runs)),
            ("total speed-up", "", *(str(each.total_speed_up) for each in variants)),
            ("peak memory", *(run.peak for run in runs)),
            ("PSNR", "", *(decibels(each.fidelity[0]) for each in variants)),
            ("SSIM", "", *(similarity(each.fidelity[1]) for each in variants)),
        ]

    def _rows_of_one(self) -> list[tuple[str, ...]]:
        rows = [("", "without agentsd", f"with {next(iter(self.variants))}", "speed-up")]
        for name, time_of, speed_up in (
            ("per step", lambda time: time.seconds_per_step, self._variant.speed_up),
            ("total", lambda time: time.total, self._variant.total_speed_up),
        ):
            before, after = (f"{time_of(time):.3f} s" for time in (self.baseline_time, self.agentsd_time))
            rows.append((name, before, after, str(speed_up)))
        return [
            *rows,
            ("peak memory", self.baseline_run.peak, self.agentsd_run.peak, ""),
            ("PSNR", "", decibels(self.psnr), ""),
            ("SSIM", "", similarity(self.ssim), ""),
        ]

    def table(self) -> "Table":
        """`rows()` as a table for `rich.print`."""
        from rich.table import Table
        from rich.text import Text

        width, height, steps = (self.settings[name] for name in ("width", "height", "steps"))
        prompt = self.settings["prompt"]
        given = ", ".join(self.settings["options"]) or "no prompt" if prompt is None else repr(prompt)
        title = f"{given}, seed {self.settings['seed']}, {width}×{height}, {steps} steps"
        # As it is: a prompt may hold brackets, which rich would read as markup.
        table = Table(title=Text(title), caption=self.timing)
        headings, *rows = self.rows()
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
        for row in rows:
            # What a speed-up says beside its number goes below, for narrow terminals.
            is_last_time = row[0] == ("total speed-up" if self._is_several else "total")
            table.add_row(*(cell.replace(", ", "\n") for cell in row), end_section=is_last_time)
        return table

    def to_dict(self) -> dict[str, Any]:
        """
        Everything but the images, ready for JSON: an infinite PSNR is `None` there, and `is_identical` is true.

        The numbers of a single patch stand beside `"agentsd"`, those of named ones under `"variants"`.
        """
        runs = {name: _plain_run(each.run) for name, each in self.variants.items()}
        plain = {
            "settings": self.settings,
            "environment": self.environment,
            "rounds": self.rounds,
            "baseline": _plain_run(self.baseline_run),
        }
        if list(runs) == [ONLY]:
            plain |= {ONLY: runs[ONLY], **self._variant.to_dict()}
        else:
            plain["variants"] = {name: runs[name] | each.to_dict() for name, each in self.variants.items()}
        return {**plain, "warnings": self.warnings}

    def save(self, folder: str | Path) -> dict[str, Path]:
        """
        Write the images and `comparison.json`.

        Args:
            folder (`str` or `Path`): Created if it does not exist; files of these names in it are overwritten.

        Returns:
            `dict[str, Path]`: The files, under `"baseline"`, `"agentsd"` or the names of the patches,
                `"side_by_side"` and `"comparison"`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        images = {"baseline": self.baseline, **{name: each.run.image for name, each in self.variants.items()}}
        images["side_by_side"] = self.side_by_side
        files = {name: folder / f"{name}.png" for name in images}
        for name, image in images.items():
            image.save(files[name])
        files["comparison"] = folder / "comparison.json"
        files["comparison"].write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return files


def step_speed_up(before: list[RunTime], after: list[RunTime]) -> SpeedUp:
    """How many times faster a step is, from the times of the same rounds."""
    return SpeedUp.of([time.seconds_per_step for time in before], [time.seconds_per_step for time in after])


def _label(name: str, time: RunTime) -> str:
    return f"{name}: {time.seconds_per_step:.3g} s per step"


def _plain_run(run: Run) -> dict[str, Any]:
    return {
        "seconds_per_step": run.time.seconds_per_step,
        "total_seconds": run.time.total,
        "step_seconds": run.time.steps,
        "rounds": [{"total_seconds": time.total, "step_seconds": time.steps} for time in run.rounds],
        "peak_bytes": run.peak_bytes,
    }
