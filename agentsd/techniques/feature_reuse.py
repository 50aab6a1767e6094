"""
Feature reuse: in most steps the deep part of the UNet is skipped, and what it would hand to the layers that still run
is forecast from the last steps in which it ran. With order 0 it is repeated, as in DeepCache (X. Ma, G. Fang, X. Wang,
CVPR 2024, arXiv:2312.00858).
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..models.cut import cut_unet
from ..models.other_packages import is_deepcached
from ..models.unet import inner_hooks
from ..ops.forecasting import forecast
from ..runtime.checks import keep_integer
from ..runtime.copies import copied
from ..runtime.resets import ResetHook
from ..runtime.slots import Slots
from ..runtime.stand_ins import shapes_of, stand_ins
from ..runtime.steps import StepCounter
from ..runtime.threads import PerThread


# With fewer steps, each is too far from the next for anything to be reused.
_FEWEST_STEPS = 8


@dataclass(frozen=True)
class FeatureReuseConfig:
    """
    Configuration of feature reuse.

    Args:
        interval (`int`, defaults to `2`): The whole UNet runs in one step of so many; 1 is every step.
        order (`int`, defaults to `1`): 0 repeats what the deep part gave last; 1 forecasts it from the last two.
        branch (`int`, defaults to `0`):
            How many layers of the up blocks, counted from the output, run in every step beside the last one. With each
            runs the layer of the down blocks whose output it reads. The same number as DeepCache's for UNets with
            three layers per up block.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.

    Examples:

    ```python
    >>> from agentsd import FeatureReuseConfig
    >>> FeatureReuseConfig(interval=3).order
    1
    ```
    """

    interval: int = 2
    order: int = 1
    branch: int = 0

    def __post_init__(self) -> None:
        keep_integer(self, "interval", low=1)
        keep_integer(self, "order", low=0)
        keep_integer(self, "branch", low=0)
        if self.order > 1:
            raise ValueError(f"`order` must be 0 (repeat) or 1 (forecast), but got {self.order}.")

    def is_full(self, step: int) -> bool:
        """Whether the whole UNet runs in a step."""
        return step % self.interval == 0


def refuse_other_caches(modules: Sequence[torch.nn.Module]) -> None:
    """Something else that skips the same modules would skip on its own schedule."""
    for module in modules:
        if is_deepcached(module):
            raise ValueError("The DeepCache package is enabled on this model: call its `disable()` first.")
        for hook in inner_hooks(module):
            if hook._is_stateful and not isinstance(hook, ResetHook):
                raise ValueError(
                    f"diffusers' {type(hook).__name__} is on a module that feature reuse skips: remove it first, or "
                    "leave out `reuse`."
                )


@dataclass
class Slot:
    """What is kept of the calls at one place in the step."""

    shapes: dict[int, Any] = field(default_factory=dict)
    # What has these shapes and is read by nobody.
    stand_ins: dict[int, Any] = field(default_factory=dict)
    # The last full steps, by their number, and what they gave.
    history: list[tuple[int, Any]] = field(default_factory=list)


@dataclass
class Call:
    """
    What the modules that can be skipped need to know of the call that runs.

    Args:
        is_skipped (`bool`): Whether they are skipped.
        outputs (`dict[int, Any]`): What each returns then.
        shapes (`dict[int, Any]`): Otherwise, the shape of what each returned.
        kept (`Any`): Otherwise, what is to be kept of it.
    """

    is_skipped: bool = False
    outputs: dict[int, Any] = field(default_factory=dict)
    shapes: dict[int, Any] = field(default_factory=dict)
    kept: Any = None


class ReuseState:
    """Where a thread is, and what is kept of its calls."""

    def __init__(self) -> None:
        self.slots: Slots[Slot] = Slots(Slot)
        self.scratch: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        # Calls of this image: all of them, and those in which everything ran.
        self.calls, self.full_calls = 0, 0


class ReuseClock:
    """The one clock of all models of a pipeline: a ControlNet runs in the steps in which the whole UNet runs."""

    def __init__(self, config: FeatureReuseConfig):
        self.config = config
        self.counter = StepCounter()
        self.warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "warned": set(self.warned)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, counter=StepCounter())

    def is_full(self, timestep: Any, values: list[float]) -> bool:
        """Count the step that a call belongs to, and tell whether the whole UNet runs in it."""
        counter = self.counter
        counter.count(timestep, values)
        if torch.is_grad_enabled():
            self._warn_once(
                "gradients",
                "Feature reuse is off while gradients are enabled: run the model under `torch.no_grad()` for it.",
            )
            return True
        if counter.steps is not None and counter.steps < _FEWEST_STEPS:
            self._warn_once(
                "steps",
                f"Feature reuse is off in runs of fewer than {_FEWEST_STEPS} steps; this one has {counter.steps}.",
            )
            return True
        if len(values) > 1:
            self._warn_once(
                "samples",
                "Feature reuse is off while the samples of a batch are at different timesteps, and so in different "
                "steps.",
            )
            return True
        return self.config.is_full(counter.step)

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self.warned and self.config.interval > 1:
            self.warned.add(topic)
            warnings.warn(message, stacklevel=2)


@dataclass(eq=False)
class Skippable:
    """
    A module that can be skipped: a plain object, so that a copied or pickled model has its own.

    Args:
        original (`Callable[..., Any]`): The module's forward before.
        number (`int`): Its number among those that are skipped.
        is_last (`bool`): Whether it is the one whose output matters.
        reuse (`ModelReuse`): What skips it.
    """

    original: Callable[..., Any]
    number: int
    is_last: bool
    reuse: "ModelReuse"


def run_or_skip(module: Skippable, *args: Any, **kwargs: Any) -> Any:
    """What a module returns, or what stands for it in a step that skips it."""
    # Something put around this later, such as offloading, may keep it here after the patch is gone.
    if not module.reuse.is_installed:
        return module.original(*args, **kwargs)
    call = module.reuse.calls.get()
    if call.is_skipped:
        return call.outputs[module.number]
    output = module.original(*args, **kwargs)
    call.shapes[module.number] = shapes_of(output)
    if module.is_last:
        call.kept = module.reuse.kept(output, kwargs)
    return output


def skippable_of(module: torch.nn.Module) -> Skippable | None:
    """What was put into a module that can be skipped, unless something is put around it."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, partial) or forward.func is not run_or_skip:
        return None
    skippable: Skippable = forward.args[0]
    return skippable


class ModelReuse(ABC):
    """Skips modules of one model when the clock says so. It knows none of them: a copied one must not bring others."""

    is_installed = False

    def __init__(self, clock: ReuseClock):
        self.clock = clock
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("states", "calls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def forget(self) -> None:
        """Keep nothing of what ran."""
        self.states = PerThread(ReuseState)
        self.calls = PerThread(Call)
        # For reports: of the last image in any thread, how many calls there were, and in how many everything ran.
        self.last_run = (0, 0)

    def reset(self) -> None:
        """Begin a new image with the next call of this thread; what others are in the middle of goes on."""
        self.state.slots.clear()
        self.clock.counter.restart()

    def repeat_warnings(self) -> None:
        """Say again, in the calls to come, what was said once."""
        self.clock.warned.clear()

    @property
    def state(self) -> ReuseState:
        """Where this thread is."""
        return self.states.get()

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code has run any of the modules."""
        return self.calls.is_compiled

    def install(self, modules: Sequence[torch.nn.Module]) -> None:
        """Make modules skippable; the last of them is the one whose output matters."""
        self.is_installed = True
        for number, module in enumerate(modules):
            is_last = number == len(modules) - 1
            # Not a bound method: torch 2.6 does not compile those of plain objects.
            module.forward = partial(run_or_skip, Skippable(module.forward, number, is_last, self))

    def uninstall(self, modules: Sequence[torch.nn.Module]) -> None:
        """Give the modules their own forward back, and keep nothing. What was put around it since stays."""
        self.is_installed = False
        for module in modules:
            skippable = skippable_of(module)
            if skippable is None or skippable.reuse is not self:
                continue
            del module.forward
            # Unless it is the class' own.
            if skippable.original != module.forward:
                module.forward = skippable.original
        self.forget()

    def check(self, modules: Sequence[torch.nn.Module]) -> None:
        """Refuse another cache that was put in since."""
        refuse_other_caches(modules)

    def begin_call(self, timestep: Any, values: list[float], sample: torch.Tensor) -> bool:
        """Decide, on the host, whether the call that begins is skipped, and make what the modules return then."""
        is_full = self.clock.is_full(timestep, values)
        state, counter = self.state, self.clock.counter
        if state.slots.image != counter.image:
            state.calls = state.full_calls = 0
        slot = state.slots.enter(counter, (sample.shape, sample.dtype, sample.device))
        call = self.calls.get()
        call.is_skipped = not is_full and bool(slot.history)
        if call.is_skipped:
            slot.stand_ins = slot.stand_ins or stand_ins(slot.shapes, state.scratch)
            call.outputs = self.outputs(slot)
        else:
            # Full steps need the most memory: they do not need this.
            state.scratch = {}
            for each in state.slots.values():
                each.stand_ins = {}
            # What this call gives will stand in for the oldest.
            slot.history = slot.history[max(0, len(slot.history) - self.clock.config.order) :]
            call.outputs = {}
        call.shapes, call.kept = {}, None
        self.calls.share()
        state.calls += 1
        state.full_calls += not call.is_skipped
        self.last_run = (state.calls, state.full_calls)
        return call.is_skipped

    def end_call(self) -> None:
        """Keep what a call that was not skipped gave."""
        state, call = self.state, self.calls.get()
        slot = state.slots.get(state.slots.place)
        if slot is not None and call.kept is not None:
            slot.shapes = call.shapes
            kept = copied(call.kept) if self.is_compiled else call.kept
            slot.history.append((state.slots.step, kept))
        call.is_skipped, call.outputs, call.shapes, call.kept = False, {}, {}, None

    @abstractmethod
    def kept(self, output: Any, kwargs: dict[str, Any]) -> Any:
        """What to keep of the last module's output."""

    @abstractmethod
    def outputs(self, slot: Slot) -> dict[int, Any]:
        """What the modules return in a step that skips them."""


class UNetReuse(ModelReuse):
    """Skips the deep part of a UNet: the last of its modules gives the tensor that is forecast."""

    def kept(self, output: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """A copy: what comes next may write into it, as FreeU does."""
        return (output if isinstance(output, torch.Tensor) else output[0]).clone()

    def outputs(self, slot: Slot) -> dict[int, Any]:
        """Stand-ins, and the forecast."""
        (last, newer), step = slot.history[-1], self.state.slots.step
        if len(slot.history) == 1:
            value = newer.clone()
        else:
            before, older = slot.history[0]
            value = forecast(older, newer, (step - last) / (last - before))
        last_module = max(slot.stand_ins)
        is_tuple = isinstance(slot.stand_ins[last_module], tuple)
        return {**slot.stand_ins, last_module: (value,) if is_tuple else value}


class ControlNetReuse(ModelReuse):
    """Skips a whole ControlNet: of what it gave last, the UNet reads only what goes to the layers that still run."""

    def __init__(self, clock: ReuseClock, residuals: int):
        super().__init__(clock)
        self.residuals = residuals

    def kept(self, output: Any, kwargs: dict[str, Any]) -> Any:
        """Also what kind of output it was."""
        down, mid = output[0], output[1]
        kind = None if isinstance(output, tuple) else type(output)
        # In guess mode it does not see it when guidance is switched off, whereupon the whole UNet runs and reads all.
        if kwargs.get("guess_mode"):
            return list(down), mid, kind
        return list(down[: self.residuals]), None, kind

    def outputs(self, slot: Slot) -> dict[int, Any]:
        """What was kept, and stand-ins."""
        (others, other_mid), (_, (kept, mid, kind)) = slot.stand_ins[0], slot.history[-1]
        down = [*kept, *others[len(kept) :]]
        mid = other_mid if mid is None else mid
        return {0: (down, mid) if kind is None else kind(down, mid)}


def apply_feature_reuse(
    unet: torch.nn.Module, controlnets: Sequence[torch.nn.Module], config: FeatureReuseConfig
) -> list[tuple[list[torch.nn.Module], ModelReuse]]:
    """What is skipped of a UNet and of its ControlNets, in this order; nothing is changed until it is installed."""
    cut = cut_unet(unet, config.branch)
    refuse_other_caches([unet, *cut.skipped])
    clock = ReuseClock(config)
    reuses: list[tuple[list[torch.nn.Module], ModelReuse]] = [(cut.skipped, UNetReuse(clock))]
    return reuses + [([net], ControlNetReuse(clock, cut.residuals)) for net in controlnets]
