"""One timed image: warmed up first, and told of step by step."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from models import tiny_sd

import agentsd
from agentsd.utils.generation import Run, RunTime, generate_timed


def test_one_image_is_timed_after_a_warm_up():
    """What must happen in between, such as a seed set anew, happens there."""
    pipe, seen = tiny_sd(), []
    run = generate_timed(
        pipe,
        {"prompt": "a red apple"},
        steps=4,
        seed=0,
        name="with patience",
        progress=lambda *step: seen.append(step),
        prepare=lambda: seen.append("prepare"),
    )
    image, warm_up = ([("with patience", done, total) for done in range(total + 1)] for total in (4, 3))
    assert seen == [*warm_up, "prepare", *image]
    assert len(run.rounds) == 1 and run.time == run.rounds[0] and len(run.time.steps) == 4
    assert run.time.total > sum(run.time.steps) > 0
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    expected = pipe("a red apple", num_inference_steps=4, generator=generator, output_type="np").images[0]
    np.testing.assert_array_equal(run.values, expected)


def test_a_warm_up_is_long_enough_for_feature_reuse():
    """And a run that is not says so once."""
    for steps, warm_up in ((10, 8), (5, 5)):
        seen, pipe = [], agentsd.apply_patch(tiny_sd(), reuse=2)
        options = {"steps": steps, "seed": 0, "name": "it", "progress": lambda *step, seen=seen: seen.append(step)}
        if steps == 5:
            with pytest.warns(UserWarning, match="this one has 5") as said:
                generate_timed(pipe, {"prompt": "a red apple"}, **options)
            assert sum("Feature reuse" in str(warning.message) for warning in said) == 1
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Feature reuse")
                generate_timed(pipe, {"prompt": "a red apple"}, **options)
        assert [total for _, done, total in seen if done == 1] == [warm_up, steps]


def test_the_time_of_a_run_is_the_median_over_its_rounds():
    """Of each step by itself: one that was disturbed does not count."""
    rounds = [RunTime([1.0, 2.0, 9.0], 13.0), RunTime([1.5, 8.0, 2.0], 12.0), RunTime([1.2, 2.5, 2.1], 6.0)]
    assert Run(np.zeros((8, 8, 3)), rounds).time == RunTime([1.2, 2.5, 2.1], 12.0)


def test_the_library_draws_no_tables_by_itself():
    """Who uses it from Python or a page of their own does not load the command line's packages."""
    code = """
import sys
from huggingface_hub import hf_hub_download  # some versions load rich
others = set(sys.modules)
import agentsd.compare, agentsd.pipeline
from agentsd.utils import environment, generation, images, intervals, libraries, loading, memory, metrics, timing
print({"gradio", "rich", "typer"} & set(sys.modules) - others)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
