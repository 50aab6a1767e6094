"""What the tests of comparisons share."""

import io
from functools import partial

import numpy as np
import torch
from rich.console import Console

import agentsd.compare


PROMPT = "a red apple"

# One round of each, as most of what is tested here is not about times.
compare = partial(agentsd.compare.compare, seconds=0)


def draw(pipe, steps=3):
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe(PROMPT, num_inference_steps=steps, generator=generator).images[0])


def shown(comparison):
    console = Console(width=120, file=io.StringIO())
    console.print(comparison.table())
    return console.file.getvalue()
