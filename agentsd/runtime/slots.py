"""What a model keeps of its calls from step to step, by their place in the step."""

from collections.abc import Callable
from typing import Any, TypeVar

from .steps import StepCounter


Kept = TypeVar("Kept")

# More than a step of any pipeline makes: who calls a model at one timestep on and on, as to time it, is in one step.
_MOST_CALLS = 64


class Slots(dict[int, Kept]):
    """
    What a thread keeps of one model's calls: an object for each place in the step, since with split guidance each half
    is a call of its own. It serves no other image, and no calls of another kind.

    Args:
        make (`Callable[[], Any]`): Makes a place's object.
    """

    def __init__(self, make: Callable[[], Kept]):
        super().__init__()
        self.make = make
        self.image, self.step, self.place = -1, -1, 0
        self._signatures: dict[int, Any] = {}

    def enter(self, counter: StepCounter, signature: Any) -> Kept:
        """What is kept at the place of the call that begins, whose kind is told by its signature."""
        if self.image != counter.image:
            self.clear()
            self.image, self.step = counter.image, -1
        self.place = self.place + 1 if self.step == counter.step else 0
        self.step = counter.step
        if self.place >= _MOST_CALLS:
            return self.make()
        if self.place not in self or self._signatures[self.place] != signature:
            self[self.place], self._signatures[self.place] = self.make(), signature
        return self[self.place]
