"""`torch.compile(mode="reduce-overhead")`: what is kept from step to step is not what the next step writes into."""

import pytest
import torch
from compat_models import image, with_unet
from diffusers import StableDiffusionControlNetPipeline
from graphs import OverwritingGraphs
from models import ONE_LEVEL, tiny_controlnet, tiny_unet
from torch._inductor.cudagraph_trees import MarkStepBox

import agentsd
from agentsd import FeatureReuseConfig
from agentsd.runtime.steps import Match

from .support import generate
from .test_compile import small_unet, walk


TIMESTEPS = torch.tensor([950, 930, 910, 890, 870, 140, 120, 100, 80, 60])
# What keeps something, each in another way, and how often a run of the ten steps copies a match: once for each layer
# or group, whenever it was matched anew to be kept. The second phase, from the sixth step on, has matches of its own.
KEEPING = [
    ({"ratio": 0, "reuse": 2}, 0),
    ({"ratio": 0, "reuse": FeatureReuseConfig(interval=3, order=0)}, 0),
    ({"preset": "balanced", "min_tokens": 0, "reuse": FeatureReuseConfig(branch=1)}, 5 * 2),
    ({"merge_mlp": True, "merge_crossattn": True, "match_interval": 2}, (3 + 3) * 2),
    # Four steps run both layers; the sixth, only one.
    ({"match_interval": 1, "reuse": FeatureReuseConfig(interval=3, branch=1)}, 4 * 2 + 1),
    ({"late_phase": "kv-merged", "share_matches": "level", "match_interval": 3}, (2 + 2) * 1),
    # Kept for other layers of the same step, not for later ones.
    ({"late_phase": "kv-merged", "share_matches": "block"}, 0),
]


@pytest.fixture(autouse=True)
def no_marks(fresh_compiler, monkeypatch):
    """Nobody has marked a step so far."""
    monkeypatch.setattr(MarkStepBox, "mark_step_counter", 0)


@pytest.fixture
def copied(monkeypatch):
    """Counts how often a match is copied."""
    counts, original = [0], Match.copy

    def copy(match):
        counts[0] += 1
        return original(match)

    monkeypatch.setattr(Match, "copy", copy)
    return counts


def mark_step(pipe, step, timestep, values):
    """A callback at the end of a step, so that the next one begins another run of CUDA graphs."""
    torch.compiler.cudagraph_mark_step_begin()
    return values


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_what_is_kept_is_overwritten():
    """Or nothing here would show anything."""
    add = torch.compile(lambda x: x + 1, backend=OverwritingGraphs())
    kept = add(torch.zeros(3))
    copy = kept.clone()
    add(torch.zeros(3))
    assert kept.isnan().all()
    assert torch.equal(copy, torch.ones(3))


def patched(options):
    return agentsd.apply_patch(small_unet(layers_per_block=2), **options)


@pytest.mark.parametrize(("options", "copies"), KEEPING, ids=str)
def test_a_whole_model(copied, options, copies):
    expected = walk(patched(options), TIMESTEPS)
    unet = torch.compile(patched(options), backend=OverwritingGraphs(), fullgraph=True)
    assert copied == [0]
    for run in (1, 2):
        assert_close(walk(unet, TIMESTEPS), expected)
        assert copied == [run * copies]


@pytest.mark.parametrize(("options", "copies"), KEEPING, ids=str)
def test_block_by_block(copied, options, copies):
    """Each block is a call of its own, so that steps have to be marked."""
    expected = walk(patched(options), TIMESTEPS)
    unet = patched(options)
    unet.compile_repeated_blocks(backend=OverwritingGraphs(), fullgraph=True)
    unet.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    assert copied == [0]
    for run in (1, 2):
        assert_close(walk(unet, TIMESTEPS), expected)
        assert copied == [run * copies]


@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_controlnet(guess_mode):
    """Steps have to be marked here, too: without a patch, the UNet reads what the ControlNet's graphs gave."""
    levels = {**ONE_LEVEL, "mid_block_type": "UNetMidBlock2DCrossAttn"}
    settings = {"image": image(), "guess_mode": guess_mode, "num_inference_steps": 12}

    def controlled():
        pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet(tiny_unet(**levels)), **levels)
        return agentsd.apply_patch(pipe, ratio=0, reuse=3)

    expected = generate(controlled(), **settings)
    pipe, graphs = controlled(), OverwritingGraphs()
    pipe.controlnet = torch.compile(pipe.controlnet, backend=graphs)
    pipe.unet = torch.compile(pipe.unet, backend=graphs)
    for _ in range(2):
        torch.compiler.cudagraph_mark_step_begin()
        assert_close(generate(pipe, **settings, callback_on_step_end=mark_step), expected)
