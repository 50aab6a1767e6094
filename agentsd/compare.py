"""The same picture with and without the patch: times, fidelity, and both side by side."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from rich.table import Table
from rich.text import Text

from .config import AgentSDConfig
from .metrics import psnr, ssim
from .patch import is_patched, patched, remove_patch
from .patch_report import PatchReport, report
from .pictures import difference_map, picture_warnings, side_by_side, to_image


# Variant ("vanilla" or "agentsd"), steps done, steps in all. Whatever it raises ends the comparison.
Progress = Callable[[str, int, int], None]

# With three steps, evenly spaced schedules reach both the agent phase and the ToMe phase.
_WARMUP_STEPS = 3
_OWN_OPTIONS = {
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "generator", "num_images_per_prompt"),
    *("num_inference_steps", "output_type", "return_dict"),
}


@dataclass(frozen=True)
class RunTime:
    """
    How long one generation took.

    Args:
        steps (`list[float]`): Seconds of each denoising step. The first contains the text encoding too.
        total (`float`): Seconds from the prompt to the decoded picture.
    """

    steps: list[float]
    total: float

    @property
    def seconds_per_step(self) -> float:
        """The mean step, without the first one if there are more: the steps of the two phases differ by design."""
        return statistics.fmean(self.steps[1:] or self.steps)


@dataclass(frozen=True)
class Comparison:
    """
    A picture generated twice from one seed, without the patch (`vanilla`) and with it (`agentsd`).

    Args:
        vanilla (`PIL.Image.Image`): The picture without the patch.
        agentsd (`PIL.Image.Image`): The picture with it.
        difference (`PIL.Image.Image`): Where they differ, brightened `difference_scale` times.
        difference_scale (`int`): How much the difference is brightened.
        side_by_side (`PIL.Image.Image`): All three with labels.
        vanilla_time (`RunTime`): Time without the patch.
        agentsd_time (`RunTime`): Time with it.
        psnr (`float`, *optional*): Peak signal-to-noise ratio in decibels, infinite for identical pictures.
        ssim (`float`, *optional*): Structural similarity. Both are `None` if a picture has values that are not finite.
        report (`PatchReport`): What the patch did to each layer.
        settings (`dict[str, Any]`): What was generated, and how.
        warnings (`list[str]`): What is wrong with the pictures: not finite, black, replaced by the safety checker.
    """

    vanilla: PIL.Image.Image
    agentsd: PIL.Image.Image
    difference: PIL.Image.Image
    difference_scale: int
    side_by_side: PIL.Image.Image
    vanilla_time: RunTime
    agentsd_time: RunTime
    psnr: float | None
    ssim: float | None
    report: PatchReport
    settings: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def speed_up(self) -> float:
        """How many times faster a step is with the patch."""
        return self.vanilla_time.seconds_per_step / self.agentsd_time.seconds_per_step

    @property
    def total_speed_up(self) -> float:
        """How many times faster the whole generation is, with text encoding and decoding."""
        return self.vanilla_time.total / self.agentsd_time.total

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
            ("a step", self.vanilla_time.seconds_per_step, self.agentsd_time.seconds_per_step, self.speed_up),
            ("in all", self.vanilla_time.total, self.agentsd_time.total, self.total_speed_up),
        ):
            table.add_row(name, f"{before:.3f} s", f"{after:.3f} s", f"{gain:.2f}×")
        table.add_section()
        table.add_row("PSNR", "", _decibels(self.psnr), "")
        table.add_row("SSIM", "", _similarity(self.ssim), "")
        return table

    def to_dict(self) -> dict[str, Any]:
        """
        Everything but the pictures as plain values.

        Returns:
            `dict[str, Any]`: Ready for JSON, so an infinite PSNR is `None`, as one that is not known; `is_identical`
            tells them apart.
        """
        return {
            "settings": self.settings,
            "vanilla": _plain_time(self.vanilla_time),
            "agentsd": _plain_time(self.agentsd_time),
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
        Write the pictures and `comparison.json`.

        Args:
            folder (`str` or `Path`): Made if it is not there; files of these names in it are replaced.

        Returns:
            `dict[str, Path]`: The files, under `"vanilla"`, `"agentsd"`, `"side_by_side"` and `"comparison"`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / f"{name}.png" for name in ("vanilla", "agentsd", "side_by_side")}
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
    **options: Any,
) -> Comparison:
    """
    Generate one picture with and without the patch, from the same seed.

    Each variant is warmed up before it is timed. Afterwards the pipeline is patched, or not, as it was before.

    Args:
        pipe (`DiffusionPipeline`): A pipeline with a UNet.
        prompt (`str`): What to draw.
        config (`AgentSDConfig`, *optional*):
            The patch to compare with; by default the one that the pipeline has, or else `AgentSDConfig()`.
        steps (`int`, defaults to `25`): Denoising steps.
        guidance_scale (`float`, *optional*): Strength of the prompt; by default the pipeline's own.
        height (`int`, *optional*): Height in pixels; by default, as the width, the pipeline's own.
        width (`int`, *optional*): Width in pixels.
        seed (`int`, defaults to `0`): Seed of the noise.
        negative_prompt (`str`, *optional*): What not to draw.
        progress (`Callable[[str, int, int], None]`, *optional*):
            Told the variant, the steps done and the steps in all, at each step; during the warm-up no step is done
            yet. An exception that it raises ends the comparison. It takes the place of the pipeline's progress bar.
        options: Passed to the pipeline, such as `image` and `strength`.

    Returns:
        `Comparison`: Both pictures, their difference, times and fidelity.

    Raises:
        RuntimeError: If the run was interrupted (`pipe._interrupt`).
        TypeError: If an argument has the wrong type, or an option is one that the comparison sets itself.
        ValueError: If an argument is out of range.

    Examples:

    ```python
    >>> from agentsd.compare import compare
    >>> from agentsd.pipeline import load_pipeline
    >>> comparison = compare(load_pipeline("emoji"), "red apple", steps=2, progress=lambda *step: None)
    >>> comparison.speed_up > 0
    True
    ```
    """
    _check(prompt, steps, seed, options)
    # Given one of them, some pipelines silently take their default for both.
    if (height is None) != (width is None):
        raise ValueError("Give both `height` and `width`, or neither.")
    given = {
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "negative_prompt": negative_prompt,
        **options,
    }
    call = {"prompt": prompt, **{name: value for name, value in given.items() if value is not None}}

    with _unpatched(pipe):
        before, vanilla_time, vanilla_warnings = _generate(pipe, call, steps, seed, "vanilla", progress)
    has_own_patch = config is None and is_patched(pipe)
    with nullcontext() if has_own_patch else patched(pipe, config=config):
        after, agentsd_time, agentsd_warnings = _generate(pipe, call, steps, seed, "agentsd", progress)
        patch_report = report(pipe)

    is_comparable = bool(np.isfinite(before).all() and np.isfinite(after).all())
    vanilla, agentsd = to_image(before), to_image(after)
    difference, scale = difference_map(vanilla, agentsd)
    fidelity = (psnr(before, after), ssim(before, after)) if is_comparable else (None, None)
    labels = [
        f"without agentsd: {vanilla_time.seconds_per_step:.3g} s a step",
        f"with agentsd: {agentsd_time.seconds_per_step:.3g} s a step",
        f"difference, {scale} times as bright",  # Pillow's built-in font has no multiplication sign
    ]
    return Comparison(
        vanilla=vanilla,
        agentsd=agentsd,
        difference=difference,
        difference_scale=scale,
        side_by_side=side_by_side([vanilla, agentsd, difference], labels),
        vanilla_time=vanilla_time,
        agentsd_time=agentsd_time,
        psnr=fidelity[0],
        ssim=fidelity[1],
        report=patch_report,
        settings={
            "pipeline": type(pipe).__name__,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "height": vanilla.height,
            "width": vanilla.width,
            "device": str(pipe._execution_device),
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "patch": patch_report.config.to_dict(),
        },
        warnings=vanilla_warnings + agentsd_warnings,
    )


def _check(prompt: str, steps: int, seed: int, options: dict[str, Any]) -> None:
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
            f"A comparison sets {', '.join(taken)} itself. For the number of steps and noise, there are "
            "`steps` and `seed`."
        )


@contextmanager
def _unpatched(pipe: Any) -> Iterator[None]:
    if not is_patched(pipe):
        yield
        return
    # When it ends, `patched` gives back whatever patch was there, with its choice of layers.
    with patched(pipe, config=report(pipe).config):
        remove_patch(pipe)
        yield


@contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _generate(
    pipe: Any, call: dict[str, Any], steps: int, seed: int, variant: str, progress: Progress | None
) -> tuple[np.ndarray, RunTime, list[str]]:
    """Warm up, then generate and time; returns values of shape `(height, width, 3)`, times and warnings."""

    def tell_warmup(_done: int) -> None:
        if progress is not None:
            progress(variant, 0, steps)

    def tell(done: int) -> None:
        if progress is not None:
            # Fewer than `steps` if the pipeline starts from a picture.
            progress(variant, done, getattr(pipe, "num_timesteps", steps))

    with _without_progress_bar(pipe):
        _run(pipe, call, min(steps, _WARMUP_STEPS), seed, tell_warmup)
    with nullcontext() if progress is None else _without_progress_bar(pipe):
        output, times = _run(pipe, call, steps, seed, tell)
    name = {"vanilla": "without agentsd", "agentsd": "with agentsd"}[variant]
    return output.images[0], times, picture_warnings(output, name, pipe.unet.dtype)


def _run(pipe: Any, call: dict[str, Any], steps: int, seed: int, tell: Callable[[int], None]) -> tuple[Any, RunTime]:
    device = torch.device(pipe._execution_device)
    seconds: list[float] = []
    mark = 0.0

    def end_of_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal mark
        _synchronize(device)
        seconds.append(time.perf_counter() - mark)
        tell(len(seconds))
        mark = time.perf_counter()
        return tensors

    _synchronize(device)
    start = mark = time.perf_counter()
    output = pipe(
        **call,
        num_inference_steps=steps,
        # On the CPU, so that a seed means the same noise on every device.
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=end_of_step,
    )
    _synchronize(device)
    total = time.perf_counter() - start
    if getattr(pipe, "interrupt", False):
        raise RuntimeError("The comparison was interrupted.")
    return output, RunTime(seconds, total)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _plain_time(run_time: RunTime) -> dict[str, Any]:
    return {
        "seconds_per_step": run_time.seconds_per_step,
        "total_seconds": run_time.total,
        "step_seconds": run_time.steps,
    }


def _size_and_steps(comparison: Comparison) -> str:
    width, height, steps = (comparison.settings[name] for name in ("width", "height", "steps"))
    return f"{width}×{height}, {steps} steps"


def _decibels(value: float | None) -> str:
    return "unknown" if value is None else "identical" if math.isinf(value) else f"{value:.2f} dB"


def _similarity(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
