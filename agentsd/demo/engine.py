"""The models of the web page, and the generations that its sessions ask for."""

import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import PIL.Image
import torch

from ..bench.methods import METHODS
from ..bench.models import twin_pipeline
from ..bench.peers import reseed
from ..bench.rows import named, short_name
from ..compare import compare
from ..comparison import Comparison
from ..config import AgentSDConfig
from ..patch import patched
from ..patch_report import PatchReport, report
from ..token_maps import TokenMap, recorded_maps
from ..utils.calls import check_call, check_draws_from_text
from ..utils.generation import Run, draw, generate_timed
from ..utils.images import image_warnings, to_image
from ..utils.loading import BUILTIN_MODELS, load_pipeline, own_size, pick_device, pick_dtype, resolve_model
from ..utils.metrics import fidelity
from ..utils.progress import Progress
from ..utils.timing import SpeedUp
from .requests import ImageRequest, Limits


# The embedded model tints its backgrounds at the guidance that Stable Diffusion is used with.
_GUIDANCE, _BUILTIN_GUIDANCE = 7.5, 4.0
# Where a model does not say which size it was made for.
_SIDE = 512
# What the page gives to a pipeline in any case, beside a prompt.
_SLIDERS = ("guidance_scale", "height", "width")
# Gradio drops what a page has waiting within ten seconds of its leaving, and may begin it until then.
_SECONDS_OF_LEAVING = 15.0
SWEEP_METHODS = (
    *("balanced", "fast", "agentsd", "agentsd-agent", "agentsd-tome"),
    *("reuse-2", "reuse-3", "tomesd", "todo", "deepcache"),
)


class Stopped(Exception):
    """A generation was stopped by its session."""


@dataclass(frozen=True)
class SweepRun:
    """One image of a sweep, timed once as a whole and judged against the baseline's; or why there is none."""

    method: str
    ratio: float | None
    run: Run | None = None
    speed_up: SpeedUp | None = None
    psnr: float | None = None
    ssim: float | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """Method and ratio."""
        return named(self.method, self.ratio)


@dataclass(frozen=True)
class TokensRun:
    """
    One image, and what was merged on the way: a map for each layer and step (counted from 0) that merged, how many
    steps there were, and what the patch did to each layer.
    """

    image: PIL.Image.Image
    maps: dict[tuple[str, int], TokenMap]
    steps: int
    report: PatchReport
    warnings: list[str]


class Engine:
    """
    Generates what sessions (open pages) ask for, within limits.

    One runs at a time, since two beside each other would spoil both times. All models are loaded at once, so that no
    load disturbs a time.
    """

    def __init__(
        self,
        models: Sequence[str] = ("emoji",),
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        # Sessions see the last part of a path only.
        self._sources = {short_name(model): model for model in models}
        if len(self._sources) != len(models):
            raise ValueError(f"Two of the models {', '.join(models)} have the same name: name each once.")
        for model in models:
            resolve_model(model)
        self._pipes = {name: self._load(model) for name, model in self._sources.items()}
        # Sessions wait in Gradio's queue. It cannot end a function that runs, though, and lets the next one in while
        # one that was stopped is still in its last step.
        self._turn = threading.Lock()
        self._stops: dict[threading.Event, tuple[str, str]] = {}
        # When each session left, by `time.monotonic`.
        self._left: dict[str, float] = {}

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self._sources)

    def own_settings(self, model: str) -> tuple[int, int, float]:
        """Height and width that a model draws best, as far as the limits allow, and a guidance that suits it."""
        try:
            height, width = own_size(self._pipes[model])
        except ValueError:
            height = width = _SIDE
        guidance = _BUILTIN_GUIDANCE if self._sources[model] in BUILTIN_MODELS else _GUIDANCE
        return min(height, self.limits.side), min(width, self.limits.side), guidance

    def compare(
        self, session: str, request: ImageRequest, config: AgentSDConfig, seconds: float, progress: Progress
    ) -> Comparison:
        """Draw an image without the patch and with it, and time both for at most so many seconds."""
        self._check(request)
        if not 0 <= seconds <= self.limits.seconds:
            raise ValueError(f"The seconds of timing must be from 0 to {self.limits.seconds}, but got {seconds}.")
        with self._stoppable(session, "compare", progress) as step:
            return compare(
                self._pipes[request.model],
                config=config,
                steps=request.steps,
                seed=request.seed,
                seconds=seconds,
                progress=step,
                **request.call,
            )

    def tokens(self, session: str, request: ImageRequest, config: AgentSDConfig, progress: Progress) -> TokensRun:
        """Draw an image with the patch, and record what is merged on the way."""
        self._check(request)
        pipe = self._pipes[request.model]
        with self._stoppable(session, "tokens", progress) as step:
            done = itertools.count(1)

            def end_of_step() -> None:
                # As many as the scheduler takes, which is more than asked for with some.
                step("with agentsd", next(done), getattr(pipe, "num_timesteps", request.steps))

            with patched(pipe, config=config), recorded_maps(pipe) as maps:
                generator = torch.Generator().manual_seed(request.seed)
                drawn = draw(pipe, request.call, request.steps, generator, end_of_step)
                layers = report(pipe, request.height, request.width)
            steps = getattr(pipe, "num_timesteps", request.steps)
        warnings = [*drawn.said, *image_warnings(drawn.output, "with agentsd", self.dtype)]
        return TokensRun(to_image(drawn.values), maps, steps, layers, warnings)

    def sweep(
        self, session: str, request: ImageRequest, methods: Sequence[str], ratios: Sequence[float], progress: Progress
    ) -> list[SweepRun]:
        """Draw the baseline's image first, and then the same by several methods at several ratios."""
        self._check(request)
        cases = self._sweep_cases(methods, ratios)
        with self._stoppable(session, "sweep", progress) as step:
            pipe, call = self._pipes[request.model], request.call
            baseline = generate_timed(pipe, call, request.steps, request.seed, "without agentsd", step)
            runs = [SweepRun("baseline", None, baseline, SpeedUp(1.0))]
            for method, ratio in cases:
                twin, name = twin_pipeline(pipe), f"with {named(method, ratio)}"
                try:
                    METHODS[method].apply(twin, ratio, {})
                    prepare = partial(reseed, twin, request.seed)
                    run = generate_timed(twin, call, request.steps, request.seed, name, step, prepare)
                except (RuntimeError, TypeError, ValueError) as error:
                    runs.append(SweepRun(method, ratio, reason=str(error)))
                    continue
                speed_up = SpeedUp(baseline.time.total / run.time.total)
                runs.append(SweepRun(method, ratio, run, speed_up, *fidelity(run.values, baseline.values)))
        return runs

    def stop(self, session: str, kind: str | None = None) -> None:
        """Stop what a session has running at its next step: all of it, or only `compare`, `tokens` or `sweep`."""
        for stop, (owner, name) in list(self._stops.items()):
            if owner == session and kind in (None, name):
                stop.set()

    def leave(self, session: str) -> None:
        """Stop what a session has running, and refuse what would begin for it in the next seconds."""
        now = time.monotonic()
        for other, since in list(self._left.items()):
            if now - since > _SECONDS_OF_LEAVING:
                self._left.pop(other, None)
        self._left[session] = now
        self.stop(session)

    @contextmanager
    def _stoppable(self, session: str, kind: str, progress: Progress) -> Iterator[Progress]:
        """Wait for a turn, and yield a `progress` that raises once the generation is to stop."""
        stop = threading.Event()

        def step(name: str, done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped("The generation was stopped.")
            progress(name, done, total)

        # Before looking at who has left: a session that leaves in between is stopped.
        self._stops[stop] = session, kind
        try:
            if time.monotonic() - self._left.get(session, -math.inf) <= _SECONDS_OF_LEAVING:
                raise RuntimeError(
                    "The connection to this page was lost a moment ago. "
                    f"Ask again in {_SECONDS_OF_LEAVING:.0f} seconds."
                )
            with self._turn:
                yield step
        finally:
            del self._stops[stop]

    def _check(self, request: ImageRequest) -> None:
        if request.model not in self._sources:
            raise ValueError(f"There is no model {request.model!r} here. Choose one of {', '.join(self._sources)}.")
        request.check(self.limits)
        check_call(self._pipes[request.model], request.call, request.steps)

    def _load(self, model: str) -> Any:
        pipe = load_pipeline(model, device=self.device, dtype=self.dtype)
        check_draws_from_text(pipe, dict.fromkeys(("prompt", *_SLIDERS)))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _sweep_cases(self, methods: Sequence[str], ratios: Sequence[float]) -> list[tuple[str, float | None]]:
        if len(ratios) > self.limits.sweep:
            raise ValueError(f"There are {len(ratios)} ratios, and at most {self.limits.sweep} runs are allowed.")
        unknown = [name for name in methods if name not in SWEEP_METHODS]
        if unknown or not methods:
            raise ValueError(f"Choose from the methods {', '.join(SWEEP_METHODS)}.")
        for ratio in ratios:
            AgentSDConfig(ratio=ratio)  # refuses what is out of range
        cases: list[tuple[str, float | None]] = []
        for name in dict.fromkeys(methods):
            cases += [(name, ratio) for ratio in dict.fromkeys(ratios)] if METHODS[name].has_ratio else [(name, None)]
        if not cases:
            raise ValueError("Give at least one ratio.")
        if len(cases) + 1 > self.limits.sweep:
            raise ValueError(
                f"This sweep has {len(cases) + 1} runs, and at most {self.limits.sweep} are allowed: leave out some."
            )
        return cases
