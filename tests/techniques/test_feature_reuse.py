"""Where a UNet is cut, and what a configuration takes."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from models import tiny_sdxl, tiny_unet

from agentsd import AgentSDConfig, FeatureReuseConfig
from agentsd.models.cut import cut_unet


def names(unet, branch):
    of_module = {module: name for name, module in unet.named_modules()}
    cut = cut_unet(unet, branch)
    return [of_module[module] for module in cut.skipped], cut.residuals


def test_where_a_unet_of_two_layers_a_block_is_cut():
    """The last one skipped is what the first layer that still runs reads; SD 1.5 has one block more."""
    unet = tiny_unet(layers_per_block=2)
    inside = ["up_blocks.2.resnets.0", "up_blocks.2.attentions.0", "up_blocks.2.resnets.1", "up_blocks.2.attentions.1"]
    deep = ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert names(unet, 0) == (["down_blocks.0", *deep, *inside], 1)
    first = [
        "down_blocks.0.resnets.1",
        "down_blocks.0.attentions.1",
        "down_blocks.0.downsamplers.0",
    ]
    assert names(unet, 1) == ([*first, *deep, *inside[:2]], 2)
    assert names(unet, 2) == (["down_blocks.0.downsamplers.0", *deep], 3)
    inside = [name.replace("up_blocks.2", "up_blocks.1") for name in inside]
    assert names(unet, 3) == (["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", *inside], 4)
    # Everything but the middle: the lowest block has no sampler.
    assert names(unet, 8) == (["mid_block"], 9)


def test_blocks_without_attention():
    """SDXL's last up block has none: the layer before the kept one is a residual layer alone."""
    skipped, _ = names(tiny_sdxl().unet, 0)
    assert skipped[-1] == "up_blocks.2.resnets.0"


def test_a_place_that_the_unet_does_not_have():
    with pytest.raises(ValueError, match=r"below 6.*UNet2DConditionModel.*got 6"):
        cut_unet(tiny_unet(), 6)


@pytest.mark.parametrize("steps, interval, expected", [(7, 2, 4), (6, 3, 2), (5, 1, 5)])
def test_which_steps_are_full(steps, interval, expected):
    config = FeatureReuseConfig(interval)
    assert [config.is_full(step) for step in range(steps)].count(True) == expected
    assert config.is_full(0)


def test_numbers_of_numpy_and_dictionaries():
    config = AgentSDConfig(reuse=np.int64(3))
    assert config.reuse == FeatureReuseConfig(interval=3)
    assert AgentSDConfig(reuse=asdict(FeatureReuseConfig(2, 0, 1))).reuse == FeatureReuseConfig(2, 0, 1)
    assert AgentSDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TypeError, match="depth"):
        AgentSDConfig(reuse={"depth": 2})
