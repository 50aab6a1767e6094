"""Feature reuse with what people use: pipelines, samplers, adapters, callbacks, offloading, compilation, copies."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

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
from diffusers.hooks import HookRegistry, ModelHook
from models import tiny_controlnet, tiny_refiner, tiny_sd, tiny_sd2, tiny_sdxl, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agentsd
from agentsd import FeatureReuseConfig

from .support import assert_differs, assert_no_trace, fingerprint, generate, predict


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
            owner = getattr(module.__dict__.get("forward"), "__self__", None)
            assert not type(owner).__module__.startswith("agentsd"), name


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """float16 and bfloat16."""
    pipe = tiny_sd().to(dtype)
    check(pipe, run_of(pipe))


@pytest.mark.parametrize("way", ["model", "sequential", "group", "casting"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offload_and_casting(way, order):
    """Model, sequential and group offload and layerwise casting, before and after patching."""
    expected = run_of(agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2))()
    pipe = tiny_sd()
    if order == "after":
        agentsd.apply_patch(pipe, ratio=0, reuse=2)
    cpu = torch.device("cpu")
    if way == "group":
        pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    elif way == "casting":
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    else:
        from accelerate import cpu_offload, cpu_offload_with_hook

        {"sequential": cpu_offload, "model": cpu_offload_with_hook}[way](pipe.unet, execution_device=cpu)
    if order == "before":
        agentsd.apply_patch(pipe, ratio=0, reuse=2)
    calls = deep(pipe)
    tolerance = 2e-2 if way == "casting" else 1e-5
    torch.testing.assert_close(run_of(pipe)(), expected, rtol=tolerance, atol=tolerance)
    assert calls.take() == STEPS // 2


def test_removed_below_an_offload_that_came_later():
    """Sequential offloading wraps what the patch put there: it keeps on working, plain, and nothing is kept."""
    from accelerate import cpu_offload

    expected = run_of(tiny_sd())()
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2)
    reuse = pipe.unet.agentsd_patch.reuse[1]
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    run_of(pipe)()
    agentsd.remove_patch(pipe)
    torch.testing.assert_close(run_of(pipe)(), expected)
    assert reuse.state.slots == {}
    assert reuse.calls.get().kept is None


class Graphs:
    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("way", ["whole", "regional"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled(way, order):
    """`torch.compile`, whole and by block: one graph for full steps and one for the others; none at later steps."""
    torch.compiler.reset()
    expected = run_of(agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2), num_inference_steps=12)()
    pipe, graphs = tiny_sd(), Graphs()
    if order == "after":
        agentsd.apply_patch(pipe, ratio=0, reuse=2)
    if way == "whole":
        pipe.unet = torch.compile(pipe.unet, backend=graphs, fullgraph=True)
    else:
        pipe.unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    if order == "before":
        agentsd.apply_patch(pipe, ratio=0, reuse=2)
    run = run_of(pipe, num_inference_steps=12)
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
    captured = graphs.count
    assert way == "regional" or captured == 2
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
    assert graphs.count == captured
    torch.compiler.reset()


def test_copies():
    """deepcopy, pickle and `from_pipe`: a copy reuses by itself, with its own modules."""
    pipe = agentsd.apply_patch(tiny_sd(), reuse=2)
    expected = run_of(pipe)()
    for unet in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        other = tiny_sd()
        other.unet = unet
        assert torch.equal(run_of(other)(), expected)
        agentsd.remove_patch(other)
        assert_forwards_are_their_own(other.unet)
        assert torch.equal(run_of(other)(), run_of(tiny_sd())())
    assert torch.equal(run_of(pipe)(), expected)
    assert torch.equal(run_of(type(pipe).from_pipe(pipe))(), expected)


def test_removing_keeps_nothing_in_memory():
    """Off is off."""
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2)
    run_of(pipe)()
    history = pipe.unet.agentsd_patch.reuse[1].state.slots[0].history
    kept = [weakref.ref(value) for _, value in history]
    assert len(kept) == 2
    del history
    agentsd.remove_patch(pipe)
    gc.collect()
    assert all(reference() is None for reference in kept)


class PeakMemory(TorchDispatchMode):
    """The most memory that tensors made while it is on took at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.known and size > 0:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_of(pipe) -> int:
    run = run_of(pipe)
    gc.collect()
    with PeakMemory() as memory:
        run()
    return memory.most


@pytest.mark.parametrize("interval", [2, 3])
def test_memory(interval):
    """At most three tensors more of the size of the one that is forecast, and some numbers."""
    plain = peak_of(tiny_sd())
    reuse = peak_of(agentsd.apply_patch(tiny_sd(), ratio=0, reuse=interval))
    forecast = 4 * 2 * 32 * 16 * 16  # float32, both halves of guidance
    assert plain > 8 * forecast
    assert forecast < reuse - plain <= 3 * forecast + 256


def full_steps(unet, reset) -> list[int]:
    """Which of six steps run everything, with a reset before the fourth."""
    steps = []
    timesteps = torch.arange(999, 0, -50)
    with torch.no_grad():
        for number, timestep in enumerate(timesteps[:6]):
            if number == 3:
                reset()
            handle = unet.mid_block.resnets[0].register_forward_hook(lambda *_, step=number: steps.append(step))
            predict(unet, timestep)
            handle.remove()
    return steps


def test_diffusers_resets_what_is_kept():
    """In the middle of a run, the next step is full; in a copy, a reset is the copy's own."""
    unet = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2).unet
    for each in (unet, copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert full_steps(each, each._diffusers_hook.reset_stateful_hooks) == [0, 2, 3, 5]


def test_a_reset_is_the_threads_own():
    """Another thread's run goes on as if nothing was."""
    unet = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2).unet

    def reset():
        thread = threading.Thread(target=unet._diffusers_hook.reset_stateful_hooks)
        thread.start()
        thread.join()

    assert full_steps(unet, reset) == [0, 2, 4]


def test_the_listener_leaves_nothing_behind():
    """Nor does it come in the way of hooks of diffusers that were put in before it or after it."""
    pipe = tiny_sd()
    before = fingerprint(pipe.unet)
    agentsd.apply_patch(pipe, reuse=2)
    agentsd.apply_patch(pipe, reuse=3)
    assert not hasattr(agentsd.remove_patch(pipe).unet, "_diffusers_hook")
    assert fingerprint(pipe.unet) == before
    for ours_first in (True, False):
        calls = []
        hook = ModelHook()
        hook.pre_forward = lambda module, *args, calls=calls, **kwargs: (calls.append(1), (args, kwargs))[1]
        if ours_first:
            agentsd.apply_patch(pipe, reuse=2)
        registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
        registry.register_hook(hook, "counting")
        if not ours_first:
            agentsd.apply_patch(pipe, reuse=2)
        with torch.no_grad():
            predict(pipe.unet, 500)
            registry.remove_hook("counting")
            predict(pipe.unet, 500)
        assert len(calls) == 1
        agentsd.remove_patch(pipe)
        assert not hasattr(pipe.unet, "_diffusers_hook") or not pipe.unet._diffusers_hook.hooks


def test_threads_that_share_a_unet():
    """The maintainers' recipe for servers: pipelines made by `from_pipe`, each in a thread of its own."""
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2)
    seeds = range(3)
    one = lambda pipe, seed: generate(  # noqa: E731
        pipe, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed)
    )
    expected = [one(pipe, seed) for seed in seeds]
    results = {}

    def work(seed):
        own = type(pipe).from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
        results[seed] = one(own, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in seeds)


@pytest.mark.parametrize(
    "reuse, error, words",
    [
        (0, ValueError, "interval"),
        (-2, ValueError, "interval"),
        (1.5, TypeError, "reuse"),
        (True, TypeError, "reuse"),
        ("2", TypeError, "reuse"),
        ({"interval": 2, "order": 2}, ValueError, "order"),
        ({"branch": -1}, ValueError, "branch"),
        ({"branch": 99}, ValueError, "branch.*below 6"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(reuse, error, words):
    pipe = tiny_sd()
    with pytest.raises(error, match=words):
        agentsd.apply_patch(pipe, reuse=reuse)
    assert not agentsd.is_patched(pipe)
    assert_forwards_are_their_own(pipe.unet)


def test_other_caches_in_the_same_role_are_refused():
    """The DeepCache package, enabled, skips the same modules on its own schedule."""
    pipe = tiny_sd()
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    with pytest.raises(ValueError, match="DeepCache"):
        agentsd.apply_patch(pipe, reuse=2)
    assert not agentsd.is_patched(pipe)
    helper.disable()
    agentsd.apply_patch(pipe, reuse=2)


def test_presets_and_keywords():
    """A preset's name, with keywords that override it."""
    pipe = tiny_sd()
    calls = deep(pipe)
    before = run_of(pipe, num_inference_steps=12)()
    for options, full in (
        ({"preset": "balanced"}, 6),
        ({"preset": "fast"}, 4),
        ({"preset": "balanced", "reuse": 4}, 3),
        ({"preset": "balanced", "reuse": None, "min_tokens": 0}, 12),
    ):
        calls.take()
        agentsd.apply_patch(pipe, **options)
        assert_differs(run_of(pipe, num_inference_steps=12)(), before)
        assert calls.take() == full
    # Layers of 256 tokens are left alone.
    agentsd.apply_patch(pipe, preset="balanced", reuse=None)
    assert torch.equal(run_of(pipe, num_inference_steps=12)(), before)
    assert all("256 tokens, fewer than `min_tokens=2048`" in row.skipped for row in agentsd.report(pipe).rows)
    with pytest.raises(ValueError, match="`config` or preset"):
        agentsd.apply_patch(pipe, preset="fast", config=agentsd.AgentSDConfig())
