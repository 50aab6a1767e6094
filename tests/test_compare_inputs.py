"""agentsd.compare: whatever a pipeline takes and gives, and mistakes that are named before any image."""

import json
import math

import numpy as np
import pytest
import torch
from comparisons import PROMPT, compare, draw, shown
from compat_models import half_mask, image, tiny_animatediff, tiny_instruct_pix2pix, with_unet
from diffusers import (
    MusicLDMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from models import TEXT_WIDTH, tiny_sd, tiny_sdxl
from other_pipelines import (
    tiny_audio,
    tiny_image_variation,
    tiny_ldm3d,
    tiny_text_to_video,
    tiny_unclip,
    tiny_upscaler,
)

import agentsd


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": ["one", "two"]}, TypeError, "must be one string, but got list"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1, but got 0"),
        ({"steps": 2.5}, TypeError, "`steps` must be an integer, but got 2.5"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"seed": 2**63}, ValueError, "`seed` must be below"),
        ({"seed": True}, TypeError, "`seed` must be an integer"),
        ({"seconds": -1}, ValueError, "`seconds` must be at least 0 and finite, but got -1"),
        ({"seconds": math.nan}, ValueError, "`seconds` must be at least 0 and finite, but got nan"),
        ({"seconds": "30"}, TypeError, "`seconds` must be a number, but got '30'"),
        ({"num_inference_steps": 5}, TypeError, "sets num_inference_steps itself"),
        ({"generator": None, "output_type": "pt"}, TypeError, "sets generator, output_type itself"),
        ({"config": {"ratio": 0.5}}, TypeError, "must be an AgentSDConfig"),
        ({"configs": ["fast", "slow"]}, ValueError, "no preset 'slow'. Choose one of paper, agent, tome, balanced"),
        ({"configs": {"mine": 0.5}}, TypeError, r"`configs\['mine'\]` must be an AgentSDConfig, but got float"),
        ({"configs": "fast"}, TypeError, "`configs` must be names of presets, or configurations by name"),
        ({"configs": []}, ValueError, "`configs` is empty"),
        ({"configs": {"baseline": agentsd.AgentSDConfig()}}, ValueError, "cannot be called 'baseline'"),
        ({"configs": {"a/b": agentsd.AgentSDConfig()}}, ValueError, "cannot be called 'a/b'"),
        ({"configs": ["fast"], "config": agentsd.AgentSDConfig()}, ValueError, "either `config` or `configs`"),
        ({"height": 100, "width": 96}, ValueError, "divisible by 8"),
        ({"height": 96}, ValueError, "both `height` and `width`"),
    ],
)
def test_bad_input(options, error, message):
    """Each mistake is named, and the pipeline is not touched by it."""
    pipe = tiny_sd()
    with pytest.raises(error, match=message):
        compare(pipe, **{"prompt": PROMPT, "steps": 1, **options})
    assert not agentsd.is_patched(pipe)


@pytest.mark.parametrize("build", [tiny_text_to_video, tiny_animatediff, tiny_ldm3d])
def test_the_first_frame_of_a_video_and_the_image_beside_a_depth_map(build):
    """What is compared is what the pipeline draws, without the patch and with it."""
    options = {} if build is tiny_ldm3d else {"num_frames": 2}
    comparison = compare(build(), PROMPT, steps=2, config=agentsd.AgentSDConfig(ratio=0.6), **options)
    for pipe, run in (
        (build(), comparison.baseline_run),
        (agentsd.apply_patch(build(), ratio=0.6), comparison.agentsd_run),
    ):
        generator = torch.Generator().manual_seed(0)
        output = pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="np", **options)
        np.testing.assert_array_equal(run.values, output.rgb[0] if build is tiny_ldm3d else output.frames[0][0])
    assert comparison.psnr < math.inf
    assert len(comparison.baseline_time.steps) == 2


@pytest.mark.parametrize("build", [tiny_audio, lambda: tiny_audio(MusicLDMPipeline)])
def test_a_pipeline_that_gives_sound(build):
    """Found out before anything runs."""
    pipe = build()
    with pytest.raises(TypeError, match=f"{type(pipe).__name__} gives `audios`, not images"):
        compare(pipe, PROMPT)
    assert not agentsd.is_patched(pipe)


def no_tensor_in(text):
    return not any(words in text for words in ("tensor(", "array(", "at 0x"))


def test_embeddings_instead_of_a_prompt(tmp_path):
    """As for weighted or long prompts; the same image as with the prompt, and no tensor in what is written."""
    pipe = tiny_sd()
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    comparison = compare(pipe, steps=2, prompt_embeds=embeds, negative_prompt_embeds=negative)
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd(), steps=2))
    saved = json.loads(comparison.save(tmp_path)["comparison"].read_text(encoding="utf-8"))
    assert saved["settings"]["prompt"] is None
    assert saved["settings"]["options"]["prompt_embeds"] == f"Tensor of shape (1, 77, {TEXT_WIDTH}), float32"
    assert no_tensor_in(json.dumps(saved)) and no_tensor_in(repr(comparison))
    assert "prompt_embeds, negative_prompt_embeds, seed 0, 128×128" in " ".join(shown(comparison).split())


def test_embeddings_of_sdxl_and_a_second_prompt():
    pipe = tiny_sdxl()
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, device="cpu")
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    options |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    with_embeds = compare(pipe, steps=2, **options)
    np.testing.assert_array_equal(with_embeds.baseline_run.values, compare(pipe, PROMPT, steps=2).baseline_run.values)
    second = compare(pipe, PROMPT, steps=2, prompt_2="a blue heart")
    assert second.settings["options"] == {"prompt_2": "a blue heart"}
    assert not np.array_equal(second.baseline_run.values, with_embeds.baseline_run.values)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (
            lambda: with_unet(StableDiffusionInpaintPipeline),
            {"prompt": "a", "image": image(), "mask_image": half_mask()},
        ),
        (tiny_instruct_pix2pix, {"prompt": "a", "image": image(), "image_guidance_scale": 2.0}),
        (tiny_upscaler, {"prompt": "a", "image": image(size=32), "noise_level": 5}),
        (tiny_image_variation, {"image": image()}),
        (tiny_unclip, {"image": image()}),
        (tiny_unclip, {"prompt": "a", "image_embeds": torch.ones(1, TEXT_WIDTH)}),
        (tiny_sd, {"prompt": "a", "latents": torch.ones(1, 4, 16, 16)}),
        (tiny_sd, {"prompt": "a", "eta": 0.5, "guidance_rescale": 0.5}),
    ],
)
def test_whatever_a_pipeline_takes(build, options, tmp_path):
    """With or without a prompt; also through the wrapper, and in what is written of it."""
    pipe = build()
    comparison = agentsd.AgentSDPipeline(pipe).compare(steps=4, seconds=0, **options)
    generator = torch.Generator().manual_seed(0)
    with agentsd.patch.unpatched(pipe):
        expected = pipe(**options, num_inference_steps=4, generator=generator, output_type="np").images[0]
    np.testing.assert_array_equal(comparison.baseline_run.values, expected)
    others = {name: value for name, value in options.items() if name != "prompt"}
    assert comparison.settings["options"].keys() == others.keys()
    assert no_tensor_in(comparison.save(tmp_path)["comparison"].read_text(encoding="utf-8"))
    assert no_tensor_in(shown(comparison))


def test_errors_write_out_no_tensors():
    """Those of diffusers as well."""
    pipe, embeds = tiny_sd(), torch.zeros(1, 77, TEXT_WIDTH)
    for options, message in (
        ({"prompt": PROMPT, "prompt_embeds": embeds}, "either `prompt` or `prompt_embeds`"),
        ({"prompt_embeds": embeds.repeat(3, 1, 1)}, r"draws one image, but .* Tensor of shape \(3, 77, 32\)"),
        ({"prompt": embeds}, "must be one string, but got Tensor"),
        ({"prompt": PROMPT, "steps": embeds}, r"an integer, but got Tensor of shape"),
        ({"prompt": PROMPT, "seconds": embeds.numpy()}, r"a number, but got ndarray of shape"),
        ({"prompt": PROMPT, "configs": embeds}, r"but got Tensor of shape"),
        ({"prompt": PROMPT, "ip_adapter_image_embeds": embeds}, "has to be of type `list`"),
    ):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            compare(pipe, **{"steps": 1, **options})
        assert no_tensor_in(str(caught.value)) and len(str(caught.value)) < 400
    with pytest.raises(TypeError, match=r"`ratio` must be a number, but got Tensor of shape \(1, 77, 32\)"):
        agentsd.AgentSDConfig(ratio=embeds)
    assert not agentsd.is_patched(pipe)


def test_what_the_libraries_warn_of_is_said_once():
    """By any number of rounds and variants; it is in the saved file, too."""
    comparison = compare(tiny_sd(), "apple " * 30, steps=1, configs=["paper", "agent"])
    (warning,) = comparison.warnings
    assert warning.startswith("The prompt is longer than the 77 tokens")
    assert comparison.to_dict()["warnings"] == [warning]


def test_an_image_without_a_step_is_refused():
    pipe = with_unet(StableDiffusionImg2ImgPipeline)
    with pytest.raises(ValueError, match=r"`strength=0.01` leaves none of 25 steps"):
        compare(pipe, "a", image=image(), strength=0.01)


def test_pipeline_without_a_unet():
    """Anything else than a pipeline with a UNet is refused before it is run."""
    with pytest.raises(TypeError, match="Expected a diffusers pipeline with a UNet"):
        compare(object(), PROMPT)


def test_both_images_are_the_ones_asked_for():
    request = {"negative_prompt": "blue", "height": 64, "width": 96}
    comparison = compare(tiny_sd(), PROMPT, steps=2, guidance_scale=2.0, seed=3, **request)
    for pipe, found in ((tiny_sd(), comparison.baseline), (agentsd.apply_patch(tiny_sd()), comparison.agentsd)):
        generator = torch.Generator().manual_seed(3)
        expected = pipe(PROMPT, num_inference_steps=2, guidance_scale=2.0, generator=generator, **request).images[0]
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert (comparison.settings["height"], comparison.settings["width"]) == (64, 96)


def test_a_patch_that_does_not_fit_is_refused_before_any_image(monkeypatch):
    """Also the second of several, and whatever the first would have taken."""
    pipe = tiny_sd()
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *_, **__: pytest.fail("it drew"))
    configs = {"good": agentsd.AgentSDConfig(), "bad": agentsd.AgentSDConfig(reuse={"branch": 99})}
    with pytest.raises(ValueError, match="`branch` must be below"):
        compare(pipe, PROMPT, steps=2, seconds=0, configs=configs)
    assert not agentsd.is_patched(pipe)
