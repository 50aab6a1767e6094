"""agentsd.compare: two honest images of one seed, and a pipeline left as it was."""

import math

import numpy as np
import PIL.Image
import pytest
from comparisons import PROMPT, compare, draw
from compat_models import image, tiny_gligen, with_unet
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from models import tiny_controlnet, tiny_refiner, tiny_sd, tiny_sd2, tiny_sdxl

import agentsd
from agentsd.models.unet import find_layers


def processors(pipe):
    return [layer.attn.processor for layer in find_layers(pipe.unet)]


def test_images_are_those_of_the_two_pipelines():
    """Exactly what the pipeline draws unpatched and patched: the comparison must not disturb either."""
    comparison = compare(tiny_sd(), PROMPT, steps=3, config=agentsd.AgentSDConfig(ratio=0.6))
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd()))
    np.testing.assert_array_equal(np.asarray(comparison.agentsd), draw(agentsd.apply_patch(tiny_sd(), ratio=0.6)))
    assert comparison.report.config.ratio == 0.6
    assert {row.tokens for row in comparison.report.rows} == {256}
    assert comparison.warnings == []
    assert 20 < comparison.psnr < math.inf
    assert 0.5 < comparison.ssim < 1


def test_nothing_merged_is_identical():
    """With `ratio=0` the two are the same bit for bit, and the comparison says so."""
    comparison = compare(tiny_sd(), PROMPT, steps=2, config=agentsd.AgentSDConfig(ratio=0))
    assert (comparison.psnr, comparison.ssim, comparison.difference_scale) == (math.inf, 1.0, 1)
    assert comparison.difference.getextrema() == ((0, 0), (0, 0), (0, 0))
    assert comparison.to_dict()["is_identical"]


@pytest.mark.parametrize("build", [tiny_sd2, tiny_sdxl])
def test_other_models(build):
    """Stable Diffusion 2 and SDXL take the same way."""
    comparison = compare(build(), PROMPT, steps=2, height=96, width=160, negative_prompt="blue", guidance_scale=3.0)
    assert comparison.baseline.size == comparison.agentsd.size == comparison.difference.size == (160, 96)
    assert comparison.settings["guidance_scale"] == 3.0
    assert comparison.psnr < math.inf


def test_pipelines_that_start_from_a_image():
    """Options go to the pipeline; the number of steps is then smaller than asked for, and progress knows it."""
    seen = []
    start = PIL.Image.new("RGB", (128, 128), "red")
    compare(tiny_refiner(), PROMPT, steps=4, image=start, strength=0.5, progress=lambda *step: seen.append(step))
    rounds = [(done, total) for what, done, total in seen if "round" in what and done]
    assert rounds == [(1, 2), (2, 2)] * 2


@pytest.mark.parametrize("options", [{"strength": 0.2}, {}], ids=["given", "the pipeline's own"])
def test_a_warm_up_that_starts_from_a_image_is_long_enough(options):
    """Of three steps at a low strength none would be run, which pipelines refuse. The refiner's own is 0.3."""
    start = PIL.Image.new("RGB", (128, 128), "red")
    comparison = compare(tiny_refiner(), PROMPT, steps=20, image=start, **options)
    assert len(comparison.baseline_time.steps) == len(comparison.agentsd_time.steps) == (4 if options else 6)


# --- the pipeline afterwards ------------------------------------------------------------------------------------


def test_unpatched_pipeline_stays_unpatched():
    """A comparison must not leave a patch behind."""
    pipe = tiny_sd()
    before = processors(pipe)
    compare(pipe, PROMPT, steps=1)
    assert not agentsd.is_patched(pipe)
    assert processors(pipe) == before


def test_a_patch_that_only_a_controlnet_has_is_off_for_the_plain_run():
    pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    options = {"steps": 2, "image": image()}
    plain = compare(pipe, "a", **options).baseline_run
    agentsd.apply_patch(pipe, max_downsample=4)
    agentsd.remove_patch(pipe.unet)
    again = compare(pipe, "a", **options).baseline_run
    assert np.array_equal(again.values, plain.values)
    assert agentsd.is_patched(pipe.controlnet) and not agentsd.is_patched(pipe.unet)


def test_the_wrapper_is_compared_as_its_pipeline():
    """A few steps of an image are warmed up with enough of them."""
    pipe = with_unet(StableDiffusionImg2ImgPipeline)
    options = {"steps": 20, "image": image(), "strength": 0.2}
    comparison = compare(agentsd.AgentSDPipeline(pipe), "a", **options)
    assert comparison.settings["pipeline"] == type(pipe).__name__


def test_a_pipeline_that_does_not_tell_of_its_steps_is_refused():
    class Silent(StableDiffusionPipeline):
        def __call__(self, prompt, num_inference_steps, generator, output_type):
            pytest.fail("it drew")

    with pytest.raises(TypeError, match=r"Silent .* takes no `callback_on_step_end`"):
        compare(with_unet(Silent), "a")


def test_a_pipeline_with_the_callback_of_older_ones():
    boxes = {"gligen_phrases": ["apple"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
    comparison = compare(tiny_gligen(), "a", steps=3, **boxes)
    assert len(comparison.baseline_time.steps) == len(comparison.agentsd_time.steps) == 3
    assert comparison.settings["options"] == boxes


def test_steps_of_ones_own_are_counted():
    pipe = with_unet(StableDiffusionPipeline)
    pipe.scheduler = EulerDiscreteScheduler()
    assert compare(pipe, "a", timesteps=[900, 500, 100]).settings["steps"] == 3


@pytest.mark.parametrize("config", [None, agentsd.AgentSDConfig(ratio=0.2)])
def test_patched_pipeline_keeps_its_patch(config):
    """Also its choice of layers, which no configuration can tell."""
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0.7, filter_fn=lambda name, module: name.startswith("up_blocks.2"))
    image = draw(pipe)
    comparison = compare(pipe, PROMPT, steps=3, config=config)
    assert comparison.settings["patch"]["ratio"] == (0.7 if config is None else 0.2)
    assert len(comparison.report.rows) == (2 if config is None else 3)
    assert agentsd.report(pipe).config.ratio == 0.7
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd()))
    np.testing.assert_array_equal(draw(pipe), image)


@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("variant", ["baseline", "agentsd"])
def test_cancelling_leaves_everything_as_it_was(variant, patch_first):
    """A web page stops a run by raising from the progress function."""
    pipe = tiny_sd()
    if patch_first:
        agentsd.apply_patch(pipe, ratio=0.7)
    image = draw(pipe)
    pipe._progress_bar_config = {"disable": True, "desc": "mine"}

    def cancel(name, done, total):
        if (name, done) == (f"{variant}, round 1", 1):
            raise InterruptedError("cancelled by the user")

    with pytest.raises(InterruptedError, match="cancelled by the user"):
        compare(pipe, PROMPT, steps=3, progress=cancel)
    assert agentsd.is_patched(pipe) == patch_first
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    np.testing.assert_array_equal(draw(pipe), image)


def test_interrupted_pipeline_is_no_result():
    """diffusers' own way to stop returns a half-made image: it must not be compared."""
    pipe = tiny_sd()

    def interrupt(name, done, total):
        pipe._interrupt = done == 1

    with pytest.raises(RuntimeError, match="was interrupted"):
        compare(pipe, PROMPT, steps=3, progress=interrupt)


def test_what_a_patch_has_said_before_is_said_of_each_comparison():
    """A patched pipeline warns once; whoever reads a comparison does not know of the others."""
    pipe = agentsd.apply_patch(tiny_sd(), reuse=2)
    expected = ["Feature reuse is off in runs of fewer than 8 steps; this one has 2."]
    for _ in range(2):
        assert compare(pipe, PROMPT, steps=2).warnings == expected
