"""Which steps and layers match tokens anew, and which merge as others did: decided on the host, once a call."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .slots import Slots
from .state import KeptMatch, LayerState
from .steps import StepCounter
from .threads import PerThread


@dataclass
class KeptMatches:
    """
    What the layers have matched in the calls at one place in the step.

    Args:
        of_layer (`dict[str, KeptMatch]`): By the layer's name, or that of the group with which it shares.
        steps_left (`int`): In how many more steps that run everything it serves.
    """

    of_layer: dict[str, KeptMatch] = field(default_factory=dict)
    steps_left: int = 0


class MatchingState:
    """Where a thread is, and what it keeps."""

    def __init__(self) -> None:
        self.counter = StepCounter()
        self.slots: Slots[KeptMatches] = Slots(KeptMatches)


class Matching:
    """
    Keeps what the layers of one model match. A copy starts with nothing.

    Args:
        interval (`int`, *optional*): Of the steps in which all layers run, one of so many matches. Without it every
            step does, of those that run only some layers too.
        groups (`Sequence[str]`): For each layer, its name or that of its group, in which all merge as the first has
            matched.
    """

    def __init__(self, interval: int | None, groups: Sequence[str]):
        self.interval = interval
        self.groups = groups
        self.forget()

    def forget(self) -> None:
        """Keep nothing."""
        self.states = PerThread(MatchingState)

    def reset(self) -> None:
        """Begin a new image with the next call of this thread."""
        state = self.states.get()
        state.slots.clear()
        state.counter.restart()

    def begin_call(
        self, timestep: Any, values: list[float], signature: Any, is_skipped: bool, layers: Sequence[LayerState]
    ) -> None:
        """
        Hand to each layer what it has matched before, or where to note what it matches.

        Args:
            timestep (`torch.Tensor` or `float`): The timestep of the call.
            values (`list[float]`): Its values: one, or one a sample.
            signature (`Any`): What tells calls of other shapes, dtypes, devices and phases apart.
            is_skipped (`bool`): Whether only some layers run, for which what was matched last will do.
            layers (`Sequence[LayerState]`): The layers.
        """
        state = self.states.get()
        state.counter.count(timestep, values)
        # A backward pass may compute a block anew, after other steps. Samples in several steps are in several phases.
        if torch.is_grad_enabled() or len(values) > 1:
            self.end_call(layers, keep=False)
            return
        slot = state.slots.enter(state.counter, signature)
        if self.interval is None:
            slot.of_layer.clear()
        elif not is_skipped:
            if slot.steps_left == 0:
                slot.of_layer.clear()
                slot.steps_left = self.interval
            slot.steps_left -= 1
        for layer, group in zip(layers, self.groups, strict=True):
            layer.call.kept = slot.of_layer.setdefault(group, KeptMatch())

    def end_call(self, layers: Sequence[LayerState], keep: bool) -> None:
        """Take it back, to keep it or not: after an exception only some layers have matched."""
        for layer in layers:
            kept, layer.call.kept = layer.call.kept, None
            # For later calls, and not only for other layers in this one.
            if keep and self.interval is not None and kept is not None and layer.calls.is_compiled:
                kept.leave_graphs()
        if not keep:
            self.states.get().slots.clear()
