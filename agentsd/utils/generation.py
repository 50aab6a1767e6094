"""One image of a pipeline: how it is drawn, timed and kept."""

import inspect
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..runtime.install import patch_of
from .calls import step_callback, without_tensors
from .images import drawn_images, image_warnings, to_image
from .memory import read_peak, start_peak
from .progress import Progress
from .timing import Stopwatch, time_call
from .user_warnings import cut_text, user_warnings


# With three steps, evenly spaced schedules reach both the agent phase and the ToMe phase.
_WARMUP_STEPS = 3
# With fewer, feature reuse is off.
_REUSE_STEPS = 8
# Each with the tokenizers that read it.
_NEGATIVE_PROMPTS = {"negative_prompt": ("tokenizer", "tokenizer_2"), "negative_prompt_2": ("tokenizer_2",)}


@dataclass(frozen=True)
class RunTime:
    """Seconds of each denoising step, the first with the text encoding, and from the prompt to the decoded image."""

    steps: list[float]
    total: float

    @property
    def seconds_per_step(self) -> float:
        """
        The mean step: the steps of the phases differ by design, and so do those that reuse features from the others.

        The first one, which runs the whole UNet, must not be left out, although it holds the text encoding, too.
        """
        return statistics.fmean(self.steps)


@dataclass(frozen=True)
class Run:
    """An image of shape `(height, width, 3)` in `[0, 1]`, and how long it took in each round in which it was drawn."""

    values: np.ndarray = field(repr=False)
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


@dataclass(frozen=True)
class Drawn:
    """What a pipeline gave, and what the user should hear of it."""

    output: Any
    said: list[str]

    @property
    def values(self) -> np.ndarray:
        """The first image, of shape `(height, width, 3)` in `[0, 1]`."""
        return drawn_images(self.output)[0]


def draw(
    pipe: Any,
    call: Mapping[str, Any],
    steps: int,
    generator: torch.Generator | list[torch.Generator],
    end_of_step: Callable[[], None] | None = None,
    said: list[str] | None = None,
) -> Drawn:
    """
    Call a pipeline for images, of which [`check_call`] has seen that it gives some.

    `end_of_step` is called after each step. What the user should hear of is added to `said`.
    """
    is_any_step_done = end_of_step is None

    def step_done() -> None:
        nonlocal is_any_step_done
        is_any_step_done = True
        if end_of_step is not None:
            end_of_step()

    callback = {} if end_of_step is None else step_callback(pipe, step_done)
    with user_warnings(said) as said:
        said += [text for text in dict.fromkeys(_cut_negative_prompts(pipe, call)) if text not in said]
        try:
            output = pipe(**call, num_inference_steps=steps, generator=generator, output_type="np", **callback)
        except (TypeError, ValueError) as error:
            shorter = without_tensors(error, call)
            if shorter is None:
                raise
            raise shorter from None
    if getattr(pipe, "interrupt", False):
        raise RuntimeError("The generation was interrupted.")
    if not is_any_step_done:
        raise ValueError(f"{type(pipe).__name__} took no step with these arguments, so that there is nothing to time.")
    try:
        drawn_images(output)
    except TypeError as error:
        # Its code did not tell: one from elsewhere.
        raise TypeError(
            f"{type(pipe).__name__} draws no images that agentsd finds: {error}. Patch it with `agentsd.apply_patch`, "
            "and call it yourself."
        ) from error
    return Drawn(output, said)


def _cut_negative_prompts(pipe: Any, call: Mapping[str, Any]) -> Iterator[str]:
    """The warnings that diffusers does not give: of a negative prompt, it leaves out the end without a word."""
    if not type(pipe).__module__.startswith("diffusers."):
        return
    for name, tokenizers in _NEGATIVE_PROMPTS.items():
        text = call.get(name)
        readers: list[Any] = [getattr(pipe, tokenizer, None) for tokenizer in tokenizers]
        for tokenizer in readers:
            if isinstance(text, str) and type(tokenizer).__name__.startswith("CLIPTokenizer"):
                ids, most = tokenizer(text).input_ids, tokenizer.model_max_length
                if len(ids) > most:
                    yield cut_text("negative prompt", most, tokenizer.decode(ids[most - 1 : -1]))


class TimedImage:
    """
    One image of a pipeline, drawn again in each round of a timing.

    `name` is what warnings call it; `said` is what the user has heard of already, of several images together.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        steps: int,
        seed: int,
        name: str,
        said: list[str] | None = None,
    ) -> None:
        self.pipe, self.call, self.steps, self.seed, self.name = pipe, call, steps, seed, name
        self.device = torch.device(pipe._execution_device)
        self.peak_bytes: int | None = None
        self._output: Any = None
        self._said: list[str] = [] if said is None else said
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
        warnings = [*self._said, *image_warnings(self._output, self.name, self.pipe.unet.dtype)]
        return Run(drawn_images(self._output)[0], self.rounds, self.peak_bytes, warnings)

    def _warmup_steps(self) -> int:
        # A pipeline that starts from an image runs only the last `strength` of the steps it is asked for.
        strength = inspect.signature(self.pipe.__call__).parameters.get("strength")
        share = 1 if strength is None else self.call.get("strength", strength.default)
        patch = patch_of(self.pipe.unet)
        steps = _WARMUP_STEPS if patch is None or patch.reuse is None else _REUSE_STEPS
        return min(self.steps, math.ceil(steps / share)) if share > 0 else self.steps

    def _draw(self, watch: Stopwatch, steps: int, what: str, progress: Progress | None) -> Any:
        done = 0

        def end_of_step() -> None:
            nonlocal done
            watch.mark()
            done += 1
            if progress is not None:
                # Fewer than `steps` if the pipeline starts from an image.
                progress(what, done, getattr(self.pipe, "num_timesteps", steps))

        if progress is not None:
            progress(what, 0, steps)
        # On the CPU, so that a seed means the same noise on every device.
        generator = torch.Generator().manual_seed(self.seed)
        with _progress_bar(self.pipe, what, is_shown=progress is None):
            return draw(self.pipe, self.call, steps, generator, end_of_step, self._said).output


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
