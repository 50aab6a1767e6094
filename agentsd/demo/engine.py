"""What the web page asks for: generations one at a time, within limits, each of which its owner can stop."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import PIL.Image
import torch

from ..bench.methods import METHODS, reseed
from ..bench.models import twin_pipeline
from ..bench.rows import named, short_name
from ..compare import Comparison, compare
from ..config import AgentSDConfig
from ..patch import patched
from ..token_maps import TokenMap, recorded_maps
from ..utils.generation import Run, check_draws_from_text, generate_timed
from ..utils.images import image_warnings, to_image
from ..utils.loading import BUILTIN_MODELS, load_pipeline, own_size, pick_device, pick_dtype, resolve_model
from ..utils.metrics import fidelity
from .queue import Progress, WaitingLine
from .requests import Limits, Wish


# Plain runs kept for the next comparison; one is 12 MB at 1024×1024.
_KEPT_RUNS = 16
# The embedded model tints its backgrounds at the guidance that Stable Diffusion is used with.
_GUIDANCE, _BUILTIN_GUIDANCE = 7.5, 4.0
SWEEP_METHODS = ("tomesd", "agentsd", "agentsd-agent", "agentsd-tome", "todo", "deepcache")


@dataclass(frozen=True)
class SweepRun:
    """
    One image of a sweep.

    Args:
        method (`str`): Name of the method.
        ratio (`float`, *optional*): Share of tokens merged.
        run (`Run`, *optional*): Image and times; `None` if the method could not run.
        speed_up (`float`, *optional*): How many times faster a step is than without the method.
        psnr (`float`, *optional*): Against the image without it, in decibels.
        ssim (`float`, *optional*): Against the image without it.
        reason (`str`, *optional*): Why it could not run.
        is_cached (`bool`): Whether it is an earlier run for the same visitor.
    """

    method: str
    ratio: float | None
    run: Run | None = None
    speed_up: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    reason: str | None = None
    is_cached: bool = False

    @property
    def name(self) -> str:
        """Method and ratio."""
        return named(self.method, self.ratio)


@dataclass(frozen=True)
class TokensRun:
    """
    One image, and what was merged on the way.

    Args:
        image (`PIL.Image.Image`): The image.
        maps (`dict[tuple[str, int], TokenMap]`):
            A map for each layer and step (counted from 0) at which something is merged.
        warnings (`list[str]`): What is wrong with the image.
    """

    image: PIL.Image.Image
    maps: dict[tuple[str, int], TokenMap]
    warnings: list[str]


class Engine:
    """
    Models, and the generations that visitors of the web page ask for.

    One generation runs at a time, since two beside each other would spoil both times; the others wait in line. A
    visitor (one open page) can stop their own generations, and sees no other's images.

    Args:
        models (`Sequence[str]`, defaults to `("emoji",)`):
            What [`load_pipeline`] takes; all loaded at once, so that no load disturbs a run.
        device (`str` or `torch.device`, *optional*): See [`pick_device`].
        dtype (`str` or `torch.dtype`, *optional*): See [`pick_dtype`].
        limits (`Limits`, *optional*): What a visitor may ask for.

    Raises:
        FileNotFoundError: If a model is a path where nothing is.
        TypeError: If a model cannot draw images from text alone.
        ValueError: If a model cannot be used, two have the same short name, or device or dtype cannot be used.

    Examples:

    ```python
    >>> from agentsd import AgentSDConfig
    >>> from agentsd.demo.engine import Engine
    >>> from agentsd.demo.requests import Wish
    >>> engine = Engine()
    >>> wish = Wish("red apple", "", "emoji", seed=0, steps=2, guidance_scale=4.0, height=256, width=256)
    >>> comparison, is_cached = engine.compare("one visitor", wish, AgentSDConfig(), lambda *step: None)
    >>> is_cached, engine.compare("one visitor", wish, AgentSDConfig(ratio=0.6), lambda *step: None)[1]
    (False, True)
    ```
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
        # Visitors see the last part of a path only.
        self._sources = {short_name(model): model for model in models}
        if len(self._sources) != len(models):
            raise ValueError(f"Two of the models {', '.join(models)} have the same name: name each once.")
        for model in models:
            resolve_model(model)
        self._pipes = {name: self._load(model) for name, model in self._sources.items()}
        self._plain_runs: OrderedDict[tuple[str, Wish], Run] = OrderedDict()
        self._line = WaitingLine(self.limits.waiting)
        # Visitors leave, and have their runs dropped, while another's is being kept.
        self._keeping = threading.Lock()

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self._sources)

    def own_settings(self, model: str) -> tuple[int, int, float]:
        """
        Height and width that a model draws best, as far as the limits allow, and a guidance that suits it.

        Args:
            model (`str`): One of the models.

        Returns:
            `tuple[int, int, float]`: Height and width in pixels, and the guidance.
        """
        height, width = own_size(self._pipes[model])
        guidance = _BUILTIN_GUIDANCE if self._sources[model] in BUILTIN_MODELS else _GUIDANCE
        return min(height, self.limits.side), min(width, self.limits.side), guidance

    def compare(self, visitor: str, wish: Wish, config: AgentSDConfig, progress: Progress) -> tuple[Comparison, bool]:
        """
        Draw an image without the patch, unless this visitor has it already, and with it.

        Args:
            visitor (`str`): Who asks.
            wish (`Wish`): What to draw.
            config (`AgentSDConfig`): The patch.
            progress (`Callable[[str, int, int], None]`): Told what goes on, the steps done and the steps in all.

        Returns:
            `tuple[Comparison, bool]`: The comparison, and whether the run without the patch is an earlier one.

        Raises:
            RuntimeError: If too many generations wait already.
            Stopped: If the visitor stopped it.
            TypeError: If an argument has the wrong type.
            ValueError: If an argument is out of range.
        """
        self._check(wish)
        with self._line.turn(visitor, progress) as told:
            is_cached = (visitor, wish) in self._plain_runs
            plain = self._plain_run(visitor, wish, told)
            comparison = compare(
                self._pipes[wish.model],
                config=config,
                steps=wish.steps,
                seed=wish.seed,
                progress=lambda _variant, done, total: told("with agentsd", done, total),
                baseline=plain,
                **wish.call,
            )
        return comparison, is_cached

    def tokens(self, visitor: str, wish: Wish, config: AgentSDConfig, progress: Progress) -> TokensRun:
        """
        Draw an image with the patch, and record what is merged on the way.

        Args:
            visitor (`str`): Who asks.
            wish (`Wish`): What to draw.
            config (`AgentSDConfig`): The patch.
            progress (`Callable[[str, int, int], None]`): Told what goes on, the steps done and the steps in all.

        Returns:
            `TokensRun`: The image, and what was merged.

        Raises:
            RuntimeError: If too many generations wait already.
            Stopped: If the visitor stopped it.
            TypeError: If an argument has the wrong type.
            ValueError: If an argument is out of range.
        """
        self._check(wish)
        with self._line.turn(visitor, progress) as told:
            pipe = self._pipes[wish.model]

            def end_of_step(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                # As many as the scheduler takes, which is more than asked for with some.
                told("with agentsd", index + 1, getattr(pipe, "num_timesteps", wish.steps))
                return tensors

            with patched(pipe, config=config), recorded_maps(pipe) as maps:
                output = pipe(
                    **wish.call,
                    num_inference_steps=wish.steps,
                    generator=torch.Generator().manual_seed(wish.seed),
                    output_type="np",
                    callback_on_step_end=end_of_step,
                )
        return TokensRun(to_image(output.images[0]), maps, image_warnings(output, "with agentsd", self.dtype))

    def sweep(
        self, visitor: str, wish: Wish, methods: Sequence[str], ratios: Sequence[float], progress: Progress
    ) -> list[SweepRun]:
        """
        Draw an image by several methods at several ratios, beside the one without any.

        Args:
            visitor (`str`): Who asks.
            wish (`Wish`): What to draw.
            methods (`Sequence[str]`): Names from `SWEEP_METHODS`.
            ratios (`Sequence[float]`): Shares of tokens to merge, for the methods that merge.
            progress (`Callable[[str, int, int], None]`): Told what goes on, the steps done and the steps in all.

        Returns:
            `list[SweepRun]`: The image without any method first. What cannot run says why.

        Raises:
            RuntimeError: If too many generations wait already.
            Stopped: If the visitor stopped it.
            ValueError: If an argument is out of range.
        """
        self._check(wish)
        cases = self._sweep_cases(methods, ratios)
        with self._line.turn(visitor, progress) as told:
            is_cached = (visitor, wish) in self._plain_runs
            plain = self._plain_run(visitor, wish, told)
            runs = [SweepRun("baseline", None, plain, 1.0, is_cached=is_cached)]
            for method, ratio in cases:
                name = SweepRun(method, ratio).name
                twin = twin_pipeline(self._pipes[wish.model])
                try:
                    METHODS[method].apply(twin, ratio, {})
                    prepare = partial(reseed, twin, wish.seed)
                    told_so = _named(told, name)
                    run = generate_timed(twin, wish.call, wish.steps, wish.seed, f"with {name}", told_so, prepare)
                except (RuntimeError, TypeError, ValueError) as error:
                    runs.append(SweepRun(method, ratio, reason=str(error)))
                    continue
                speed_up = plain.time.seconds_per_step / run.time.seconds_per_step
                runs.append(SweepRun(method, ratio, run, speed_up, *fidelity(run.values, plain.values)))
        return runs

    def stop(self, visitor: str) -> int:
        """
        Stop the generations of a visitor, running or waiting; they end at their next step.

        Args:
            visitor (`str`): Whose.

        Returns:
            `int`: How many there were.
        """
        return self._line.stop(visitor)

    def forget(self, visitor: str) -> None:
        """
        Stop the generations of a visitor who has left, and drop the images kept for them.

        Args:
            visitor (`str`): Whose.
        """
        self.stop(visitor)
        with self._keeping:
            for key in [key for key in self._plain_runs if key[0] == visitor]:
                del self._plain_runs[key]

    def _check(self, wish: Wish) -> None:
        if wish.model not in self._sources:
            raise ValueError(f"There is no model {wish.model!r} here. Choose one of {', '.join(self._sources)}.")
        wish.check(self.limits)

    def _plain_run(self, visitor: str, wish: Wish, told: Progress) -> Run:
        key = (visitor, wish)
        kept = self._plain_runs.get(key)
        if kept is None:
            what = "without agentsd"
            pipe = self._pipes[wish.model]
            kept = generate_timed(pipe, wish.call, wish.steps, wish.seed, what, _named(told, what))
        with self._keeping:
            if key not in self._plain_runs:
                told("without agentsd", wish.steps, wish.steps)  # raises if the visitor has left: nothing is kept then
            self._plain_runs[key] = kept
            self._plain_runs.move_to_end(key)
            while len(self._plain_runs) > _KEPT_RUNS:
                self._plain_runs.popitem(last=False)
        return kept

    def _load(self, model: str) -> Any:
        pipe = load_pipeline(model, device=self.device, dtype=self.dtype)
        check_draws_from_text(pipe)
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


def _named(told: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: told(what, done, total)
