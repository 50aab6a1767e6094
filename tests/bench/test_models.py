"""What is measured: real shapes, shared weights, and inputs that repeat."""

import pytest
import torch
from bench_runs import speed
from diffusers import EulerAncestralDiscreteScheduler, UNet2DConditionModel

from agentsd.bench.methods import patchable_layers
from agentsd.bench.models import SHAPES, UNetSubject, share_weights, unet_inputs
from agentsd.bench.rows import Case
from agentsd.bench.run import subject_of
from agentsd.bench.schedulers import SCHEDULERS
from agentsd.utils.loading import load_pipeline
from agentsd.utils.metrics import psnr


@pytest.mark.parametrize(
    ("shape", "parameters", "layers"),
    [("sd15", 859_520_964, 5), ("sd21", 865_910_724, 5), ("sdxl", 2_567_463_684, 10)],
)
def test_the_shapes_are_the_real_ones(shape, parameters, layers):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES[shape])
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert len(patchable_layers(unet, {})) == layers


@pytest.mark.parametrize(("shape", "side"), [("sd15", 512), ("sd21", 768), ("sdxl", 1024)])
def test_the_shapes_have_the_native_size_of_their_models(shape, side):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES[shape])
    assert UNetSubject(shape, 0, torch.device("cpu"), torch.float32).size(unet) == (side, side)


def test_inputs_fit_the_model_and_repeat(unet):
    first, second = unet_inputs(unet, 64, 128), unet_inputs(unet, 64, 128)
    assert first["sample"].shape == (2, 4, 8, 16)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert unet_inputs(unet, 64, 128, batch=3)["sample"].shape == (6, 4, 8, 16)


def test_copies_share_weights_and_nothing_else(unet):
    """A dozen patched copies of a model of 3.4 GB must fit in memory."""
    twin = share_weights(unet)
    assert all(a is b for a, b in zip(unet.parameters(), twin.parameters(), strict=True))
    assert not {id(module) for module in unet.modules()} & {id(module) for module in twin.modules()}


def test_a_call_has_the_batch_of_its_case(shape):
    """With guidance, twice as many samples as images."""
    subject = UNetSubject("sd15", 0, torch.device("cpu"), torch.float32)
    call = subject.call(subject.load(), Case("sd15", "baseline", None, 64, 128, 3), 1)
    assert call.args[1]["sample"].shape == (6, 4, 8, 16)


def test_models_are_loaded_in_the_precision_asked_for(model, shape):
    half = torch.bfloat16
    assert subject_of(model, speed(model, dtype="bfloat16"), "a", "cpu").load().unet.dtype == half
    assert UNetSubject("sd15", 0, torch.device("cpu"), half).load().dtype == half


@pytest.mark.parametrize(("name", "steps"), [("ddim", 30), ("plms", 50), ("dpm++2m", 50)])
def test_schedulers_draw_what_the_embedded_model_was_taught(name, steps, emoji_128):
    """Its noise ends in no signal at all, which PLMS cannot start from and does not know of by itself."""
    pipe = load_pipeline(emoji_128, device="cpu")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe("a red apple", num_inference_steps=steps, guidance_scale=4.0, generator=generator).images[0]

    own = draw()
    levels = pipe.scheduler.alphas_cumprod
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler)
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, levels)
    assert psnr(draw(), own) > 35


def test_an_ancestral_scheduler_draws_from_the_same_noise_levels():
    own = load_pipeline("emoji", device="cpu").scheduler
    other = SCHEDULERS["euler-a"](own)
    assert isinstance(other, EulerAncestralDiscreteScheduler)
    torch.testing.assert_close(other.alphas_cumprod[:-1], own.alphas_cumprod[:-1])
