"""What a pipeline takes and gives is known before it is called, whatever pipeline of diffusers it is."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compat_models import (
    half_mask,
    image,
    tiny_animatediff,
    tiny_gligen,
    tiny_instruct_pix2pix,
    tiny_lcm,
    with_unet,
)
from diffusers import (
    I2VGenXLPipeline,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    MusicLDMPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from models import tiny_controlnet, tiny_refiner, tiny_sd, tiny_sdxl
from other_pipelines import (
    tiny_audio,
    tiny_image_variation,
    tiny_ldm3d,
    tiny_text_to_video,
    tiny_unclip,
    tiny_upscaler,
    without_size,
)

from agentsd.utils.calls import check_call, check_draws_from_text, pipeline_call
from agentsd.utils.generation import draw


PROMPT = {"prompt": "a red apple"}


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch, request):
    """A check is no check if it takes a call of the model to find out."""
    if "draws" not in request.node.name:
        monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a model ran"))


@pytest.mark.parametrize(
    ("build", "gives"),
    [
        (tiny_audio, "AudioLDMPipeline gives `audios`"),
        (lambda: tiny_audio(MusicLDMPipeline), "MusicLDMPipeline gives `audios`"),
    ],
)
def test_a_pipeline_that_gives_no_images_is_named(build, gives):
    for check in (check_call, check_draws_from_text):
        with pytest.raises(TypeError, match=rf"{gives}.* not images.* patch it with `agentsd.apply_patch`"):
            check(build(), PROMPT)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl, tiny_lcm, tiny_ldm3d, tiny_text_to_video, tiny_animatediff])
def test_a_pipeline_that_draws_from_text_is_let_through(build):
    check_draws_from_text(build(), PROMPT)
    check_call(build(), PROMPT, steps=1)


@pytest.mark.parametrize(
    ("build", "given", "missing"),
    [
        (lambda: with_unet(StableDiffusionImg2ImgPipeline), {}, "`image`"),
        (lambda: with_unet(StableDiffusionInpaintPipeline), {}, "`image` and `mask_image`"),
        (lambda: with_unet(StableDiffusionInpaintPipeline), {"image": image()}, "`mask_image`"),
        (lambda: with_unet(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet()), {}, "`image`"),
        (tiny_refiner, {}, "`image`"),
        (tiny_instruct_pix2pix, {}, "`image`"),
        (tiny_upscaler, {}, "`image`"),
        (tiny_unclip, {}, "`image`"),
        (tiny_gligen, {}, "`gligen_phrases` and `gligen_boxes`"),
        (tiny_gligen, {"gligen_phrases": ["apple"]}, "`gligen_boxes`"),
    ],
)
def test_what_is_missing_is_named(build, given, missing):
    """Judged by what is given: with it, the same pipeline is let through."""
    pipe = build()
    with pytest.raises(TypeError, match=f"{type(pipe).__name__} needs {missing} as well"):
        check_call(pipe, {**PROMPT, **given})
    if not given:
        words = "starts from an image" if "`image`" in missing else f"needs {missing}"
        with pytest.raises(TypeError, match=f"{words}, but gets only a prompt here"):
            check_draws_from_text(pipe, PROMPT)
    everything = {"image": image(), "mask_image": half_mask(), "gligen_phrases": ["apple"], "gligen_boxes": [[0] * 4]}
    takes = inspect.signature(pipe.__call__).parameters
    check_call(pipe, {**PROMPT, **{name: value for name, value in everything.items() if name in takes}})


def test_an_embedding_stands_for_an_image():
    check_call(tiny_unclip(), {**PROMPT, "image_embeds": torch.zeros(1, 32)})


def test_an_adapter_for_images_needs_one():
    pipe = tiny_sd()
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(TypeError, match="needs `ip_adapter_image` as well"):
        check_call(pipe, PROMPT)
    check_call(pipe, {**PROMPT, "ip_adapter_image_embeds": [torch.zeros(2, 1, 16)]})


def test_a_pipeline_without_a_prompt_is_given_none():
    pipe = tiny_image_variation()
    check_call(pipe, {"image": image()})
    with pytest.raises(TypeError, match="StableDiffusionImageVariationPipeline takes no `prompt`"):
        check_call(pipe, {**PROMPT, "image": image()})
    with pytest.raises(TypeError, match="starts from an image, but gets only a prompt"):
        check_draws_from_text(pipe, PROMPT)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl, tiny_text_to_video, lambda: with_unet(tiny_lcm().__class__)])
def test_an_argument_that_a_pipeline_does_not_know_is_named(build):
    """Many take any, and ignore in silence what they do not know."""
    with pytest.raises(TypeError, match="takes no `negativ_prompt` and `strengt`: leave that out"):
        check_call(build(), {**PROMPT, "negativ_prompt": "blue", "strengt": 1})


def test_a_pipeline_of_ones_own_may_take_any_argument():
    class MyPipeline(StableDiffusionPipeline):
        def __call__(self, prompt, num_inference_steps, generator, output_type, callback_on_step_end, **others):
            return super().__call__(prompt, num_inference_steps)

    pipe = with_unet(MyPipeline)
    check_call(pipe, {**PROMPT, "mine": 1})
    MyPipeline.__call__ = lambda self, prompt, generator2, callback_on_step_end=None: None
    with pytest.raises(TypeError, match="MyPipeline needs `generator2`"):
        check_call(pipe, PROMPT)


def test_a_pipeline_that_does_not_tell_of_its_steps_is_refused_where_they_are_timed():
    class NoCallback(StableDiffusionPipeline):
        def __call__(self, prompt, num_inference_steps=1, generator=None, output_type="np"):
            return super().__call__(prompt)

    pipe = with_unet(NoCallback)
    with pytest.raises(TypeError, match="NoCallback cannot be timed step by step"):
        check_call(pipe, PROMPT)
    check_draws_from_text(pipe, PROMPT, is_timed=False)


@pytest.mark.parametrize(
    ("call", "both"),
    [
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, "`prompt` or `prompt_embeds`"),
        ({"prompt_2": "b", "prompt_embeds": torch.zeros(1, 77, 32)}, "`prompt` and `prompt_2` or `prompt_embeds`"),
        ({"negative_prompt": "b", "negative_prompt_embeds": torch.zeros(1)}, "`negative_prompt` or `negative"),
    ],
)
def test_a_text_and_its_embedding_are_one_too_many(call, both):
    with pytest.raises(ValueError, match=f"Give either {both}.*, not both") as caught:
        check_call(tiny_sdxl(), {**PROMPT, **call})
    assert "tensor" not in str(caught.value)


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionInpaintPipeline, tiny_lcm().__class__])
def test_a_model_without_a_size_asks_for_one(kind):
    pipe = without_size(kind)
    others = {"image": image(), "mask_image": half_mask()} if kind is StableDiffusionInpaintPipeline else {}
    with pytest.raises(ValueError, match=f"{kind.__name__} does not say which size .* give `height` and `width`"):
        check_call(pipe, {**PROMPT, **others})
    check_call(pipe, {**PROMPT, **others, "height": 64, "width": 64})


def test_sdxl_without_a_size_asks_for_one():
    parts = tiny_sdxl(sample_size=None).components
    with pytest.raises(ValueError, match="give `height` and `width`"):
        check_draws_from_text(StableDiffusionXLPipeline(**parts), PROMPT)


def test_a_size_that_the_image_gives_is_not_asked_for():
    check_call(without_size(StableDiffusionImg2ImgPipeline), {**PROMPT, "image": image()})
    pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet(), sample_size=None)
    check_call(pipe, {**PROMPT, "image": image()})


@pytest.mark.parametrize(
    ("build", "strength", "steps", "lowest"),
    [
        (lambda: with_unet(StableDiffusionImg2ImgPipeline), 0.03, 25, "0.04"),
        (lambda: with_unet(StableDiffusionImg2ImgPipeline), 0, 3, "0.334"),
        (lambda: with_unet(StableDiffusionInpaintPipeline), 0.1, 9, "0.112"),
        (tiny_refiner, None, 3, "0.334"),
    ],
)
def test_a_strength_that_leaves_no_step_says_so(build, strength, steps, lowest):
    """Also the pipeline's own, which is 0.3 for the refiner."""
    pipe, call = build(), {**PROMPT, "image": image()}
    if isinstance(pipe, StableDiffusionInpaintPipeline):
        call["mask_image"] = half_mask()
    given = {} if strength is None else {"strength": strength}
    with pytest.raises(ValueError, match=rf"strength=.* leaves none of {steps} steps.* raise it to {lowest} or more"):
        check_call(pipe, {**call, **given}, steps)
    check_call(pipe, {**call, "strength": float(lowest)}, steps)
    check_call(pipe, {**call, **given, "strength": 0.5}, steps=2)
    check_call(pipe, {**call, **given})  # where the steps are not known


def test_a_strength_means_something_else_to_latent_consistency():
    """There it is a share of the steps of its training."""
    base = tiny_sd(time_cond_proj_dim=16)
    base.scheduler = LCMScheduler()
    pipe = with_unet(LatentConsistencyModelImg2ImgPipeline, base)
    check_call(pipe, {**PROMPT, "image": image(), "strength": 0.2}, steps=4)
    assert draws(pipe, {**PROMPT, "image": image(), "strength": 0.2}, 4) > 0


def draws(pipe, call, steps):
    """How many steps it takes, by what the model's calls would be."""
    pipe.scheduler.set_timesteps(steps, strength=call["strength"])
    return len(pipe.scheduler.timesteps)


@pytest.mark.parametrize("build", [tiny_ldm3d, tiny_text_to_video, tiny_animatediff])
def test_it_draws_the_image_of_several_outputs(build):
    """The image of an image with depth, the first frame of a video; and each step is told of."""
    done, pipe = [], build()
    call = {**PROMPT} if build is tiny_ldm3d else {**PROMPT, "num_frames": 2}
    drawn = draw(pipe, call, 2, torch.Generator().manual_seed(0), lambda: done.append(1))
    expected = pipe(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    first = expected.rgb[0] if build is tiny_ldm3d else expected.frames[0][0]
    assert drawn.values.shape == (128, 128, 3)
    np.testing.assert_array_equal(drawn.values, first)
    assert len(done) == 2


def returning(output):
    """A pipeline from elsewhere that gives this at once."""

    class Mine(StableDiffusionPipeline):
        def __call__(self, prompt, num_inference_steps, generator, output_type, callback_on_step_end=None):
            return output

    return with_unet(Mine)


def test_what_takes_no_step_is_no_image():
    with pytest.raises(ValueError, match="Mine took no step with these arguments"):
        draw(returning(SimpleNamespace(images=[])), PROMPT, 4, torch.Generator(), lambda: None)


def test_a_pipeline_from_elsewhere_that_gives_no_images_is_named():
    """Its code does not tell, so that it has to be called once."""
    pipe = returning(SimpleNamespace(sound=[]))
    check_call(pipe, PROMPT)
    with pytest.raises(TypeError, match="Mine draws no images that agentsd finds: there are no images in its Simple"):
        draw(pipe, PROMPT, 4, torch.Generator())


@pytest.mark.parametrize("kind", ["PIL", "torch"])
def test_a_pipeline_from_elsewhere_draws_images_of_another_kind(kind):
    expected = np.asarray(image(), dtype=np.float32) / 255
    given = image() if kind == "PIL" else torch.from_numpy(expected).permute(2, 0, 1)
    drawn = draw(returning(SimpleNamespace(images=[given])), PROMPT, 4, torch.Generator())
    np.testing.assert_array_equal(drawn.values, expected)


def test_what_it_draws_with_is_not_written_out_in_an_error():
    """diffusers writes out whole tensors."""
    pipe = tiny_sd()
    with pytest.raises(ValueError, match=r"Tensor of shape \(2, 77, 32\), float32") as caught:
        draw(pipe, {**PROMPT, "prompt_embeds": torch.zeros(2, 77, 32)}, 1, torch.Generator())
    assert "tensor(" not in str(caught.value)


def test_only_what_is_given_reaches_the_pipeline():
    assert pipeline_call(prompt_embeds=1) == {"prompt_embeds": 1}
    assert pipeline_call("a", height=8, width=8) == {"prompt": "a", "height": 8, "width": 8}


def test_an_image_for_a_video_is_asked_for():
    """Read from the class, as the pipeline itself is never called."""
    pipe = I2VGenXLPipeline.__new__(I2VGenXLPipeline)
    pipe.__dict__["unet"] = tiny_sd().unet
    with pytest.raises(TypeError, match="I2VGenXLPipeline starts from an image"):
        check_draws_from_text(pipe, PROMPT)
