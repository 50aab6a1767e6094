"""What is kept of a model's calls, by their place in the step."""

import torch

from agentsd.runtime.slots import Slots
from agentsd.runtime.steps import StepCounter


class Calls:
    """Calls of a model that keeps a list at each place."""

    def __init__(self):
        self.counter, self.slots = StepCounter(), Slots(list)

    def enter(self, timestep, signature="same"):
        self.counter.count(timestep, [float(timestep)])
        return self.slots.enter(self.counter, signature)


def test_each_place_in_the_step_has_its_own():
    calls = Calls()
    first, second = (calls.enter(timestep) for timestep in (900, 900))
    assert first is not second
    assert calls.enter(800) is first
    assert calls.enter(800) is second


def test_another_image_starts_with_nothing():
    calls = Calls()
    first = calls.enter(900)
    calls.enter(900)
    assert calls.enter(950) is not first
    assert len(calls.slots) == 1


def test_calls_of_another_kind_start_with_nothing():
    calls = Calls()
    first, second = calls.enter(900), calls.enter(900)
    other = calls.enter(800, "other")
    assert other is not first
    assert calls.enter(800) is second
    assert calls.enter(700, "other") is other


def test_a_model_called_at_one_timestep_on_and_on_keeps_no_more_and_no_more():
    """As whoever times it does."""
    calls = Calls()
    timestep = torch.tensor(900)
    kept = [calls.enter(timestep) for _ in range(1000)]
    assert len(calls.slots) < 100
    assert kept[-1] is not kept[-2]
    assert calls.enter(800) is kept[0]
