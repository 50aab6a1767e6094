"""The pipelines: other tasks, other models, control, video, and guidance in any number of calls."""

import pytest
import torch
from compat_models import (
    half_mask,
    image,
    tiny_animatediff,
    tiny_gligen,
    tiny_instruct_pix2pix,
    tiny_lcm,
    tiny_modular_sdxl,
    with_unet,
)
from diffusers import (
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.guiders import ClassifierFreeGuidance, PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from models import tiny_controlnet, tiny_refiner, tiny_sd, tiny_sd2, tiny_sdxl, tiny_unet

import agentsd
from agentsd import AgentSDConfig
from agentsd.models.unet import find_layers

from .support import (
    PHASES,
    AgentsdWarnings,
    assert_differs,
    assert_no_trace,
    check_cycle,
    fingerprint,
    generate,
    in_both_phases,
    predict,
    predict_both,
)


EVERYTHING = {
    f"{name}-everything": AgentSDConfig(agent_until=config.agent_until, merge_crossattn=True, merge_mlp=True)
    for name, config in PHASES.items()
}
merging_everything = pytest.mark.parametrize("config", EVERYTHING.values(), ids=EVERYTHING)
merging_more = pytest.mark.parametrize("config", [*PHASES.values(), *EVERYTHING.values()], ids=[*PHASES, *EVERYTHING])
# Half of the noise only: two of three steps would be one too few to pass both phases.
EDIT = {"image": image(), "strength": 0.9, "num_inference_steps": 4}


@in_both_phases
@pytest.mark.parametrize("build", [tiny_sd, tiny_sd2, tiny_sdxl])
def test_text_to_image(build, config):
    """Text to image: SD 1.x, SD 2.x and SDXL."""
    pipe = build()
    check_cycle(pipe, lambda: generate(pipe), config=config)


@merging_everything
@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_text_to_image_with_merged_cross_attention_and_mlp(build, config):
    """Text to image with `merge_crossattn` and `merge_mlp`: SD 1.x and SDXL."""
    pipe = build()
    merged = check_cycle(pipe, lambda: generate(pipe), config=config)
    assert_differs(merged, generate(agentsd.apply_patch(pipe, agent_until=config.agent_until)))


@in_both_phases
def test_refiner(config):
    """The SDXL refiner, on its own and behind the base model."""
    pipe = tiny_refiner()
    check_cycle(pipe, lambda: generate(pipe, **EDIT), config=config)

    base = tiny_sdxl()

    def both():
        latents = generate(base, denoising_end=0.5, num_inference_steps=4)
        return generate(pipe, image=latents, denoising_start=0.5, num_inference_steps=4)

    plain = both()
    for each in (base, pipe):
        agentsd.apply_patch(each, config=config)
    assert_differs(both(), plain)
    for each in (base, pipe):
        agentsd.remove_patch(each)
    assert torch.equal(both(), plain)


@in_both_phases
@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline])
def test_image_to_image(kind, config):
    """Image to image, SD and SDXL."""
    pipe = kind.from_pipe(tiny_sdxl() if "XL" in kind.__name__ else tiny_sd())
    check_cycle(pipe, lambda: generate(pipe, **EDIT), config=config)


@in_both_phases
@pytest.mark.parametrize("kind", [StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline])
def test_inpainting(kind, config):
    """Inpainting with a text-to-image model."""
    pipe = kind.from_pipe(tiny_sdxl() if "XL" in kind.__name__ else tiny_sd())
    run = lambda: generate(pipe, mask_image=half_mask(), height=128, width=128, **EDIT)  # noqa: E731
    check_cycle(pipe, run, config=config)


@in_both_phases
def test_inpainting_with_nine_channels(config):
    """Inpainting with an inpainting model: nine input channels."""
    pipe = with_unet(StableDiffusionInpaintPipeline, in_channels=9)
    run = lambda: generate(pipe, mask_image=half_mask(), height=128, width=128, **EDIT)  # noqa: E731
    check_cycle(pipe, run, config=config)


@in_both_phases
def test_instruct_pix2pix(config):
    """InstructPix2Pix: a batch of three predictions an image, eight input channels."""
    pipe = tiny_instruct_pix2pix()
    check_cycle(pipe, lambda: generate(pipe, image=image(), image_guidance_scale=1.5), config=config)


@in_both_phases
def test_lcm(config):
    """LCM: guidance embedded, one prediction a step."""
    pipe = tiny_lcm()
    check_cycle(pipe, lambda: generate(pipe, original_inference_steps=10), config=config)


@in_both_phases
@pytest.mark.parametrize("steps", [1, 2])
def test_turbo(steps, config):
    """Turbo: no guidance, one or two steps from the end of the noise range."""
    pipe = tiny_sd()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    check_cycle(pipe, lambda: generate(pipe, guidance_scale=0.0, num_inference_steps=steps), config=config)


@merging_more
def test_controlnet(config):
    """ControlNet: patched together with the UNet, and restored together."""
    controlnet = tiny_controlnet()
    pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=controlnet)
    run = lambda: generate(pipe, image=image())  # noqa: E731
    patched = check_cycle(pipe, run, pipe.unet, controlnet, config=config)

    agentsd.apply_patch(pipe, config=config)
    assert {row.model for row in agentsd.report(pipe).rows} == {"unet", "controlnet"}
    agentsd.remove_patch(controlnet)
    assert_differs(run(), patched)
    agentsd.remove_patch(pipe)
    assert_no_trace(pipe.unet, controlnet)


@merging_everything
def test_several_controlnets(config):
    """Several ControlNets on one pipeline are all patched."""
    nets = [tiny_controlnet(seed=seed) for seed in (0, 1)]
    pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=nets)
    assert isinstance(pipe.controlnet, MultiControlNetModel)
    images = [image(seed) for seed in (0, 1)]
    scales = [1.0, 0.5]
    run = lambda: generate(pipe, image=images, controlnet_conditioning_scale=scales)  # noqa: E731
    check_cycle(pipe, run, pipe.unet, *nets, config=config)
    agentsd.apply_patch(pipe)
    assert {row.model for row in agentsd.report(pipe).rows} == {"unet", "controlnet.0", "controlnet.1"}


@in_both_phases
@pytest.mark.parametrize("guess_mode", [False, True])
def test_controlnet_guess_mode(guess_mode, config):
    """ControlNet in guess mode sees half of the UNet's batch."""
    pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    check_cycle(pipe, lambda: generate(pipe, image=image(), guess_mode=guess_mode), config=config)


def test_controlnet_with_image_to_image_and_inpainting():
    """ControlNet with image to image, inpainting, and SDXL."""
    controlnet = tiny_controlnet()
    edit = {**EDIT, "control_image": image(1)}
    pipe = with_unet(StableDiffusionControlNetImg2ImgPipeline, controlnet=controlnet)
    check_cycle(pipe, lambda: generate(pipe, **edit), pipe.unet, controlnet)
    pipe = with_unet(StableDiffusionControlNetInpaintPipeline, controlnet=controlnet)
    check_cycle(pipe, lambda: generate(pipe, mask_image=half_mask(), **edit), pipe.unet, controlnet)
    base = tiny_sdxl()
    controlnet = tiny_controlnet(base.unet)
    pipe = StableDiffusionXLControlNetPipeline(**base.components, controlnet=controlnet, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    check_cycle(pipe, lambda: generate(pipe, image=image()), pipe.unet, controlnet)


def test_controlnet_without_attention():
    """A ControlNet none of whose layers can be patched does not stand in the way of the UNet."""
    flat = ("DownBlock2D",) * 3
    controlnet = ControlNetModel.from_unet(
        tiny_unet(), conditioning_channels=3, conditioning_embedding_out_channels=(8, 8, 8, 8)
    )
    controlnet = ControlNetModel.from_config({**controlnet.config, "down_block_types": flat}).eval()
    controlnet.mid_block.attentions = torch.nn.ModuleList()
    assert not find_layers(controlnet)
    pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    pipe.controlnet = controlnet
    agentsd.apply_patch(pipe)
    assert {row.model for row in agentsd.report(pipe).rows} == {"unet"}


@in_both_phases
def test_gligen(config):
    """GLIGEN: the fuser inside a patched block still sees boxes and phrases, and is not patched itself."""
    pipe = tiny_gligen()
    boxes = {"gligen_phrases": ["apple"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.7]], "gligen_scheduled_sampling_beta": 1}
    patched = check_cycle(pipe, lambda: generate(pipe, **boxes), config=config)
    agentsd.apply_patch(pipe, config=config)
    assert not any("fuser" in row.name for row in agentsd.report(pipe).rows)
    assert_differs(generate(pipe, **{**boxes, "gligen_boxes": [[0.5, 0.5, 0.9, 0.9]]}), patched)


@in_both_phases
def test_animatediff(config):
    """AnimateDiff: frames are samples of the batch; the motion modules are left alone."""
    pipe = tiny_animatediff()
    check_cycle(pipe, lambda: generate(pipe, num_frames=3, height=128, width=128), config=config)
    agentsd.apply_patch(pipe, config=config)
    names = [row.name for row in agentsd.report(pipe).rows]
    assert names
    assert not any("motion" in name for name in names)


def test_animatediff_split_inference_after_patching():
    """FreeNoise's split inference wraps modules of a patched model: it merges as before, a few frames at a time."""
    pipe = agentsd.apply_patch(tiny_animatediff())
    options = {"num_frames": 3, "height": 128, "width": 128}
    patched, names = generate(pipe, **options), [row.name for row in agentsd.report(pipe).rows]
    pipe.enable_free_noise_split_inference(temporal_split_size=2)
    torch.testing.assert_close(generate(pipe, **options), patched, rtol=1e-4, atol=1e-4)
    assert len(agentsd.report(pipe).rows) == len(names)
    with agentsd.patched(pipe, ratio=0.2):
        assert len(agentsd.report(pipe).rows) == len(names)
    torch.testing.assert_close(generate(pipe, **options), patched, rtol=1e-4, atol=1e-4)
    assert_no_trace(agentsd.remove_patch(pipe).unet)


def test_animatediff_from_a_patched_unet():
    """AnimateDiff builds its own model from a UNet; a patch on that UNet does not leak into it."""
    pipe = tiny_animatediff()
    base = agentsd.apply_patch(tiny_sd())
    from_patched = type(pipe.unet).from_unet2d(base.unet, pipe.motion_adapter)
    assert_no_trace(from_patched)
    assert agentsd.is_patched(base)


@torch.no_grad()
def test_video_samples_at_different_timesteps():
    """A video model with a timestep a sample: all frames of a sample are in its phase."""
    unet = agentsd.apply_patch(tiny_animatediff().unet)
    noise = torch.Generator().manual_seed(0)
    frames, text = torch.randn(2, 4, 3, 16, 16, generator=noise), torch.randn(6, 7, 32, generator=noise)
    timesteps = torch.tensor([900, 100])
    together = unet(frames, timesteps, encoder_hidden_states=text).sample
    for i in range(2):
        alone = unet(frames[i : i + 1], timesteps[i], encoder_hidden_states=text[3 * i : 3 * i + 3]).sample
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def generate_modular(pipe, **options):
    settings = {"prompt": "a red apple", "num_inference_steps": 3, "height": 128, "width": 128}
    settings |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "output": "images"}
    return pipe(**{**settings, **options})


@in_both_phases
def test_modular_pipeline(config):
    """Modular pipelines: conditional and unconditional predictions in calls of their own."""
    pipe = tiny_modular_sdxl()
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    check_cycle(pipe, lambda: generate_modular(pipe), config=config)


FIRST_STACK = "down_blocks.1.attentions.0.transformer_blocks"


def perturbed(strength):
    layers = LayerSkipConfig(
        indices=[0], fqn=FIRST_STACK, skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    return PerturbedAttentionGuidance(
        perturbed_guidance_scale=strength,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=layers,
    )


def skipping(strength):
    return SkipLayerGuidance(
        skip_layer_guidance_scale=strength,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(indices=[0], fqn=FIRST_STACK),
    )


@in_both_phases
@pytest.mark.parametrize("guider", [perturbed, skipping])
def test_modular_guiders_that_reach_into_layers(guider, config):
    """Modular pipelines whose guider perturbs or skips a patched layer for one of its predictions."""
    pipe, results = tiny_modular_sdxl(), []
    for strength in (0.0, 30.0):
        pipe.update_components(guider=guider(strength))
        results.append(check_cycle(pipe, lambda: generate_modular(pipe), config=config))
    assert_differs(results[1], results[0])


@in_both_phases
@torch.no_grad()
def test_split_and_batched_guidance_agree(config):
    """Split guidance: conditional and unconditional merge the same way in calls of their own as in one batch."""
    unet = agentsd.apply_patch(tiny_unet(), config=config)
    noise = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 16, 16, generator=noise), torch.randn(2, 7, 32, generator=noise)
    together = unet(sample.expand(2, -1, -1, -1), 500, encoder_hidden_states=text).sample
    apart = [unet(sample, 500, encoder_hidden_states=text[i : i + 1]).sample for i in range(2)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@in_both_phases
@torch.no_grad()
def test_any_batch(batch, config):
    """Any batch, odd or even: a sample comes out the same whatever it is batched with."""
    unet = agentsd.apply_patch(tiny_unet(), config=config)
    noise = torch.Generator().manual_seed(0)
    samples, text = torch.randn(5, 4, 16, 16, generator=noise), torch.randn(5, 7, 32, generator=noise)
    five = unet(samples, 500, encoder_hidden_states=text).sample
    fewer = unet(samples[:batch], 500, encoder_hidden_states=text[:batch]).sample
    torch.testing.assert_close(fewer, five[:batch], rtol=1e-4, atol=1e-5)


def test_unet_called_with_keywords_only():
    """A UNet called with keywords, as modular pipelines and training scripts do."""
    unet = agentsd.apply_patch(tiny_unet())
    by_position = predict_both(unet)
    noise = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=noise), torch.randn(2, 7, 32, generator=noise)
    with torch.no_grad():
        results = [unet(sample=sample, timestep=t, encoder_hidden_states=text).sample for t in (900, 100)]
    assert torch.equal(torch.stack(results), by_position)


def test_pipelines_without_warnings():
    """A plain patched run, its removal and patching anew say nothing."""
    pipe = tiny_sd()
    with AgentsdWarnings() as caught:
        agentsd.apply_patch(pipe)
        generate(pipe)
        agentsd.apply_patch(pipe, ratio=0.2)
        generate(pipe)
        agentsd.remove_patch(pipe)
        assert caught.count == 0
    assert fingerprint(pipe.unet) == fingerprint(tiny_sd().unet)


def test_patched_model_of_a_single_sample_size():
    """`UNet2DConditionModel` alone, without a pipeline: patched, run and unpatched."""
    unet = tiny_unet()
    assert isinstance(unet, UNet2DConditionModel)
    check_cycle(unet, lambda: predict_both(unet))
    assert predict(unet, 500, batch=1).shape == (1, 4, 16, 16)
