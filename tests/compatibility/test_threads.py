"""Models that several threads share, as servers do: each image is the one of a thread alone, bit for bit."""

import sys
import threading
from copy import deepcopy
from functools import partial

import pytest
import torch
from compat_models import image, with_unet
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionControlNetPipeline
from models import tiny_controlnet, tiny_sd, tiny_sdxl, tiny_unet
from transformers import PreTrainedTokenizerBase
from turns import Turns

import agentsd
from agentsd import AgentSDConfig
from agentsd.models.unet import find_layers

from .support import assert_differs, assert_no_trace, generate, predict
from .test_offload import OFFLOADS


EVERYTHING = AgentSDConfig(merge_mlp=True, merge_crossattn=True)
CONFIGS = {
    "attention": AgentSDConfig(),
    "everything": EVERYTHING,
    "all_levels": AgentSDConfig(max_downsample=8, sx=2, sy=2),
    "reuse": AgentSDConfig(reuse=2),
}
# Three that differ in all that a call's state holds: size, batch, step, number of steps.
REQUESTS = [
    {"prompt": "a red apple", "num_inference_steps": 9, "height": 128, "width": 128},
    {"prompt": "a dog", "num_inference_steps": 4, "height": 96, "width": 160, "guidance_scale": 1.0},
    {"prompt": ["a cat", "a house"], "num_inference_steps": 8, "height": 72, "width": 88},
]
SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DDIMScheduler]


def serve(pipe, number, **options):
    """
    An image by a pipeline made for it, with a scheduler and tokenizers of its own, around the models of another.

    A tokenizer holds how the text that it is at is padded: with one for all threads, a prompt now and then gets the
    padding of another call, and so another image, also without agentsd.
    """
    tokenizers = {name: deepcopy(c) for name, c in pipe.components.items() if isinstance(c, PreTrainedTokenizerBase)}
    scheduler = SCHEDULERS[number].from_config(pipe.scheduler.config)
    own = type(pipe).from_pipe(pipe, scheduler=scheduler, **tokenizers)
    own.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(number)
    return generate(own, **{**REQUESTS[number], **options}, generator=generator)


def assert_as_alone(pipe, *models, **options):
    """All requests at once give what each gives alone; all switch to another in the middle of each call."""
    requests = [partial(serve, pipe, number, **options) for number in range(len(REQUESTS))]
    alone = [request() for request in requests]
    turns = Turns()
    turns.at_layers_of(*models)
    for _ in range(2):
        together = turns.run(*requests)
        for one, other in zip(together, alone, strict=True):
            assert isinstance(one, torch.Tensor), one
            assert torch.equal(one, other)
    assert turns.switches > 500
    return alone


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_pipelines_that_share_a_unet(config):
    """Sizes, batches, steps and numbers of steps of their own; random choices, too, depend on nothing else."""
    pipe = tiny_sd()
    plain = [serve(pipe, number) for number in range(len(REQUESTS))]
    agentsd.apply_patch(pipe, config=config)
    patched = assert_as_alone(pipe, pipe.unet)
    for one, other in zip(patched, plain, strict=True):
        assert_differs(one, other)
    agentsd.remove_patch(pipe)
    assert all(torch.equal(serve(pipe, number), plain[number]) for number in range(len(REQUESTS)))


def test_pipelines_that_share_an_sdxl_unet():
    """Several blocks in a transformer."""
    pipe = agentsd.apply_patch(tiny_sdxl(), config=EVERYTHING)
    assert_as_alone(pipe, pipe.unet)


@pytest.mark.parametrize("reuse", [None, 2])
def test_pipelines_that_share_a_controlnet(reuse):
    unet_of = tiny_sd()
    pipe = with_unet(StableDiffusionControlNetPipeline, unet_of, controlnet=tiny_controlnet(unet_of.unet))
    agentsd.apply_patch(pipe, merge_mlp=True, reuse=reuse)
    assert_as_alone(pipe, pipe.unet, pipe.controlnet, image=image(), height=None, width=None)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_pipelines_that_share_an_offloaded_unet(offload):
    pipe = agentsd.apply_patch(tiny_sd(), config=EVERYTHING)
    OFFLOADS[offload](pipe.unet)
    assert_as_alone(pipe, pipe.unet)


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("backend", [None, "_native_math"])
def test_threads_that_nothing_holds_up(backend):
    """
    Not in turn, but whenever the interpreter switches between them, which it is made to do often.

    Also where another model has an attention backend that switches the kernels of the whole process and back.
    """
    if backend:
        tiny_unet().set_attention_backend(backend)
    pipe = agentsd.apply_patch(tiny_sd(), config=EVERYTHING)
    alone = [serve(pipe, number) for number in range(len(REQUESTS))]
    results, interval = {}, sys.getswitchinterval()

    def work(number):
        results[number] = [serve(pipe, number) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(REQUESTS))]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(results) == len(REQUESTS)
    for number, images in results.items():
        for result in images:
            assert torch.equal(result, alone[number])


def test_a_thread_that_fails_leaves_the_others_alone():
    pipe = agentsd.apply_patch(tiny_sd(), config=EVERYTHING)
    alone = serve(pipe, 0)
    turns = Turns()
    turns.at_layers_of(pipe.unet)

    def stop(pipe, step, timestep, kwargs):
        raise InterruptedError("stopped")

    one, other, again = turns.run(
        partial(serve, pipe, 0), partial(serve, pipe, 1, callback_on_step_end=stop), partial(serve, pipe, 0)
    )
    assert torch.equal(one, alone) and torch.equal(again, alone)
    assert isinstance(other, InterruptedError)


@pytest.mark.parametrize("timesteps", [(900, 100), (torch.tensor([900, 100]), 500)], ids=["phases", "a_step_a_sample"])
def test_gradients_in_threads(timesteps):
    """Training in one thread beside another call, with and without checkpointing."""
    unets = [agentsd.apply_patch(tiny_unet(), config=EVERYTHING) for _ in range(2)]
    unets[1].enable_gradient_checkpointing()
    for unet in unets:
        unet.train()

        def gradients(timestep, unet=unet):
            loss = predict(unet, timestep).square().mean()
            names = [name for name, parameter in unet.named_parameters() if ".attn1." in name]
            return torch.autograd.grad(loss, [unet.get_parameter(name) for name in names])

        works = [partial(gradients, timestep) for timestep in timesteps]
        alone = [work() for work in works]
        turns = Turns()
        turns.at_layers_of(unet)
        for one, other in zip(turns.run(*works), alone, strict=True):
            assert not isinstance(one, Exception), one
            assert all(map(torch.equal, one, other))
        assert turns.switches > 20


def test_what_is_checkpointed_is_computed_anew_in_another_thread():
    """As by autograd for a GPU: its backward pass runs in a thread of its own, which has made no call."""
    unet = agentsd.apply_patch(tiny_unet(), config=EVERYTHING).train()
    unet.enable_gradient_checkpointing()
    names = [name for name, _ in unet.named_parameters() if ".attn1." in name]
    parameters = [unet.get_parameter(name) for name in names]

    def loss():
        return sum(predict(unet, timestep).square().mean() for timestep in (900, 100))

    expected = torch.autograd.grad(loss(), parameters)
    started = loss()
    predict(unet, 500, size=20)
    (elsewhere,) = Turns().run(lambda: torch.autograd.grad(started, parameters))
    assert not isinstance(elsewhere, Exception), elsewhere
    assert all(map(torch.equal, elsewhere, expected))


class Checkpointed(torch.nn.Module):
    """A module computed anew in the backward pass, as FSDP and DeepSpeed wrap them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(self.module, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("wrapped", ["transformer", "block"])
@pytest.mark.filterwarnings("ignore:A layer with an agentsd patch ran outside")
def test_what_others_checkpoint_is_computed_anew_in_another_thread(wrapped):
    """They know nothing of the step: it is the one of the last call."""
    unet = agentsd.apply_patch(tiny_unet(), config=EVERYTHING).train()
    parameters = [layer.attn.to_v.weight for layer in find_layers(unet)]
    expected = [torch.autograd.grad(predict(unet, timestep).square().mean(), parameters) for timestep in (900, 100)]
    holders = [block.attentions for block in (unet.down_blocks[0], unet.up_blocks[2])]
    if wrapped == "block":
        holders = [transformer.transformer_blocks for transformers in holders for transformer in transformers]
    for modules in holders:
        for number, module in enumerate(modules):
            modules[number] = Checkpointed(module)
    for timestep, gradients in zip((900, 100), expected, strict=True):
        loss = predict(unet, timestep).square().mean()
        (elsewhere,) = Turns().run(lambda loss=loss: torch.autograd.grad(loss, parameters))
        assert not isinstance(elsewhere, Exception), elsewhere
        assert all(map(torch.equal, elsewhere, gradients))


def compile_whole(unet):
    return torch.compile(unet, backend="eager")


def compile_in_place(unet):
    unet.compile(backend="eager")
    return unet


def compile_blocks(unet):
    unet.compile_repeated_blocks(backend="eager")
    return unet


@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # graphs for any size take twice as long to capture
@pytest.mark.parametrize("has_run", [False, True], ids=["fresh", "after_a_run"])
@pytest.mark.parametrize(
    ("compiled", "options"),
    [
        pytest.param(compile_whole, {}, marks=pytest.mark.slow),
        pytest.param(compile_in_place, {"merge_mlp": True}, marks=pytest.mark.slow),
        (compile_blocks, {}),
        (compile_whole, {"ratio": 0, "reuse": 2}),
    ],
    ids=["whole", "in_place", "regional", "whole-reuse"],
)
def test_calls_of_a_compiled_model_at_once_are_refused(compiled, options, has_run):
    """Compiled code cannot look up what is a thread's own: an error, never a wrong image. One at a time may run."""
    torch.compiler.reset()
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = {**blocks, "block_out_channels": (32, 32), "mid_block_type": None}
    inputs = [(900, 16), (100, 20)]
    unet = agentsd.apply_patch(tiny_unet(**small), **options)
    expected = [call_in(unet, *each) for each in inputs]
    unet = agentsd.apply_patch(tiny_unet(**small), **options)
    model = compiled(unet)
    calls = [partial(call_in, model, *each) for each in inputs]
    if has_run:
        assert all(torch.equal(call(), alone) for call, alone in zip(calls, expected, strict=True))
    turns = Turns()
    handle = unet.register_forward_pre_hook(turns.switch)
    results = turns.run(*calls)
    errors = [result for result in results if isinstance(result, Exception)]
    # One that is known to be compiled refuses the second call, and the first is as if there were none.
    assert len(errors) == (1 if has_run else 2)
    assert all(isinstance(error, RuntimeError) and "at the same time" in str(error) for error in errors)
    if has_run:
        assert torch.equal(results[0], expected[0])
    handle.remove()
    for call, alone in zip(calls, expected, strict=True):
        (result,) = Turns().run(call)
        assert torch.equal(result, alone)
    torch.compiler.reset()


def replicas(model, count):
    """The copies that `DataParallel` makes of a model, which share its hooks and parameters."""
    modules = list(model.modules())
    numbers = {module: number for number, module in enumerate(modules)}
    found = []
    for _ in range(count):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, twin in zip(modules, copies, strict=True):
            for name, child in module._modules.items():
                setattr(twin, name, None if child is None else copies[numbers[child]])
            for name, parameter in module._parameters.items():
                setattr(twin, name, parameter)
        found.append(copies[0])
    return found


@torch.no_grad()
def call_in(model, timestep, size):
    return predict(model, timestep, size=size)


def test_copies_that_data_parallel_makes():
    """They run in a thread each, with the hooks of the one model."""
    unet = agentsd.apply_patch(tiny_unet(), config=EVERYTHING)
    inputs = [(900, 16), (100, 20)]
    alone = [call_in(unet, *each) for each in inputs]
    turns = Turns()
    turns.at_layers_of(unet)
    together = turns.run(
        *(partial(call_in, twin, *each) for twin, each in zip(replicas(unet, 2), inputs, strict=True))
    )
    assert turns.switches > 20
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, torch.Tensor), one
        assert torch.equal(one, other)


def test_copies_that_data_parallel_makes_cannot_reuse_features():
    """What is skipped belongs to the one model: running it in a copy would mix the two."""
    unet = agentsd.apply_patch(tiny_unet(), ratio=0, reuse=2)
    with pytest.raises(RuntimeError, match="DataParallel"):
        call_in(replicas(unet, 1)[0], 900, 16)


def test_a_thread_takes_nothing_along():
    """What is kept of a thread's calls goes with it; only its last call stays, without its activations."""
    unet = agentsd.apply_patch(tiny_unet(), config=EVERYTHING)
    (result,) = Turns().run(partial(call_in, unet, 900, 16))
    assert isinstance(result, torch.Tensor)
    for _, state in unet.agentsd_patch.layers:
        shared = state.calls.shared
        assert (shared.metric, shared.parts, shared.entered) == (None, None, None)
        assert state.call.key is None
    assert_no_trace(agentsd.remove_patch(unet))
