"""Feature reuse with what people use: pipelines, samplers, adapters, callbacks."""

import warnings

import pytest
import torch
from compat_models import (
    half_mask,
    image,
    ip_adapter_embeds,
    ip_adapter_state_dict,
    save_lora,
    tiny_animatediff,
    tiny_gligen,
    tiny_instruct_pix2pix,
    tiny_lcm,
    tiny_modular_sdxl,
    with_unet,
)
from DeepCache import DeepCacheSDHelper
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    T2IAdapter,
    UniPCMultistepScheduler,
)
from diffusers.guiders import ClassifierFreeGuidance
from models import tiny_controlnet, tiny_refiner, tiny_sd, tiny_sd2, tiny_sdxl, tiny_unet

import agentsd
from agentsd import FeatureReuseConfig

from .reuse_runs import EDIT, STEPS, Calls, check, deep, run_of
from .support import assert_differs, generate


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd2, tiny_sdxl])
@pytest.mark.parametrize("ratio", [0, 0.4])
def test_text_to_image(build, ratio):
    """Text to image: SD 1.x, SD 2.x and SDXL, alone and with agent attention."""
    pipe = build()
    check(pipe, run_of(pipe), ratio=ratio)


def test_refiner():
    """The SDXL refiner."""
    pipe = tiny_refiner()
    check(pipe, run_of(pipe, **EDIT))


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline])
def test_image_to_image_with_one_strength_after_another(kind):
    """A run that begins at a lower timestep than the one before ended on knows nothing of it."""
    pipe = kind.from_pipe(tiny_sdxl() if "XL" in kind.__name__ else tiny_sd())
    check(pipe, run_of(pipe, **EDIT))
    agentsd.apply_patch(pipe, ratio=0, reuse=2)
    alone = run_of(pipe, num_inference_steps=40, image=image(), strength=0.3)
    expected = alone()
    generate(pipe, num_inference_steps=20, **EDIT)
    assert torch.equal(alone(), expected)


def test_inpainting():
    """Inpainting with four and with nine channels."""
    options = {"mask_image": half_mask(), "height": 128, "width": 128, **EDIT}
    for pipe in (
        StableDiffusionInpaintPipeline.from_pipe(tiny_sd()),
        with_unet(StableDiffusionInpaintPipeline, in_channels=9),
    ):
        check(pipe, run_of(pipe, **options))


def test_instruct_pix2pix():
    """InstructPix2Pix: three predictions an image, eight channels."""
    pipe = tiny_instruct_pix2pix()
    check(pipe, run_of(pipe, image=image(), image_guidance_scale=1.5))


def controlled(nets, layers=1):
    unets = {"layers_per_block": layers} if layers != 1 else {}
    return with_unet(StableDiffusionControlNetPipeline, controlnet=nets, **unets)


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_controlnets_do_not_run_in_steps_that_skip(several, guess_mode):
    """ControlNet, one and several, guess mode: not run where the deep part is not, which alone reads most of it."""
    nets = [tiny_controlnet(seed=seed) for seed in range(1 + several)]
    pipe = controlled(nets if several else nets[0])
    calls = [Calls(net.mid_block.resnets[0]) for net in nets]
    run = run_of(pipe, image=[image(seed) for seed in range(2)] if several else image(), guess_mode=guess_mode)
    check(pipe, run, pipe.unet, *nets)
    agentsd.apply_patch(pipe, ratio=0, reuse=2)
    for each in calls:
        each.take()
    run()
    assert [each.take() for each in calls] == [STEPS // 2] * len(nets)


def switch_off_guidance(pipe):
    """Callback options that end guidance after step 4, and with it half of the batch."""

    def switch_off(_pipe, step, _timestep, tensors):
        if step == 4:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    return {"callback_on_step_end": switch_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


@pytest.mark.parametrize("guess_mode", [False, True])
def test_what_is_kept_of_a_controlnet_serves_as_well_as_all_of_it(guess_mode):
    """
    Repeated as a whole in every second step, a ControlNet gives the same image. In guess mode it does not see that
    guidance is switched off, whereupon the whole UNet runs in a step in which the ControlNet does not.
    """
    controlnet = tiny_controlnet()
    pipe = controlled(controlnet)
    options = switch_off_guidance(pipe) if guess_mode else {}
    run = run_of(pipe, image=image(), guess_mode=guess_mode, **options)
    agentsd.apply_patch(pipe, ratio=0, reuse=2)
    reused = run()
    agentsd.remove_patch(pipe)
    agentsd.apply_patch(pipe.unet, ratio=0, reuse=2)
    last, number, original = [], [0], controlnet.forward

    def every_second(*args, **kwargs):
        if number[0] % 2 == 0:
            last[:] = original(*args, **kwargs)
        number[0] += 1
        return tuple(last)

    controlnet.forward = every_second
    assert torch.equal(run(), reused)


def test_t2i_adapter_and_freeu():
    """T2I-Adapter and FreeU write in place: never into what is kept."""
    adapter = T2IAdapter(in_channels=3, channels=(32, 64, 64), num_res_blocks=1, downscale_factor=8)
    base = tiny_sd()
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    check(pipe, run_of(pipe, image=image()))
    pipe = tiny_sd()
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    check(pipe, run_of(pipe))


def test_freeu_in_the_layers_that_still_run():
    """With FreeU inside the last blocks, a repeat of what was kept is scaled once, not again and again."""
    pipe = tiny_sd(layers_per_block=2)
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    pipe.unet.up_blocks[-1].resolution_idx = 0
    agentsd.apply_patch(pipe, ratio=0, reuse=FeatureReuseConfig(interval=5, order=0))
    kept = []

    def look(_pipe, step, _timestep, tensors):
        ((_, value),) = pipe.unet.agentsd_patch.reuse[1].state.slots[0].history
        kept.append(value.clone())
        return tensors

    generate(pipe, num_inference_steps=STEPS, callback_on_step_end=look)
    assert all(torch.equal(value, kept[0]) for value in kept[:5])


def test_ip_adapter():
    """IP-Adapter, loaded before and after."""
    pipe = tiny_sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter_state_dict(pipe.unet)])
    check(pipe, run_of(pipe, ip_adapter_image_embeds=ip_adapter_embeds()))


def test_lora(tmp_path):
    """LoRA: loaded, scaled and fused between runs and during one."""
    save_lora(tmp_path)
    pipe = tiny_sd()
    pipe.load_lora_weights(tmp_path)
    check(pipe, run_of(pipe))
    agentsd.apply_patch(pipe, ratio=0, reuse=2)
    full = run_of(pipe)()
    pipe.set_adapters(pipe.get_active_adapters(), 0.2)
    assert_differs(run_of(pipe)(), full)
    pipe.set_adapters(pipe.get_active_adapters(), 1.0)
    assert torch.equal(run_of(pipe)(), full)
    pipe.fuse_lora()
    torch.testing.assert_close(run_of(pipe)(), full, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()

    def halve(_pipe, step, _timestep, tensors):
        if step == 4:
            pipe.set_adapters(pipe.get_active_adapters(), 0.5)
        return tensors

    assert torch.isfinite(generate(pipe, num_inference_steps=STEPS, callback_on_step_end=halve)).all()


def test_animatediff():
    """AnimateDiff: the motion modules of what is skipped are skipped with it."""
    pipe = tiny_animatediff()
    check(pipe, run_of(pipe, num_frames=3, height=128, width=128))


def test_gligen():
    """GLIGEN."""
    pipe = tiny_gligen()
    check(pipe, run_of(pipe, gligen_phrases=["apple"], gligen_boxes=[[0.1, 0.1, 0.6, 0.7]]))


def generate_modular(pipe):
    settings = {"prompt": "a red apple", "num_inference_steps": STEPS, "height": 128, "width": 128}
    settings |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "output": "images"}
    return pipe(**settings)


def test_split_guidance():
    """Modular pipelines call once a condition: each call forecasts from its own."""
    pipe = tiny_modular_sdxl()
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    _, split = check(pipe, lambda: generate_modular(pipe))
    batched = tiny_sdxl()
    agentsd.apply_patch(batched, ratio=0, reuse=2)
    expected = generate(batched, num_inference_steps=STEPS, height=128, width=128)
    torch.testing.assert_close(split, expected, rtol=1e-3, atol=1e-3)


def test_guidance_switched_off_and_a_prompt_changed_during_a_run():
    """A callback that changes the batch makes the next step a full one."""
    pipe = tiny_sd()
    calls = deep(pipe)

    options = switch_off_guidance(pipe)
    agentsd.apply_patch(pipe, ratio=0, reuse=2)
    first = generate(pipe, num_inference_steps=STEPS, **options)
    # Steps 0, 2, 4; 5, where the batch is another; 6 and 8.
    assert calls.take() == 6
    assert torch.equal(generate(pipe, num_inference_steps=STEPS, **options), first)


def test_a_second_pass_at_another_size():
    """A hires pass: another size is another run."""
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(tiny_sd())
    agentsd.apply_patch(pipe, ratio=0, reuse=2)
    large = run_of(pipe, num_inference_steps=20, image=image(size=192), strength=0.5)
    expected = large()
    run_of(pipe, **EDIT)()
    assert torch.equal(large(), expected)


def test_batches():
    """Several images in one call are those of calls of their own."""
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = generate(pipe, num_inference_steps=STEPS, num_images_per_prompt=3, generator=seeds)
    for seed in range(3):
        alone = generate(pipe, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(together[seed : seed + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_an_interrupted_run_leaves_nothing_to_the_next(strength):
    """Interrupted by a callback, or by an exception; the next run begins where it will."""
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(tiny_sd())
    agentsd.apply_patch(pipe, ratio=0, reuse=2)
    run = run_of(pipe, num_inference_steps=24, image=image(), strength=strength)
    expected = run()

    def stop(_pipe, step, _timestep, tensors):
        if step == 3:
            raise InterruptedError
        return tensors

    with pytest.raises(InterruptedError):
        generate(pipe, num_inference_steps=24, image=image(1), strength=1.0, callback_on_step_end=stop)
    assert torch.equal(run(), expected)

    def interrupt(_pipe, step, _timestep, tensors):
        pipe._interrupt = step >= 4
        return tensors

    generate(pipe, num_inference_steps=24, image=image(1), strength=1.0, callback_on_step_end=interrupt)
    assert torch.equal(run(), expected)


SCHEDULERS = {
    "DDIM": (DDIMScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "DPM++ SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ single": (DPMSolverSinglestepScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "KDPM2": (KDPM2DiscreteScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samplers(name):
    """Samplers of first and second order."""
    kind, options = SCHEDULERS[name]
    pipe = tiny_sd()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    check(pipe, run_of(pipe))


@pytest.mark.parametrize("build", [tiny_lcm, tiny_sd], ids=["LCM", "turbo"])
def test_few_steps_run_plain_with_one_warning(build):
    """LCM, Turbo, and any run of fewer than eight steps."""
    pipe = build()
    options = {"original_inference_steps": 10} if build is tiny_lcm else {}
    run = run_of(pipe, num_inference_steps=4, **options)
    before = run()
    agentsd.apply_patch(pipe, ratio=0, reuse=2)
    with pytest.warns(UserWarning, match="fewer than 8 steps; this one has 4"):
        assert torch.equal(run(), before)
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert torch.equal(run(), before)


def test_lcm_with_more_steps():
    """LCM over eight steps."""
    pipe = tiny_lcm()
    check(pipe, run_of(pipe, num_inference_steps=8, original_inference_steps=50))


def test_gradients_run_plain_with_one_warning():
    """Whoever trains gets the gradients of the model."""
    unet = tiny_unet()
    agentsd.apply_patch(unet, ratio=0, reuse=2)
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)

    def train():
        for t in (900, 800, 700):
            unet(sample, t, encoder_hidden_states=text).sample.sum().backward()
            assert unet.mid_block.resnets[0].conv1.weight.grad is not None
            unet.zero_grad()

    with pytest.warns(UserWarning, match="gradients"):
        train()
    with warnings.catch_warnings(action="error", category=UserWarning):
        train()


@torch.no_grad()
def test_a_unet_alone_with_the_timestep_as_its_only_clock():
    """Numbers and tensors that stand alone as timesteps; a higher one begins another image."""
    unet = tiny_unet()
    calls = Calls(unet.mid_block.resnets[0])
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    agentsd.apply_patch(unet, ratio=0, reuse=3)
    results = []
    for make in (float, int, torch.tensor, lambda t: torch.tensor([t])):
        calls.take()
        results.append([unet(sample, make(t), encoder_hidden_states=text).sample for t in range(900, 0, -100)])
        assert calls.take() == 3
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("branch", range(6))
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_order_0_is_deepcache(interval, branch):
    """Repeating is what the DeepCache package does, bit for bit, at any interval and branch."""
    pipe = tiny_sd(layers_per_block=2)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    expected = run_of(pipe)()
    helper.disable()
    agentsd.apply_patch(pipe, ratio=0, reuse=FeatureReuseConfig(interval, order=0, branch=branch))
    assert torch.equal(run_of(pipe)(), expected)
