"""One image, generated after a warm-up and timed step by step."""

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch

from .images import image_warnings, to_image
from .memory import read_peak, start_peak


# With three steps, evenly spaced schedules reach both the agent phase and the ToMe phase.
_WARMUP_STEPS = 3


@dataclass(frozen=True)
class RunTime:
    """
    How long one generation took.

    Args:
        steps (`list[float]`): Seconds of each denoising step. The first contains the text encoding too.
        total (`float`): Seconds from the prompt to the decoded image.
    """

    steps: list[float]
    total: float

    @property
    def seconds_per_step(self) -> float:
        """The mean step, without the first one if there are more: the steps of the two phases differ by design."""
        return statistics.fmean(self.steps[1:] or self.steps)


@dataclass(frozen=True)
class Run:
    """
    One generation.

    Args:
        values (`np.ndarray` of shape `(height, width, 3)`): The image, in `[0, 1]`.
        time (`RunTime`): How long it took.
        peak_bytes (`int`, *optional*):
            Highest memory use, of the whole process on a CPU; `None` where it cannot be measured.
        warnings (`list[str]`): What is wrong with the image.
    """

    values: np.ndarray
    time: RunTime
    peak_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def image(self) -> PIL.Image.Image:
        """The image as an image."""
        return to_image(self.values)

    @property
    def peak(self) -> str:
        """The peak memory for people."""
        return "not measured" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f} GiB"


def pipeline_call(
    prompt: str,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    The arguments that a pipeline is called with: those that were given, so that it keeps its own for the others.

    Args:
        prompt (`str`): What to draw.
        guidance_scale (`float`, *optional*): Strength of the prompt.
        height (`int`, *optional*): Height in pixels.
        width (`int`, *optional*): Width in pixels.
        negative_prompt (`str`, *optional*): What not to draw.
        options: Anything else.

    Returns:
        `dict[str, Any]`: Arguments.

    Raises:
        ValueError: If only one of `height` and `width` is given.

    Examples:

    ```python
    >>> from agentsd.utils.generation import pipeline_call
    >>> pipeline_call("red apple", guidance_scale=4.0)
    {'prompt': 'red apple', 'guidance_scale': 4.0}
    ```
    """
    # Given one of them, some pipelines silently take their default for both.
    if (height is None) != (width is None):
        raise ValueError("Give both `height` and `width`, or neither.")
    given = {
        "prompt": prompt,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "negative_prompt": negative_prompt,
        **options,
    }
    return {name: value for name, value in given.items() if value is not None}


def check_draws_images(pipe: Any) -> None:
    """
    Refuse a pipeline that draws something else than images.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.

    Raises:
        TypeError: If it draws videos.

    Examples:

    ```python
    >>> from agentsd.utils.generation import check_draws_images
    >>> from agentsd.utils.loading import load_pipeline
    >>> check_draws_images(load_pipeline("emoji"))
    ```
    """
    if "num_videos_per_prompt" in inspect.signature(pipe.__call__).parameters:
        raise TypeError(
            f"{type(pipe).__name__} draws videos, not images: patch it with `agentsd.apply_patch`, and call it "
            "yourself."
        )


def check_draws_from_text(pipe: Any) -> None:
    """
    Refuse a pipeline that cannot draw images from nothing but text.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.

    Raises:
        TypeError: If it starts from an image, or draws videos.

    Examples:

    ```python
    >>> from agentsd.utils.generation import check_draws_from_text
    >>> from agentsd.utils.loading import load_pipeline
    >>> check_draws_from_text(load_pipeline("emoji"))
    ```
    """
    check_draws_images(pipe)
    kind = type(pipe).__name__
    # Pipelines from elsewhere may take an image or leave it; those of diffusers that know the name need one.
    if hasattr(diffusers, kind) and "image" in inspect.signature(pipe.__call__).parameters:
        raise TypeError(
            f"{kind} starts from an image, but gets only a prompt here: load and call it in Python, with "
            "`agentsd.AgentSDPipeline`."
        )


def generate_timed(
    pipe: Any,
    call: Mapping[str, Any],
    steps: int,
    seed: int,
    name: str,
    progress: Callable[[int, int], None] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Run:
    """
    Warm a pipeline up, then generate one image and time it.

    Args:
        pipe (`DiffusionPipeline`): The pipeline, patched or not.
        call (`Mapping[str, Any]`): The prompt and other arguments of the pipeline.
        steps (`int`): Denoising steps.
        seed (`int`): Seed of the noise.
        name (`str`): What to call the image in warnings.
        progress (`Callable[[int, int], None]`, *optional*):
            Called at each step with the steps done and the total of steps; during the warm-up, no step is done yet. An
            exception that it raises ends the generation. It replaces the pipeline's progress bar.
        prepare (`Callable[[], None]`, *optional*): Called between the warm-up and the image.

    Returns:
        `Run`: Image and times.

    Raises:
        RuntimeError: If the run was interrupted (`pipe._interrupt`).

    Examples:

    ```python
    >>> from agentsd.utils.generation import generate_timed
    >>> from agentsd.utils.loading import load_pipeline
    >>> run = generate_timed(load_pipeline("emoji"), {"prompt": "red apple"}, 2, 0, "plain", lambda done, of: None)
    >>> len(run.time.steps)
    2
    ```
    """

    def tell(done: int) -> None:
        if progress is not None:
            # Fewer than `steps` if the pipeline starts from an image.
            progress(done, getattr(pipe, "num_timesteps", steps) if done else steps)

    with _without_progress_bar(pipe):
        _run(pipe, call, _warmup_steps(pipe, call, steps), seed, lambda _done: tell(0))
    if prepare is not None:
        prepare()
    device = torch.device(pipe._execution_device)
    is_watched = start_peak(device)
    with nullcontext() if progress is None else _without_progress_bar(pipe):
        output, times = _run(pipe, call, steps, seed, tell)
    peak = read_peak(device) if is_watched else None
    return Run(output.images[0], times, peak, image_warnings(output, name, pipe.unet.dtype))


def _warmup_steps(pipe: Any, call: Mapping[str, Any], steps: int) -> int:
    # A pipeline that starts from an image runs only the last `strength` of the steps it is asked for.
    strength = inspect.signature(pipe.__call__).parameters.get("strength")
    share = 1 if strength is None else call.get("strength", strength.default)
    return min(steps, math.ceil(_WARMUP_STEPS / share)) if share > 0 else steps


@contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _run(
    pipe: Any, call: Mapping[str, Any], steps: int, seed: int, tell: Callable[[int], None]
) -> tuple[Any, RunTime]:
    device = torch.device(pipe._execution_device)
    seconds: list[float] = []
    mark = 0.0

    def end_of_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal mark
        synchronize(device)
        seconds.append(time.perf_counter() - mark)
        tell(len(seconds))
        mark = time.perf_counter()
        return tensors

    synchronize(device)
    start = mark = time.perf_counter()
    output = pipe(
        **call,
        num_inference_steps=steps,
        # On the CPU, so that a seed means the same noise on every device.
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=end_of_step,
    )
    synchronize(device)
    total = time.perf_counter() - start
    if getattr(pipe, "interrupt", False):
        raise RuntimeError("The generation was interrupted.")
    return output, RunTime(seconds, total)


def synchronize(device: torch.device) -> None:
    """
    Wait until the device has done all that was asked of it.

    Args:
        device (`torch.device`): Nothing to wait for on a CPU.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
