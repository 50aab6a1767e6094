"""One image of a pipeline: what the pipeline is called with, and how an image is drawn, timed and kept."""

import inspect
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch

from ..runtime.install import patch_of
from .images import image_warnings, to_image
from .memory import read_peak, start_peak
from .progress import Progress
from .timing import Stopwatch, time_call


# With three steps, evenly spaced schedules reach both the agent phase and the ToMe phase.
_WARMUP_STEPS = 3
# With fewer, feature reuse is off.
_REUSE_STEPS = 8


@dataclass(frozen=True)
class RunTime:
    """Seconds of each denoising step, the first with the text encoding, and from the prompt to the decoded image."""

    steps: list[float]
    total: float

    @property
    def seconds_per_step(self) -> float:
        """The mean step, without the first one if there are more: the steps of the two phases differ by design."""
        return statistics.fmean(self.steps[1:] or self.steps)


@dataclass(frozen=True)
class Run:
    """An image of shape `(height, width, 3)` in `[0, 1]`, and how long it took in each round in which it was drawn."""

    values: np.ndarray
    rounds: list[RunTime]
    peak_bytes: int | None = None  # of the whole process on a CPU; `None` where it cannot be measured
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def image(self) -> PIL.Image.Image:
        """The image as an image."""
        return to_image(self.values)

    @property
    def time(self) -> RunTime:
        """The median over the rounds, of each step and of the whole."""
        steps = zip(*(time.steps for time in self.rounds), strict=True)
        return RunTime(list(map(statistics.median, steps)), statistics.median(time.total for time in self.rounds))

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
    """The arguments that a pipeline is called with: those that were given, so that it keeps its own for the others."""
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
    """Refuse a pipeline that draws videos."""
    if "num_videos_per_prompt" in inspect.signature(pipe.__call__).parameters:
        raise TypeError(
            f"{type(pipe).__name__} draws videos, not images: patch it with `agentsd.apply_patch`, and call it "
            "yourself."
        )


def check_draws_from_text(pipe: Any) -> None:
    """Refuse a pipeline that cannot draw images from nothing but text."""
    check_draws_images(pipe)
    kind = type(pipe).__name__
    # Pipelines from elsewhere may take an image or leave it; those of diffusers that know the name need one.
    if hasattr(diffusers, kind) and "image" in inspect.signature(pipe.__call__).parameters:
        raise TypeError(
            f"{kind} starts from an image, but gets only a prompt here: load and call it in Python, with "
            "`agentsd.AgentSDPipeline`."
        )


class TimedImage:
    """One image of a pipeline, drawn again in each round of a timing; `name` is what warnings call it."""

    def __init__(self, pipe: Any, call: Mapping[str, Any], steps: int, seed: int, name: str) -> None:
        self.pipe, self.call, self.steps, self.seed, self.name = pipe, call, steps, seed, name
        self.device = torch.device(pipe._execution_device)
        self.peak_bytes: int | None = None
        self._output: Any = None
        self.watches: list[Stopwatch] = []

    def warm_up(self, what: str, progress: Progress | None = None) -> None:
        """Draw with few steps, which already take as much memory as all of them."""
        # Not where times are taken: memory that was given back before takes its time to come again.
        is_watched = start_peak(self.device)
        self._draw(Stopwatch(self.device), self._warmup_steps(), what, progress)
        self.peak_bytes = read_peak(self.device) if is_watched else None

    def draw(self, watch: Stopwatch, what: str, progress: Progress | None = None) -> None:
        """Draw the image. Its first one is kept, as the others are the same."""
        output = self._draw(watch, self.steps, what, progress)
        self.watches.append(watch)
        if self._output is None:
            self._output = output

    @property
    def rounds(self) -> list[RunTime]:
        """How long it took each time."""
        times = (watch.seconds() for watch in self.watches)
        return [RunTime(seconds[:-1], sum(seconds)) for seconds in times]

    def run(self) -> Run:
        """What came of it."""
        warnings = image_warnings(self._output, self.name, self.pipe.unet.dtype)
        return Run(self._output.images[0], self.rounds, self.peak_bytes, warnings)

    def _warmup_steps(self) -> int:
        # A pipeline that starts from an image runs only the last `strength` of the steps it is asked for.
        strength = inspect.signature(self.pipe.__call__).parameters.get("strength")
        share = 1 if strength is None else self.call.get("strength", strength.default)
        steps = _REUSE_STEPS if self._has_reuse() else _WARMUP_STEPS
        return min(self.steps, math.ceil(steps / share)) if share > 0 else self.steps

    def _has_reuse(self) -> bool:
        patch = patch_of(self.pipe.unet)
        return patch is not None and patch.reuse is not None

    def _draw(self, watch: Stopwatch, steps: int, what: str, progress: Progress | None) -> Any:
        done = 0

        def end_of_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            watch.mark()
            done += 1
            if progress is not None:
                # Fewer than `steps` if the pipeline starts from an image.
                progress(what, done, getattr(self.pipe, "num_timesteps", steps))
            return tensors

        if progress is not None:
            progress(what, 0, steps)
        with _progress_bar(self.pipe, what, is_shown=progress is None):
            output = self.pipe(
                **self.call,
                num_inference_steps=steps,
                # On the CPU, so that a seed means the same noise on every device.
                generator=torch.Generator().manual_seed(self.seed),
                output_type="np",
                callback_on_step_end=end_of_step,
            )
        if getattr(self.pipe, "interrupt", False):
            raise RuntimeError("The generation was interrupted.")
        return output


def generate_timed(
    pipe: Any,
    call: Mapping[str, Any],
    steps: int,
    seed: int,
    name: str,
    progress: Progress | None = None,
    prepare: Callable[[], None] | None = None,
) -> Run:
    """Warm a pipeline up, `prepare()`, then draw one image and time it once."""
    image = TimedImage(pipe, call, steps, seed, name)
    image.warm_up(name, progress)
    if prepare is not None:
        prepare()
    time_call(lambda watch: image.draw(watch, name, progress), image.device)
    return image.run()


@contextmanager
def _progress_bar(pipe: Any, what: str, is_shown: bool) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", {})
    # One bar after the other in the same line: nobody knows how many images there will be.
    options = {"desc": what, "leave": False, **before} if is_shown else {**before, "disable": True}
    pipe.set_progress_bar_config(**options)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
