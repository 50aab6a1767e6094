"""What the tests of feature reuse share: runs that count how often the deep part of a UNet ran, and its promise."""

import torch
from compat_models import (
    image,
)

import agentsd
from agentsd.techniques.feature_reuse import skippable_of

from .support import assert_differs, assert_no_trace, generate


STEPS = 10


EDIT = {"image": image(), "strength": 0.9}


class Calls:
    """Counts how often something deep in a model ran."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1

    def take(self):
        count, self.count = self.count, 0
        return count


def deep(pipe):
    return Calls(pipe.unet.mid_block.resnets[0])


def run_of(pipe, **options):
    return lambda: generate(pipe, **{"num_inference_steps": STEPS, **options})


def assert_forwards_are_their_own(*models):
    for model in models:
        for name, module in model.named_modules():
            assert skippable_of(module) is None, name


def check(pipe, run, *models, reuse=2, share=0.5, **options):
    """
    The promise: it skips, gives something near the baseline, the same the second time, and leaves nothing behind.

    `share` is that of the baseline's calls in which the deep part still runs.
    """
    models, calls = models or (pipe.unet,), deep(pipe)
    before, all_calls = run(), calls.take()
    agentsd.apply_patch(pipe, **{"ratio": 0, **options}, reuse=reuse)
    reused = run()
    # A run of an odd number of steps begins and ends with a full one.
    assert abs(calls.take() - share * all_calls) <= 1
    assert_differs(reused, before)
    assert torch.equal(run(), reused), "the same seed gives another image the second time"
    agentsd.remove_patch(pipe)
    assert torch.equal(run(), before)
    assert_no_trace(*models)
    assert_forwards_are_their_own(*models)
    return before, reused
