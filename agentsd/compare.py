"""The same image with and without the patch: times, fidelity, and both side by side."""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from .config import AgentSDConfig
from .models.unet import attended_models
from .patch import is_patched, patched, plan_patch, unpatched
from .patch_report import PatchReport, report
from .presets import PresetName
from .runtime.own_warnings import collected_warnings, warn
from .utils.environment import environment
from .utils.generation import Run, RunTime, TimedImage, check_draws_images, pipeline_call
from .utils.images import difference_map, side_by_side
from .utils.metrics import decibels, fidelity, similarity
from .utils.progress import Progress
from .utils.timing import SpeedUp, Stopwatch, Variant, time_rounds


if TYPE_CHECKING:
    from rich.table import Table

_OWN_OPTIONS = {
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "generator", "num_images_per_prompt"),
    *("num_inference_steps", "output_type", "return_dict"),
}
# The one variant of a comparison with one configuration.
_ONLY = "agentsd"
# Files that are no variant's image.
_TAKEN_NAMES = ("baseline", "side_by_side", "comparison")


@dataclass(frozen=True)
class PatchedRun:
    """A run with the patch, and how it compares with the one without (`baseline`)."""

    run: Run
    baseline: Run
    report: PatchReport

    @cached_property
    def speed_up(self) -> SpeedUp:
        """How many times faster a step is."""
        return _speed_up(self.baseline.rounds, self.run.rounds, _per_step)

    @cached_property
    def total_speed_up(self) -> SpeedUp:
        """How many times faster the whole generation is, with text encoding and decoding."""
        return _speed_up(self.baseline.rounds, self.run.rounds, lambda time: time.total)

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
        patch_warnings (`list[str]`): What the patches warned of, such as too few steps for feature reuse.

    Examples:

    ```python
    >>> import agentsd
    >>> pipe = agentsd.AgentSDPipeline.from_pretrained("emoji")
    >>> comparison = pipe.compare("red apple", steps=2, seconds=0, progress=lambda *step: None)
    >>> comparison.agentsd.size, comparison.ssim < 1
    ((256, 256), True)
    >>> comparison.rounds, comparison.speed_up_interval  # in no seconds, one round is timed
    (1, None)
    >>> comparison.save("comparison")["side_by_side"].name
    'side_by_side.png'
    >>> presets = pipe.compare("red apple", configs=["balanced", "fast"], steps=8, seconds=0)
    >>> {name: variant.speed_up.value > 0 for name, variant in presets.variants.items()}
    {'balanced': True, 'fast': True}
    ```
    """

    baseline_run: Run
    variants: dict[str, PatchedRun]
    settings: dict[str, Any]
    environment: dict[str, Any]
    patch_warnings: list[str] = field(default_factory=list)

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
        """What the patches warned of, and images that are not finite, black or replaced by the safety checker."""
        runs = [self.baseline_run, *(variant.run for variant in self.variants.values())]
        return [*self.patch_warnings, *(warning for run in runs for warning in run.warnings)]

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
        title = f"{self.settings['prompt']!r}, seed {self.settings['seed']}, {width}×{height}, {steps} steps"
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
        if list(runs) == [_ONLY]:
            plain |= {_ONLY: runs[_ONLY], **self._variant.to_dict()}
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


def compare(
    pipe: Any,
    prompt: str,
    *,
    config: AgentSDConfig | None = None,
    configs: Mapping[str, AgentSDConfig] | Sequence[PresetName] | None = None,
    steps: int = 25,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    seconds: float = 30.0,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """
    Generate one image without the patch and with it, or with several, from the same seed, and time all.

    After a warm-up they are timed in turn, in rounds of alternating order: three of them, and more while the 95%
    interval of a speed-up per step still contains 1 and `seconds` are not over. Afterwards the pipeline is patched,
    or not, as it was before.

    Args:
        pipe (`DiffusionPipeline`):
            A pipeline with a UNet that draws images and takes `callback_on_step_end`, which is used to time steps.
        prompt (`str`): What to draw.
        config (`AgentSDConfig`, *optional*):
            The patch to compare with; by default the one that the pipeline has, or else `AgentSDConfig()`.
        configs (`Mapping[str, AgentSDConfig]` or `Sequence[str]`, *optional*):
            Several patches instead of `config`: names of presets, or configurations by names of your own.
        steps (`int`, defaults to `25`): Denoising steps.
        guidance_scale (`float`, *optional*): Strength of the prompt; by default the pipeline's own.
        height (`int`, *optional*): Height in pixels; by default, like the width, the pipeline's own.
        width (`int`, *optional*): Width in pixels.
        seed (`int`, defaults to `0`): Seed of the noise.
        negative_prompt (`str`, *optional*): What not to draw.
        seconds (`float`, defaults to `30.0`):
            How long to go on timing. Where one round takes longer, it is the only one, and there is no interval; so
            it is with a compiled model.
        progress (`Callable[[str, int, int], None]`, *optional*):
            Called at each step with what is drawn (such as `"baseline, round 2"`), the steps done and all steps of
            that image. An exception that it raises ends the comparison. It replaces the pipeline's progress bar.
        options: Passed to the pipeline, such as `image` and `strength`.

    Returns:
        `Comparison`: The images, their difference, times and fidelity.

    Raises:
        RuntimeError: If the run was interrupted (`pipe._interrupt`).
        TypeError: If an argument has the wrong type, an option is one that the comparison sets itself, or the pipeline
            draws videos or takes no `callback_on_step_end`.
        ValueError: If an argument is out of range.

    Examples:

    ```python
    >>> from agentsd.compare import compare
    >>> from agentsd.utils.loading import load_pipeline
    >>> comparison = compare(load_pipeline("emoji"), "red apple", steps=2, seconds=0, progress=lambda *step: None)
    >>> comparison.speed_up > 0
    True
    ```
    """
    chosen = _chosen_configs(config, configs)
    pipe = getattr(pipe, "pipe", pipe)  # an AgentSDPipeline's own
    _check(pipe, prompt, steps, seed, seconds, options)
    call = pipeline_call(prompt, guidance_scale, height, width, negative_prompt, **options)
    for each in chosen.values():
        plan_patch(pipe, config=each)  # what is wrong with it is better known before any image than after
    variants = {
        name: nullcontext if each is None and is_patched(pipe) else partial(patched, pipe, config=each)
        for name, each in chosen.items()
    }
    # Each is patched anew in each round, and would warn anew.
    with collected_warnings() as said:
        runs, reports = _timed_runs(pipe, call, steps, seed, seconds, progress, variants)
    for message in said:
        warn(message)
    baseline = runs.pop("baseline")
    return Comparison(
        baseline_run=baseline,
        variants={name: PatchedRun(run, baseline, reports[name]) for name, run in runs.items()},
        settings={
            "pipeline": type(pipe).__name__,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "steps": len(baseline.time.steps) if {"timesteps", "sigmas"} & options.keys() else steps,
            "guidance_scale": guidance_scale,
            "height": baseline.image.height,
            "width": baseline.image.width,
            "seconds": seconds,
            **_plain_patches(reports),
        },
        environment=environment(pipe._execution_device, pipe.unet.dtype),
        patch_warnings=said,
    )


def _timed_runs(
    pipe: Any,
    call: dict[str, Any],
    steps: int,
    seed: int,
    seconds: float,
    progress: Progress | None,
    variants: Mapping[str, Callable[[], AbstractContextManager]],
) -> tuple[dict[str, Run], dict[str, PatchReport]]:
    """The runs of the baseline and of every variant, within whose context it is drawn, and what that did to layers."""
    contexts: dict[str, Callable[[], AbstractContextManager]] = {"baseline": partial(unpatched, pipe), **variants}
    images = {
        name: TimedImage(pipe, call, steps, seed, f"with {name}" if name in variants else "without agentsd")
        for name in contexts
    }
    reports = {}

    def draw(name: str, watch: Stopwatch) -> None:
        images[name].draw(watch, f"{name}, round {len(images[name].watches) + 1}", progress)

    def is_clear() -> bool:
        before, *others = (image.rounds for image in images.values())
        return all(_speed_up(before, after, _per_step).is_difference for after in others)

    with ExitStack() as stack:

        def switch_to(name: str) -> None:
            stack.close()
            stack.enter_context(contexts[name]())

        def warm_up(name: str) -> None:
            switch_to(name)
            images[name].warm_up(f"{name}, warm-up", progress)

        # What is wrong with a patch is better known before the image without it than after.
        for name in [*variants, "baseline"]:
            warm_up(name)
            if name in variants:
                reports[name] = report(pipe)
        timed = [Variant(name, partial(draw, name)) for name in images]
        # Each switch has a compiled model compiled anew, and only so often.
        seconds, before_call = (0, warm_up) if _is_compiled(pipe) else (seconds, switch_to)
        time_rounds(timed, images["baseline"].device, seconds, is_clear, before_call)
    return {name: image.run() for name, image in images.items()}, reports


def _is_compiled(pipe: Any) -> bool:
    models = [model for model in (pipe.unet, getattr(pipe, "controlnet", None)) if isinstance(model, torch.nn.Module)]
    parts = [part for model in models for part in model.modules()]
    # As a whole by `torch.compile`, or in place, as diffusers does with blocks.
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)


def _speed_up(before: list[RunTime], after: list[RunTime], time_of: Callable[[RunTime], float]) -> SpeedUp:
    return SpeedUp.of([time_of(time) for time in before], [time_of(time) for time in after])


def _per_step(time: RunTime) -> float:
    return time.seconds_per_step


def _chosen_configs(
    config: AgentSDConfig | None, configs: Mapping[str, AgentSDConfig] | Sequence[PresetName] | None
) -> Mapping[str, AgentSDConfig | None]:
    """The patches to compare, by name; `None` is the pipeline's own, or else the default."""
    if configs is None:
        return {_ONLY: config}
    if config is not None:
        raise ValueError("Give either `config` or `configs`, not both.")
    if isinstance(configs, str) or not isinstance(configs, (Mapping, Sequence)):
        raise TypeError(f"`configs` must be names of presets, or configurations by name, but got {configs!r}.")
    if not configs:
        raise ValueError("`configs` is empty: there is nothing to compare with.")
    named = configs if isinstance(configs, Mapping) else {str(name): AgentSDConfig.preset(name) for name in configs}
    for name, each in named.items():
        if not isinstance(each, AgentSDConfig):
            raise TypeError(f"`configs[{name!r}]` must be an AgentSDConfig, but got {type(each).__name__}.")
        # Images are saved under these names.
        if not isinstance(name, str) or name in ("", *_TAKEN_NAMES) or Path(name).name != name:
            raise ValueError(f"A configuration cannot be called {name!r}, since its image is saved under that name.")
    return named


def _check(pipe: Any, prompt: str, steps: int, seed: int, seconds: float, options: dict[str, Any]) -> None:
    attended_models(pipe)  # raises what is wrong with another object
    check_draws_images(pipe)
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        raise TypeError(
            f"{type(pipe).__name__} cannot be timed step by step, as it takes no `callback_on_step_end`: patch it "
            "with `agentsd.apply_patch`, and compare what it draws before and after."
        )
    if not isinstance(prompt, str):
        raise TypeError(f"`prompt` must be one string, but got {type(prompt).__name__}.")
    for name, value, low in (("steps", steps, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an integer, but got {value!r}.")
        if value < low:
            raise ValueError(f"`{name}` must be at least {low}, but got {value}.")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"`seconds` must be a number, but got {seconds!r}.")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"`seconds` must be at least 0 and finite, but got {seconds}.")
    taken = sorted(_OWN_OPTIONS & options.keys())
    if taken:
        raise TypeError(
            f"A comparison sets {', '.join(taken)} itself. Use `steps` for the number of steps, and "
            "`seed` for the noise."
        )


def _label(name: str, time: RunTime) -> str:
    return f"{name}: {time.seconds_per_step:.3g} s per step"


def _plain_patches(reports: Mapping[str, PatchReport]) -> dict[str, Any]:
    patches = {name: each.config.to_dict() for name, each in reports.items()}
    return {"patch": patches[_ONLY]} if list(patches) == [_ONLY] else {"patches": patches}


def _plain_run(run: Run) -> dict[str, Any]:
    return {
        "seconds_per_step": run.time.seconds_per_step,
        "total_seconds": run.time.total,
        "step_seconds": run.time.steps,
        "rounds": [{"total_seconds": time.total, "step_seconds": time.steps} for time in run.rounds],
        "peak_bytes": run.peak_bytes,
    }
