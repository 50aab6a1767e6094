"""The same image with and without the patch: times, fidelity, and both side by side."""

import inspect
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
from rich.table import Table
from rich.text import Text

from .config import AgentSDConfig
from .models.unet import attended_models
from .patch import is_patched, patched, unpatched
from .patch_report import PatchReport, report
from .utils.environment import environment
from .utils.generation import Run, RunTime, check_draws_images, generate_timed, pipeline_call
from .utils.images import difference_map, side_by_side
from .utils.metrics import decibels, fidelity, similarity


# Variant ("baseline" or "agentsd"), steps done, steps in all. Whatever it raises ends the comparison.
Progress = Callable[[str, int, int], None]

_OWN_OPTIONS = {
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "generator", "num_images_per_prompt"),
    *("num_inference_steps", "output_type", "return_dict"),
}


@dataclass(frozen=True)
class Comparison:
    """
    An image generated twice from one seed, without the patch (`baseline`) and with it (`agentsd`).

    Args:
        baseline_run (`Run`): Image, times and memory without the patch.
        agentsd_run (`Run`): The same with it.
        difference (`PIL.Image.Image`): Where they differ, brightened `difference_scale` times.
        difference_scale (`int`): How much the difference is brightened.
        side_by_side (`PIL.Image.Image`): All three with labels.
        psnr (`float`, *optional*): Peak signal-to-noise ratio in decibels, infinite for identical images.
        ssim (`float`, *optional*):
            Structural similarity, `None` for images of less than 11 pixels. Both are `None` if an image has values
            that are not finite.
        report (`PatchReport`): What the patch did to each layer.
        settings (`dict[str, Any]`): What was generated, and how.
        environment (`dict[str, Any]`): Machine and versions that it ran on.

    Examples:

    ```python
    >>> import agentsd
    >>> pipe = agentsd.AgentSDPipeline.from_pretrained("emoji")
    >>> comparison = pipe.compare("red apple", steps=2, progress=lambda *step: None)
    >>> comparison.agentsd.size, comparison.ssim < 1
    ((256, 256), True)
    >>> comparison.save("comparison")["side_by_side"].name
    'side_by_side.png'
    ```
    """

    baseline_run: Run
    agentsd_run: Run
    difference: PIL.Image.Image
    difference_scale: int
    side_by_side: PIL.Image.Image
    psnr: float | None
    ssim: float | None
    report: PatchReport
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def baseline(self) -> PIL.Image.Image:
        """The image without the patch."""
        return self.baseline_run.image

    @property
    def agentsd(self) -> PIL.Image.Image:
        """The image with the patch."""
        return self.agentsd_run.image

    @property
    def baseline_time(self) -> RunTime:
        """Time without the patch."""
        return self.baseline_run.time

    @property
    def agentsd_time(self) -> RunTime:
        """Time with the patch."""
        return self.agentsd_run.time

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the images: not finite, black, replaced by the safety checker."""
        return self.baseline_run.warnings + self.agentsd_run.warnings

    @property
    def speed_up(self) -> float:
        """How many times faster a step is with the patch."""
        return self.baseline_time.seconds_per_step / self.agentsd_time.seconds_per_step

    @property
    def total_speed_up(self) -> float:
        """How many times faster the whole generation is, with text encoding and decoding."""
        return self.baseline_time.total / self.agentsd_time.total

    def table(self) -> Table:
        """
        Times and fidelity as a table for the terminal.

        Returns:
            `rich.table.Table`: For `rich.print`.
        """
        title = f"{self.settings['prompt']!r}, seed {self.settings['seed']}, {_size_and_steps(self)}"
        table = Table(title=Text(title))  # as it is: a prompt may hold brackets, which rich would read as markup
        for heading in ("", "without agentsd", "with agentsd", "speed-up"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, before, after, gain in (
            ("per step", self.baseline_time.seconds_per_step, self.agentsd_time.seconds_per_step, self.speed_up),
            ("total", self.baseline_time.total, self.agentsd_time.total, self.total_speed_up),
        ):
            table.add_row(name, f"{before:.3f} s", f"{after:.3f} s", f"{gain:.2f}×")
        table.add_section()
        table.add_row("peak memory", self.baseline_run.peak, self.agentsd_run.peak, "")
        table.add_row("PSNR", "", decibels(self.psnr), "")
        table.add_row("SSIM", "", similarity(self.ssim), "")
        return table

    def to_dict(self) -> dict[str, Any]:
        """
        Everything but the images as plain values.

        Returns:
            `dict[str, Any]`: Ready for JSON: an infinite PSNR is `None`, as is an unknown one; `is_identical` tells
            the two apart.
        """
        return {
            "settings": self.settings,
            "environment": self.environment,
            "baseline": _plain_run(self.baseline_run),
            "agentsd": _plain_run(self.agentsd_run),
            "speed_up": self.speed_up,
            "total_speed_up": self.total_speed_up,
            "psnr": self.psnr if self.psnr is not None and math.isfinite(self.psnr) else None,
            "ssim": self.ssim,
            "is_identical": self.psnr == math.inf,
            "difference_scale": self.difference_scale,
            "warnings": self.warnings,
            "report": self.report.to_dict(),
        }

    def save(self, folder: str | Path) -> dict[str, Path]:
        """
        Write the images and `comparison.json`.

        Args:
            folder (`str` or `Path`): Created if it does not exist; files of these names in it are overwritten.

        Returns:
            `dict[str, Path]`: The files, under `"baseline"`, `"agentsd"`, `"side_by_side"` and `"comparison"`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / f"{name}.png" for name in ("baseline", "agentsd", "side_by_side")}
        for name, file in files.items():
            getattr(self, name).save(file)
        files["comparison"] = folder / "comparison.json"
        files["comparison"].write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return files


def compare(
    pipe: Any,
    prompt: str,
    *,
    config: AgentSDConfig | None = None,
    steps: int = 25,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    progress: Progress | None = None,
    baseline: Run | None = None,
    **options: Any,
) -> Comparison:
    """
    Generate one image with and without the patch, from the same seed.

    Each variant is warmed up before it is timed. Afterwards the pipeline is patched, or not, as it was before.

    Args:
        pipe (`DiffusionPipeline`):
            A pipeline with a UNet that draws images and takes `callback_on_step_end`, which is used to time steps.
        prompt (`str`): What to draw.
        config (`AgentSDConfig`, *optional*):
            The patch to compare with; by default the one that the pipeline has, or else `AgentSDConfig()`.
        steps (`int`, defaults to `25`): Denoising steps.
        guidance_scale (`float`, *optional*): Strength of the prompt; by default the pipeline's own.
        height (`int`, *optional*): Height in pixels; by default, like the width, the pipeline's own.
        width (`int`, *optional*): Width in pixels.
        seed (`int`, defaults to `0`): Seed of the noise.
        negative_prompt (`str`, *optional*): What not to draw.
        progress (`Callable[[str, int, int], None]`, *optional*):
            Called at each step with the variant, the steps done and the total of steps; during the warm-up, no step is
            done yet. An exception that it raises ends the comparison. It replaces the pipeline's progress bar.
        baseline (`Run`, *optional*):
            The run without the patch, if [`generate_timed`] has made it before with the same arguments.
        options: Passed to the pipeline, such as `image` and `strength`.

    Returns:
        `Comparison`: Both images, their difference, times and fidelity.

    Raises:
        RuntimeError: If the run was interrupted (`pipe._interrupt`).
        TypeError: If an argument has the wrong type, an option is one that the comparison sets itself, or the pipeline
            draws videos or takes no `callback_on_step_end`.
        ValueError: If an argument is out of range.

    Examples:

    ```python
    >>> from agentsd.compare import compare
    >>> from agentsd.utils.loading import load_pipeline
    >>> comparison = compare(load_pipeline("emoji"), "red apple", steps=2, progress=lambda *step: None)
    >>> comparison.speed_up > 0
    True
    ```
    """
    pipe = getattr(pipe, "pipe", pipe)  # an AgentSDPipeline's own
    _check(pipe, prompt, steps, seed, options)
    call = pipeline_call(prompt, guidance_scale, height, width, negative_prompt, **options)
    has_own_patch = config is None and is_patched(pipe)
    if not has_own_patch:
        with patched(pipe, config=config):
            pass  # what is wrong with it is better known before the image without it than after
    if baseline is None:
        with unpatched(pipe):
            baseline = generate_timed(pipe, call, steps, seed, "without agentsd", _part(progress, "baseline"))
    with nullcontext() if has_own_patch else patched(pipe, config=config):
        agentsd = generate_timed(pipe, call, steps, seed, "with agentsd", _part(progress, "agentsd"))
        patch_report = report(pipe)
    if baseline.values.shape != agentsd.values.shape:
        raise ValueError(
            f"`baseline` is a run of another size: {baseline.values.shape}, but the image is {agentsd.values.shape}."
        )

    difference, scale = difference_map(baseline.image, agentsd.image)
    ratio, likeness = fidelity(agentsd.values, baseline.values)
    labels = [
        f"without agentsd: {baseline.time.seconds_per_step:.3g} s per step",
        f"with agentsd: {agentsd.time.seconds_per_step:.3g} s per step",
        f"difference, {scale} times as bright",  # Pillow's built-in font has no multiplication sign
    ]
    return Comparison(
        baseline_run=baseline,
        agentsd_run=agentsd,
        difference=difference,
        difference_scale=scale,
        side_by_side=side_by_side([baseline.image, agentsd.image, difference], labels),
        psnr=ratio,
        ssim=likeness,
        report=patch_report,
        settings={
            "pipeline": type(pipe).__name__,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "steps": len(baseline.time.steps) if {"timesteps", "sigmas"} & options.keys() else steps,
            "guidance_scale": guidance_scale,
            "height": baseline.image.height,
            "width": baseline.image.width,
            "patch": patch_report.config.to_dict(),
        },
        environment=environment(pipe._execution_device, pipe.unet.dtype),
    )


def _check(pipe: Any, prompt: str, steps: int, seed: int, options: dict[str, Any]) -> None:
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
    taken = sorted(_OWN_OPTIONS & options.keys())
    if taken:
        raise TypeError(
            f"A comparison sets {', '.join(taken)} itself. Use `steps` for the number of steps, and "
            "`seed` for the noise."
        )


def _part(progress: Progress | None, variant: str) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, variant)


def _plain_run(run: Run) -> dict[str, Any]:
    return {
        "seconds_per_step": run.time.seconds_per_step,
        "total_seconds": run.time.total,
        "step_seconds": run.time.steps,
        "peak_bytes": run.peak_bytes,
    }


def _size_and_steps(comparison: Comparison) -> str:
    width, height, steps = (comparison.settings[name] for name in ("width", "height", "steps"))
    return f"{width}×{height}, {steps} steps"
