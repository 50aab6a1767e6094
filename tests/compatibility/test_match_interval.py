"""Matches that are kept for some steps: when tokens are matched anew, and where nothing that was kept may serve."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from compat_models import image, with_unet
from diffusers import StableDiffusionControlNetPipeline
from graphs import Graphs
from models import tiny_controlnet, tiny_sd, tiny_unet
from torch._dynamo.utils import counters

import agentsd
from agentsd import AgentSDConfig, FeatureReuseConfig
from agentsd.models.unet import find_layers
from agentsd.token_maps import recorded_maps

from .support import assert_differs, assert_no_trace, generate, predict
from .test_compile import small_unet, walk
from .test_threads import assert_as_alone
from .test_training import assert_same_gradients, gradients


STEPS = 10
# Agents at every step: one phase.
AGENTS = {"preset": "agent"}
EVERYTHING = {"merge_mlp": True, "merge_crossattn": True}
TIMESTEPS = torch.arange(999, 0, -50)


def in_each_step(pipe, matched, **options):
    """How many layers match in each step of a run."""
    steps = []

    def note(_pipe, _step, _timestep, tensors):
        steps.append(matched())
        return tensors

    generate(pipe, **{"num_inference_steps": STEPS, **options}, callback_on_step_end=note)
    return steps


@torch.no_grad()
def predictions(unet, timesteps=TIMESTEPS[:6], **options):
    """Predictions of one run after another."""
    return torch.stack([predict(unet, timestep, **options) for timestep in timesteps])


@pytest.mark.parametrize("options", [{}, AGENTS, EVERYTHING, {"late_phase": "kv-merged"}])
def test_one_step_of_one_is_every_step_bit_for_bit(options):
    off = generate(agentsd.apply_patch(tiny_sd(), **options), num_inference_steps=STEPS)
    on = generate(agentsd.apply_patch(tiny_sd(), **options, match_interval=1), num_inference_steps=STEPS)
    assert torch.equal(on, off)


# Three layers are patched, of which a step that skips runs the last one.
@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [3] * 10),
        ({"match_interval": 1}, [3] * 10),
        ({"match_interval": 2}, [3, 0] * 5),
        ({"match_interval": 4}, [3, 0, 0, 0, 3, 0, 0, 0, 3, 0]),
        ({"reuse": 2}, [3, 1] * 5),
        ({"reuse": 2, "match_interval": 1}, [3, 0] * 5),
        ({"reuse": 2, "match_interval": 2}, [3, 0, 0, 0, 3, 0, 0, 0, 3, 0]),
        ({"reuse": 3, "match_interval": 1}, [3, 0, 0, 3, 0, 0, 3, 0, 0, 3]),
        ({"ratio": 0, "match_interval": 2}, [0] * 10),
    ],
)
def test_how_many_layers_match_in_each_step(matched, options, expected):
    """Not in a step that feature reuse skips; of the others, in one of as many as the interval says."""
    pipe = agentsd.apply_patch(tiny_sd(), **AGENTS, **options)
    assert in_each_step(pipe, matched) == expected
    assert in_each_step(pipe, matched) == expected, "another image begins anew"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"match_interval": 3}, [3, 0, 0, 3, 3, 0, 0, 3, 0, 0]),
        ({"match_interval": 1, "reuse": 2, "agent_until": 0.5}, [3, 0, 3, 0, 3, 1, 3, 0, 3, 0]),
        ({"match_interval": 4, "reuse": 2, "agent_until": 0.5}, [3, 0, 0, 0, 0, 1, 3, 0, 0, 0]),
    ],
    ids=["in_a_full_step", "in_a_step_that_skips", "in_a_step_that_skips-longer"],
)
def test_another_phase_matches_anew(matched, options, expected):
    """Its cells are others. If it begins in a step that skips, the next step in which all layers run matches too."""
    assert in_each_step(agentsd.apply_patch(tiny_sd(), **options), matched) == expected


@pytest.mark.parametrize("options", [AGENTS, EVERYTHING, {"reuse": 2}, {"late_phase": "kv-merged", "reuse": 3}])
def test_the_same_seed_gives_the_same_image(options):
    """The second time, after a run that was interrupted, and through `from_pipe`; near that of matching in all."""
    pipe = tiny_sd()
    plain = generate(pipe, num_inference_steps=STEPS)
    agentsd.apply_patch(pipe, **options, match_interval=2)
    first = generate(pipe, num_inference_steps=STEPS)
    assert_differs(first, plain)
    assert not torch.equal(first, generate(agentsd.apply_patch(tiny_sd(), **options), num_inference_steps=STEPS))

    def stop(_pipe, step, _timestep, tensors):
        if step == 4:
            raise InterruptedError("stopped")
        return tensors

    assert torch.equal(generate(pipe, num_inference_steps=STEPS), first)
    with pytest.raises(InterruptedError):
        generate(pipe, num_inference_steps=STEPS, callback_on_step_end=stop)
    assert torch.equal(generate(pipe, num_inference_steps=STEPS), first)
    assert torch.equal(generate(type(pipe).from_pipe(pipe), num_inference_steps=STEPS), first)
    agentsd.remove_patch(pipe)
    assert_no_trace(pipe.unet)
    assert torch.equal(generate(pipe, num_inference_steps=STEPS), plain)


@pytest.mark.parametrize("options", [AGENTS, {**AGENTS, "reuse": 2}, EVERYTHING])
def test_each_half_of_split_guidance_has_its_own(options):
    """What a pipeline that calls the model once a half gives, is what both halves give in one call."""
    noise = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=noise), torch.randn(2, 7, 32, generator=noise)
    together, apart = (agentsd.apply_patch(tiny_unet(), **options, match_interval=3) for _ in range(2))
    with torch.no_grad():
        for timestep in TIMESTEPS[:7]:
            expected = together(sample, timestep, encoder_hidden_states=text).sample
            halves = [apart(sample[i, None], timestep, encoder_hidden_states=text[i, None]).sample for i in range(2)]
            torch.testing.assert_close(torch.cat(halves), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"size": 24}, {"batch": 3}, {"dtype": torch.bfloat16}], ids=str)
def test_calls_of_another_kind_match_anew(matched, change):
    """In the same run, as in a second pass at another size: what was kept is of no use."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=4)
    predictions(unet, TIMESTEPS[:2])
    assert matched() == 3
    unet.to(change.get("dtype", torch.float32))
    after = predictions(unet, TIMESTEPS[2:4], **change)
    assert matched() == 3
    fresh = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=4).to(unet.dtype)
    assert torch.equal(predictions(fresh, TIMESTEPS[2:4], **change), after)


def test_a_layer_at_another_size_matches_anew(matched):
    """Where features are made smaller on the way in the first steps only, the sample's size does not tell."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=4)
    half = lambda module, args, output: torch.nn.functional.avg_pool2d(output, 2)  # noqa: E731
    handle = unet.conv_in.register_forward_hook(half)
    predictions(unet, TIMESTEPS[:2])
    handle.remove()
    assert matched() == 3
    predictions(unet, TIMESTEPS[2:4])
    assert matched() == 3


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_with_gradients_every_call_matches(matched, checkpointing):
    """Blocks may be computed anew in the backward pass, after other calls; they merge as they did the first time."""
    timesteps = (900, 880, 100)
    unet = agentsd.apply_patch(tiny_unet(), **EVERYTHING).train()
    expected = gradients(unet, timesteps)
    matched()
    agentsd.apply_patch(unet, **EVERYTHING, match_interval=3)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    predictions(unet)
    matched()
    assert_same_gradients(gradients(unet, timesteps), expected)
    assert matched() >= 9
    predictions(unet, TIMESTEPS[6:8])
    assert matched() == 3, "what was kept before"


def test_samples_in_a_call_between_forward_and_backward():
    """A run without gradients in between, as for a validation image: the training step does not get its matches."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=2).train()
    unet.enable_gradient_checkpointing()
    weight = find_layers(unet)[0].attn.to_v.weight
    (expected,) = torch.autograd.grad(predict(unet, 900).square().mean(), weight)
    loss = predict(unet, 900).square().mean()
    predictions(unet, size=20)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


def test_samples_in_different_steps_match_anew(matched):
    unet = agentsd.apply_patch(tiny_unet(), match_interval=3)
    predictions(unet, [torch.tensor([900, 880]), torch.tensor([860, 840]), torch.tensor([100, 900])])
    assert matched() == 3 + 3 + 6  # two phases in the last


def test_diffusers_resets_what_is_kept(matched):
    """As a new image does, in this thread; another thread's run goes on."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=4)
    reset = unet._diffusers_hook.reset_stateful_hooks
    predictions(unet, TIMESTEPS[:2])
    reset()
    assert matched() == 3
    predictions(unet, TIMESTEPS[2:4])
    assert matched() == 3
    thread = threading.Thread(target=reset)
    thread.start()
    thread.join()
    predictions(unet, TIMESTEPS[4:6])
    assert matched() == 0
    assert not hasattr(agentsd.remove_patch(unet), "_diffusers_hook")


def kept_tensors(unet):
    """What this thread keeps of a model's matches."""
    slots = unet.agentsd_patch.matching.states.get().slots
    return [tensor for slot in slots.values() for kept in slot.of_layer.values() for tensor in kept.match.matches]


def test_removing_keeps_nothing_in_memory():
    """Nor does a `with` block that is going to put the patch back."""
    unet = agentsd.apply_patch(tiny_unet(), match_interval=2)
    predictions(unet)
    kept = [weakref.ref(tensor) for tensor in kept_tensors(unet)]
    assert len(kept) == 2 * 3
    with agentsd.patched(unet, ratio=0.2):
        gc.collect()
        assert all(reference() is None for reference in kept)
    predictions(unet)
    kept = [weakref.ref(tensor) for tensor in kept_tensors(unet)]
    agentsd.remove_patch(unet)
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert_no_trace(unet)


def test_copies_start_with_nothing(matched):
    """In the middle of a run, and then go on by themselves."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=4)
    predictions(unet, TIMESTEPS[:2])
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        matched()
        assert twin.agentsd_patch.matching is not unet.agentsd_patch.matching
        predictions(twin, TIMESTEPS[2:4])
        assert matched() == 3
        twin._diffusers_hook.reset_stateful_hooks()
        assert_no_trace(agentsd.remove_patch(twin))
    predictions(unet, TIMESTEPS[2:4])
    assert matched() == 0


def test_a_call_that_fails_leaves_nothing_behind(matched):
    """Some layers have matched then, and others have not."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=4)
    predictions(unet, TIMESTEPS[:1])

    def stop(*_):
        raise InterruptedError("stopped")

    handle = find_layers(unet)[1].attn.register_forward_hook(stop)
    with pytest.raises(InterruptedError):
        predictions(unet, TIMESTEPS[1:2])
    handle.remove()
    matched()
    assert all(state.call.kept is None for _, state in unet.agentsd_patch.layers)
    predictions(unet, TIMESTEPS[2:4])
    assert matched() == 3


def test_a_block_by_itself_matches_its_tokens(matched):
    """Outside a call of the model nothing tells which step it is in."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=4)
    predictions(unet, TIMESTEPS[:2])
    matched()
    transformer = find_layers(unet)[0].transformer
    inputs = {"hidden_states": torch.randn(2, 32, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 32)}
    with torch.no_grad():
        with pytest.warns(UserWarning, match="outside a call"):
            transformer(**inputs)
        transformer(**inputs)
    assert matched() == 2


def test_a_controlnet_has_its_own(matched):
    """It matches in the steps in which the UNet does, and its tokens are others."""
    base = tiny_sd()
    pipe = with_unet(StableDiffusionControlNetPipeline, base, controlnet=tiny_controlnet(base.unet))
    more = {"image": image(), "height": None, "width": None}
    agentsd.apply_patch(pipe, **AGENTS)
    layers = in_each_step(pipe, matched, **more)[0]
    assert layers > 3
    agentsd.apply_patch(pipe, **AGENTS, match_interval=2)
    assert in_each_step(pipe, matched, **more) == [layers, 0] * 5
    assert pipe.unet.agentsd_patch.matching is not pipe.controlnet.agentsd_patch.matching
    agentsd.apply_patch(pipe, **AGENTS, match_interval=1, reuse=2)
    assert in_each_step(pipe, matched, **more) == [layers, 0] * 5


@pytest.mark.parametrize("options", [{"match_interval": 2}, {"match_interval": 1, "reuse": 2}, EVERYTHING], ids=str)
def test_pipelines_that_share_a_unet_in_threads(options):
    """Each thread has what it has matched."""
    pipe = agentsd.apply_patch(tiny_sd(), **{"match_interval": 3, **options})
    assert_as_alone(pipe, pipe.unet)


@pytest.mark.usefixtures("fresh_compiler")
# Each of two options meets each of another at least once: captured graphs take seconds.
@pytest.mark.parametrize(
    "way, order, options",
    [
        ("whole", "compile_first", EVERYTHING),
        ("whole", "patch_first", {}),
        ("regional", "compile_first", {"late_phase": "kv-merged"}),
        ("regional", "patch_first", EVERYTHING),
        ("regional", "compile_first", {}),
        ("whole", "patch_first", {"late_phase": "kv-merged"}),
    ],
)
def test_compiled(way, order, options):
    """Two graphs a phase: one matches, one merges by what is kept; none at later steps, no break."""
    timesteps = torch.tensor([950, 930, 910, 890, 870, 140, 120, 100, 80, 60])
    expected = walk(agentsd.apply_patch(small_unet(), **options, match_interval=2), timesteps)
    unet, graphs = small_unet(), Graphs()
    if order == "patch_first":
        agentsd.apply_patch(unet, **options, match_interval=2)
    if way == "whole":
        unet.compile(backend=graphs, fullgraph=True)
    else:
        unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    if order == "compile_first":
        agentsd.apply_patch(unet, **options, match_interval=2)
    for _ in range(2):
        torch.testing.assert_close(walk(unet, timesteps), expected, rtol=1e-4, atol=1e-4)
        assert graphs.count == 4
    assert not counters["graph_break"]
    assert_no_trace(agentsd.remove_patch(unet))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", ["whole", "regional"])
def test_compiled_with_feature_reuse(way):
    """The whole UNet's graph matches, that of the steps that skip merges by what is kept."""
    run = lambda pipe: generate(pipe, num_inference_steps=12)  # noqa: E731
    expected = run(agentsd.apply_patch(tiny_sd(), **AGENTS, reuse=2, match_interval=1))
    pipe, graphs = agentsd.apply_patch(tiny_sd(), **AGENTS, reuse=2, match_interval=1), Graphs()
    if way == "whole":
        pipe.unet = torch.compile(pipe.unet, backend=graphs, fullgraph=True)
    else:
        pipe.unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    torch.testing.assert_close(run(pipe), expected, rtol=1e-3, atol=1e-3)
    captured = graphs.count
    assert way == "regional" or captured == 2
    torch.testing.assert_close(run(pipe), expected, rtol=1e-3, atol=1e-3)
    assert graphs.count == captured


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_at_other_sizes():
    unet = agentsd.apply_patch(small_unet(), match_interval=2)
    unet.compile_repeated_blocks(backend=Graphs(), fullgraph=True)
    timesteps = torch.tensor([900, 880, 120, 100])
    for size in (16, 18):
        expected = walk(agentsd.apply_patch(small_unet(), match_interval=2), timesteps, size=size)
        torch.testing.assert_close(walk(unet, timesteps, size=size), expected, rtol=1e-4, atol=1e-4)


def test_token_maps_show_what_is_kept():
    """A step that does not match merges as the one before, and its map says so."""
    unet = agentsd.apply_patch(tiny_unet(), **AGENTS, match_interval=2)
    with recorded_maps(unet) as maps:
        predictions(unet, TIMESTEPS[:4])
    name = find_layers(unet)[0].name
    groups = [maps[name, step].groups for step in range(4)]
    assert (groups[0] == groups[1]).all() and (groups[2] == groups[3]).all()
    assert (groups[1] != groups[2]).any()
    assert (maps[name, 0].agents == maps[name, 1].agents).all()


def test_it_is_a_field_as_others_are():
    assert AgentSDConfig.from_dict(AgentSDConfig(match_interval=2).to_dict()).match_interval == 2
    pipe = agentsd.apply_patch(tiny_sd(), reuse=FeatureReuseConfig(interval=2), match_interval=2)
    assert agentsd.report(pipe).config.match_interval == 2
    with pytest.raises(ValueError, match="match_interval"):
        agentsd.apply_patch(pipe, match_interval=0)
    assert agentsd.report(pipe).config.match_interval == 2
