"""What the controls of the web page ask for."""

from dataclasses import replace

import pytest
import torch

from agentsd import AgentSDConfig, FeatureReuseConfig
from agentsd.demo.inputs import PRESET_INFO, _filled_in, _named, config_of, request_of, values_of
from agentsd.demo.requests import ImageRequest
from agentsd.presets import PRESETS


def test_a_request_is_made_of_the_controls():
    image_request = request_of(["a", None, "m", 1, 2, 3.0, 64, 128])
    assert image_request == ImageRequest("a", "", "m", seed=1, steps=2, guidance_scale=3.0, height=64, width=128)


def test_a_configuration_is_made_of_the_controls():
    assert config_of([0.5, 0.2, "kv-merged", 1024, 2, 0.1, 0.05, 2, False, True, False, 3, 0, 1]) == AgentSDConfig(
        ratio=0.5,
        agent_until=0.2,
        late_phase="kv-merged",
        min_tokens=1024,
        max_downsample=2,
        k_scale2=0.1,
        k_shortcut=0.05,
        match_interval=2,
        use_rand=False,
        merge_crossattn=True,
        merge_mlp=False,
        reuse=FeatureReuseConfig(interval=3, order=0, branch=1),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_what_it_is(name):
    """And the controls, set to the same by hand, are called by its name."""
    config = AgentSDConfig.preset(name)
    _, *values = _filled_in(name, *values_of(AgentSDConfig()))
    assert config_of(values) == config
    assert _named(*values)["value"] == name
    assert _filled_in(name)[0]["info"] == _named(*values)["info"] == PRESET_INFO[name]


def test_what_is_no_preset_is_custom():
    ratio, *others = values_of(AgentSDConfig.preset("fast"))
    values = [ratio / 2, *others]
    assert _named(*values)["value"] == "custom"
    assert config_of(values) == AgentSDConfig.preset("fast", kv_ratio=ratio / 2), "what it merges are keys"
    assert _filled_in("custom", *values)[1:] == values, "nothing is filled in"


def test_the_ends_of_the_agent_phase_are_one_phase_for_all_steps():
    """So they hold with schedulers, too, whose timesteps are no positions in the noise range."""
    ratio, _, *others = values_of(AgentSDConfig.preset("paper", ratio=0.2))
    for end, name in ((0, "tome"), (1, "agent")):
        assert config_of([ratio, end, *others]) == AgentSDConfig.preset(name, ratio=0.2)
    _, *others = others
    assert config_of([ratio, 0, "kv-mean", *others]) == AgentSDConfig(ratio=0.2, agent_until=0, late_phase="kv-mean")
    assert config_of([ratio, 1, "kv-mean", *others]) == AgentSDConfig.preset("agent", ratio=0.2)


def test_the_ratio_is_of_keys_where_nothing_else_is_merged():
    _, *others = values_of(AgentSDConfig.preset("balanced", agent_until=0.2))
    assert config_of([0.5, *others]) == AgentSDConfig.preset("balanced", agent_until=0.2, ratio=0.5)
    _, *others = values_of(AgentSDConfig.preset("balanced"))
    assert config_of([0.5, *others]) == AgentSDConfig.preset("balanced", kv_ratio=0.5)


def test_no_interval_of_matching_is_none():
    *others, _, use_rand, cross, mlp, interval, order, branch = values_of(AgentSDConfig.preset("fast"))
    config = config_of([*others, 0, use_rand, cross, mlp, interval, order, branch])
    assert config == AgentSDConfig.preset("fast", match_interval=None)


def test_an_interval_of_one_is_no_feature_reuse():
    *others, _, order, branch = values_of(AgentSDConfig.preset("balanced"))
    assert config_of([*others, 1, order, branch]) == AgentSDConfig.preset("balanced", reuse=None)


def test_on_a_gpu_a_preset_shows_the_number_of_tokens_that_it_has_there():
    gpu, preset = torch.device("cuda"), AgentSDConfig.preset("balanced")
    _, *here = _filled_in("balanced", *values_of(AgentSDConfig()))
    _, *there = _filled_in("balanced", *values_of(AgentSDConfig(), gpu), device=gpu)
    assert [(a, b) for a, b in zip(here, there, strict=True) if a != b] == [(2048, 16384)]
    assert config_of(there, gpu) == preset
    assert _named(*there, device=gpu)["value"] == "balanced"
    assert config_of(here, gpu) == replace(preset, min_tokens=2048), "a number is that number"


def test_a_pipeline_is_called_with_the_request():
    image_request = ImageRequest("red", "blue", "tiny", seed=3, steps=2, guidance_scale=2.0, height=64, width=128)
    assert image_request.call == {
        "prompt": "red",
        "negative_prompt": "blue",
        "guidance_scale": 2.0,
        "height": 64,
        "width": 128,
    }
