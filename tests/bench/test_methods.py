"""The methods that are compared: really on, on a copy, and the real packages."""

import re
import sys

import pytest
import torch
from models import tiny_sd, tiny_sdxl, tiny_unet

import agentsd
from agentsd.bench import METHODS, MethodUnavailable, find_method
from agentsd.bench.methods import AttentionFreeProcessor, patchable_layers, varies_by_device
from agentsd.bench.models import (
    PipelineSubject,
    UNetSubject,
    call_unet,
    switch_on,
    unet_inputs,
)
from agentsd.bench.rows import Case
from agentsd.bench.schedule import CALL_STEPS, call_timesteps
from agentsd.runtime.install import patch_of
from agentsd.runtime.steps import phase_at


CALLABLE = [
    name
    for name, method in METHODS.items()
    if name != "baseline" and not (method.needs_steps or method.needs_generation)
]


@pytest.fixture
def unet():
    return tiny_unet()


def call(unet, height=128, width=128):
    return call_unet(unet, unet_inputs(unet, height, width))


def on(unet, name, ratio=0.4, **options):
    """A copy of a UNet with a method on, as the benchmark makes it."""
    subject = UNetSubject("sd15", 0, torch.device("cpu"), torch.float32)
    case = Case("sd15", name, ratio if find_method(name).has_ratio else None, 128, 128, 1)
    return switch_on(subject, unet, case, options)


def draw(name, steps=4, **options):
    """An image of the tiny pipeline with a method on."""
    subject = PipelineSubject("tiny", "red apple", None, None, 0, torch.device("cpu"), torch.float32)
    case = Case("tiny", name, 0.4 if METHODS[name].has_ratio else None, 64, 64, 1)
    pipe = tiny_sd()
    twin = switch_on(subject, pipe, case, options)
    return subject.draw(twin, case, steps, ["red apple"], [0]).images[0]


@pytest.mark.parametrize("name", CALLABLE)
def test_a_method_changes_a_copy_only(unet, name):
    before = call(unet)
    keys = set(unet.state_dict())
    twin = on(unet, name)
    difference = (call(twin) - before).abs().max()
    if name == "baseline-naive":  # the same mathematics, rounded in another order
        assert 0 < difference < 1e-4
    else:
        assert difference > 1e-3
    assert torch.equal(call(unet), before)
    assert set(unet.state_dict()) == keys


def test_a_patch_of_the_users_is_no_part_of_the_comparison(unet):
    before = call(unet)
    agentsd.apply_patch(unet, 0.6)
    assert torch.equal(call(on(unet, "baseline")), before)
    assert patch_of(unet).config.ratio == 0.6


def test_tomesd_is_the_real_package(unet):
    blocks = [module for module in on(unet, "tomesd", 0.3).modules() if type(module).__name__ == "ToMeBlock"]
    assert blocks
    assert blocks[0]._tome_info["args"]["ratio"] == 0.3


@pytest.mark.parametrize("name", [name for name in CALLABLE if name != "baseline-naive"])
def test_a_method_changes_sdxl(name):
    """Its first attention lies below its first down-sampling, where tomesd's own default merges nothing."""
    unet = tiny_sdxl().unet
    assert (call(on(unet, name)) - call(unet)).abs().max() > 1e-3


@pytest.mark.parametrize("build", [tiny_unet, lambda: tiny_sdxl().unet], ids=["sd", "sdxl"])
@pytest.mark.parametrize("max_downsample", [1, 2])
def test_tomesd_merges_where_agentsd_does(build, max_downsample):
    unet = build()
    lengths = {"tomesd": {}, "agentsd-tome": {}}
    for name, seen in lengths.items():
        twin = on(unet, name, 0.4, max_downsample=max_downsample)
        for layer, module in twin.named_modules():
            if layer.endswith("attn1.to_q"):
                module.register_forward_hook(lambda _, args, __, layer=layer, seen=seen: seen.update({layer: args[0]}))
        call(twin)
    shapes = [{layer: x.shape for layer, x in seen.items()} for seen in lengths.values()]
    assert shapes[0] == shapes[1]


def test_tomesd_takes_the_options_that_it_shares(unet):
    twin = on(unet, "tomesd", 0.3, sx=4, sy=4, use_rand=False, merge_mlp=True, seed=3)
    args = twin._tome_info["args"]
    assert (args["sx"], args["sy"], args["use_rand"], args["merge_mlp"]) == (4, 4, False, True)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("agentsd", "paper"),
        ("agentsd-agent", "agent"),
        ("agentsd-tome", "tome"),
        ("balanced", "balanced"),
        ("fast", "fast"),
    ],
)
def test_agentsd_methods_run_their_presets(unet, name, preset):
    options = {"seed": 7, "min_tokens": 0}
    twin = on(unet, name, 0.3, **options)
    ratio = {"ratio": 0.3} if METHODS[name].has_ratio else {}  # others merge only keys, by a ratio of their own
    assert patch_of(twin).config == agentsd.AgentSDConfig.preset(preset, **ratio, **options)


@pytest.mark.parametrize("name", ["agentsd-agent", "agentsd-tome"])
def test_a_single_phase_has_no_schedule_to_set(unet, name):
    """The share of agents belongs to the schedule, which `agentsd` alone follows."""
    assert patch_of(on(unet, name, agent_until=0.3)).config == patch_of(on(unet, name)).config
    assert patch_of(on(unet, "agentsd", agent_until=0.3)).config.agent_until == 0.3


@pytest.mark.parametrize(
    ("name", "preset", "own"),
    [
        ("agentsd:agent_until=0.2:k_scale2=1", "paper", {"agent_until": 0.2, "k_scale2": 1}),
        ("agentsd:late_phase=kv-merged", "paper", {"late_phase": "kv-merged"}),
        ("agentsd-agent:agent_ratio=0.9:use_rand=false", "agent", {"agent_ratio": 0.9, "use_rand": False}),
        ("fast:kv_ratio=0.5:reuse=none", "fast", {"kv_ratio": 0.5, "reuse": None}),
    ],
)
def test_options_of_a_methods_own_come_before_those_of_the_run(unet, name, preset, own):
    """Which hold for what it says nothing of, and for the other methods."""
    options = {"seed": 7, "k_scale2": 0.5, "k_shortcut": 0.5, "use_rand": True, "min_tokens": 0}
    ratio = {"ratio": 0.3} if find_method(name).has_ratio else {}
    config = agentsd.AgentSDConfig.preset(preset, **{**options, **ratio, **own})
    assert patch_of(on(unet, name, 0.3, **options)).config == config
    assert patch_of(on(unet, "agentsd", 0.3, **options)).config.k_scale2 == 0.5


def test_what_options_of_its_own_change_of_a_method():
    assert find_method("agentsd-tome:match_interval=2").needs_steps
    assert not find_method("agentsd-tome:sx=4").needs_steps
    assert find_method("kv-merged:reuse=2").needs_steps
    assert not find_method("kv-merged:kv_ratio=0.5").needs_steps
    assert varies_by_device("balanced:kv_ratio=0.5", {})
    assert not varies_by_device("balanced:min_tokens=2048", {})
    assert varies_by_device("agentsd:min_tokens=auto", {"min_tokens": 2048})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", "There is no method 'magic'. Known: baseline, "),
        ("magic:sx=2", "There is no method 'magic'. Known: baseline, "),
        ("tomesd:sx=2", "The method 'tomesd' takes no options, but got 'tomesd:sx=2'."),
        ("agentsd:", "each of its options takes NAME=VALUE, such as agent_until=0.3, but got ''."),
        ("agentsd:sx", "'agentsd:sx' cannot be run: each of its options takes NAME=VALUE"),
        ("agentsd:rato=1", "Unknown option 'rato'"),
        ("agentsd:ratio=0.3", "name it among the ratios (--ratio)"),
        ("agentsd:agent_until=2", "`agent_until` must be in [0, 1], but got 2."),
        ("agentsd:sx=wide", "`sx` must be an integer, but got 'wide'."),
        ("agentsd:sx=2:sx=4", "sx is given twice."),
        ("fast:sx=2", "`agent_until` would have no effect beside `sx`"),
    ],
)
def test_a_name_that_is_no_method_says_why(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_method(name)


@pytest.mark.parametrize("options", [{}, {"max_downsample": 8}])
def test_attention_free_runs_in_the_layers_that_agentsd_patches(unet, options):
    patched = [layer.name for layer, _ in patch_of(on(unet, "agentsd", **options)).layers]
    free = [
        name
        for name, module in on(unet, "attention-free", **options).named_modules()
        if isinstance(getattr(module, "processor", None), AttentionFreeProcessor)
    ]
    assert free == list(patched)
    assert (len(free) < sum(name.endswith("attn1") for name, _ in unet.named_modules())) == (not options)


def test_attention_free_is_the_value_projection(unet):
    attn = patchable_layers(on(unet, "attention-free"), {})
    assert attn == []  # its processor is none that agentsd would patch
    twin = on(unet, "attention-free")
    layer = next(m for m in twin.modules() if isinstance(getattr(m, "processor", None), AttentionFreeProcessor))
    x = torch.randn(2, 16, layer.to_v.in_features)
    assert torch.equal(layer(x), layer.to_out[0](layer.to_v(x)))


def test_todo_attends_to_one_token_of_each_cell(unet):
    """Against the formula, written out: queries from all tokens, keys and values from the even rows and columns."""
    twin = on(unet, "todo")
    name = patchable_layers(unet, {})[0].name
    seen = {}
    layer = twin.get_submodule(name)
    layer.register_forward_hook(lambda module, args, kwargs, out: seen.update(x=args[0], out=out), with_kwargs=True)
    call(twin, height=64, width=128)
    height, width = 8, 16
    x = seen["x"]
    rows = [row * width + column for row in range(0, height, 2) for column in range(0, width, 2)]
    q, k, v = layer.to_q(x), layer.to_k(x[:, rows]), layer.to_v(x[:, rows])
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2).double() for part in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    expected = layer.to_out[0]((weights @ v).transpose(1, 2).flatten(2).float())
    assert torch.allclose(seen["out"], expected, atol=1e-5)


# How often the deep part of a UNet runs in 12 steps.
DEEP_RUNS = {
    "reuse-2": 6,
    "reuse-3": 4,
    "agentsd+reuse-2": 6,
    "agentsd+reuse-3": 4,
    "balanced": 6,
    "fast": 4,
    "deepcache-2": 6,
    "deepcache": 4,
    "deepcache-5": 3,
    "agentsd+deepcache": 4,
    "agentsd": 12,
    "agentsd-kv": 12,
}


def test_all_methods_over_steps_are_known():
    assert [name for name, method in METHODS.items() if method.needs_steps and name not in DEEP_RUNS] == []


def deep_runs(unet):
    """A list that grows whenever a layer in the middle of a UNet runs, which no method replaces."""
    runs = []
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("name", DEEP_RUNS)
def test_the_deep_part_runs_in_some_steps_of_a_unet_alone(shape, name):
    subject = UNetSubject("sd15", 0, torch.device("cpu"), torch.float32)
    case = Case("sd15", name, 0.4 if METHODS[name].has_ratio else None, 64, 64, 1)
    twin = switch_on(subject, subject.load(), case, {})
    runs = deep_runs(twin)
    call = subject.call(twin, case, CALL_STEPS)
    for _ in range(2):  # a second round is a new run
        runs.clear()
        call(None)
        assert len(runs) == DEEP_RUNS[name]


@pytest.mark.parametrize("name", DEEP_RUNS)
def test_the_deep_part_runs_in_some_steps_of_a_generation(name):
    subject = PipelineSubject("tiny", "red apple", None, None, 0, torch.device("cpu"), torch.float32)
    case = Case("tiny", name, 0.4 if METHODS[name].has_ratio else None, 64, 64, 1)
    twin = switch_on(subject, tiny_sd(), case, {})
    runs = deep_runs(twin.unet)
    subject.draw(twin, case, 12, ["red apple"], [0])
    assert len(runs) == DEEP_RUNS[name]


def test_calls_over_steps_are_those_of_a_run(shape):
    """From noise to image, handed over as pipelines do: elements of one tensor, by position."""
    subject = UNetSubject("sd15", 0, torch.device("cpu"), torch.float32)
    case = Case("sd15", "baseline", None, 64, 64, 1)
    unet, seen = subject.load(), []
    unet.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    subject.call(unet, case, CALL_STEPS)(None)
    assert [timestep.item() for timestep in seen] == call_timesteps("cpu").tolist()
    assert sorted(call_timesteps("cpu").tolist(), reverse=True) == call_timesteps("cpu").tolist()
    assert len({timestep.untyped_storage().data_ptr() for timestep in seen}) == 1
    assert seen[0].untyped_storage().nbytes() == CALL_STEPS * seen[0].element_size()
    seen.clear()
    subject.call(unet, case, 1)(None)
    assert [timestep.item() for timestep in seen] == [500]


def test_agents_run_in_as_large_a_share_of_the_calls_as_in_long_runs():
    phases = agentsd.AgentSDConfig().phases
    share = sum(phase_at(t, 1000, phases) == 0 for t in call_timesteps("cpu").tolist()) / CALL_STEPS
    assert abs(share - 0.4) < 1 / CALL_STEPS / 2


@pytest.mark.parametrize("interval", [2, 3])
def test_reuse_alone_merges_nothing(unet, interval):
    config = patch_of(on(unet, f"reuse-{interval}")).config
    assert (config.ratio, config.reuse) == (0, agentsd.FeatureReuseConfig(interval))
    assert torch.equal(call(on(unet, f"reuse-{interval}")), call(unet)), "in a first step, all is as it was"


def test_presets_take_options_and_keep_what_their_name_says(unet):
    large = {"min_tokens": 0, "seed": 7}
    fast = patch_of(on(unet, "fast", 0.3, **large, sx=2)).config
    assert fast == agentsd.AgentSDConfig.preset("fast", **large)
    sampled = patch_of(on(unet, "todo", late_phase="kv-merged", kv_ratio=0.9, agent_until=0.5, sx=4)).config
    assert sampled == agentsd.AgentSDConfig(late_phase="kv-nearest", agent_until=0)
    both = patch_of(on(unet, "agentsd+reuse-3", 0.3, reuse=2)).config
    assert both == agentsd.AgentSDConfig(ratio=0.3, reuse=3)


def test_deepcache_of_a_unet_alone_is_the_real_package(unet):
    twin = on(unet, "deepcache-5")
    helper = twin.forward.__closure__[0].cell_contents
    assert type(helper).__module__.startswith("DeepCache")
    assert helper.params["cache_interval"] == 5


def test_deepcache_is_the_real_package_and_combines():
    baseline, cached, both, agent = (draw(name) for name in ("baseline", "deepcache", "agentsd+deepcache", "agentsd"))
    for image in (cached, both, agent):
        assert abs(image - baseline).max() > 1e-3
    assert abs(both - cached).max() > 1e-4
    assert abs(both - agent).max() > 1e-4


def test_an_image_does_not_depend_on_those_before_it():
    """tomesd's own generator goes on from image to image."""
    subject = PipelineSubject("tiny", "red apple", None, None, 0, torch.device("cpu"), torch.float32)
    case = Case("tiny", "tomesd", 0.4, 64, 64, 1)
    twin = switch_on(subject, tiny_sd(), case, {})
    first, again = (subject.draw(twin, case, 2, ["red apple"], [3]).images[0] for _ in range(2))
    assert (first == again).all()


def test_fewer_steps_is_baseline():
    assert (draw("fewer-steps") == draw("baseline")).all()


def test_hidiffusion_runs_or_says_why_not():
    """Its package reaches into parts of diffusers that newer versions have moved."""
    with pytest.raises(MethodUnavailable, match=r"hidiffusion (does not run with this diffusers|does not take)"):
        draw("hidiffusion")


@pytest.mark.parametrize(("method", "module"), [("tomesd", "tomesd"), ("deepcache", "DeepCache")])
def test_a_missing_package_says_how_to_get_it(monkeypatch, method, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MethodUnavailable, match=r"not installed: pip install '\.\[bench\]'"):
        METHODS[method].apply(tiny_unet(), 0.4, {})


def test_a_model_without_self_attention_is_not_timed_as_if_it_had_some():
    unet = tiny_unet(
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, mid_block_type="UNetMidBlock2D"
    )
    for name, error in (
        ("agentsd", ValueError),
        ("attention-free", MethodUnavailable),
        ("todo", ValueError),
        ("tomesd", MethodUnavailable),
    ):
        with pytest.raises(error):
            on(unet, name)
