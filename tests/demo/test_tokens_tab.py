"""What the tab of tokens says where there are none to show."""

import re

import pytest

import agentsd
from agentsd.demo.engine import Engine
from agentsd.demo.requests import ImageRequest
from agentsd.demo.tokens_tab import _drawn


@pytest.fixture
def drawn(model):
    """Draw an image of 128 tokens, and tell what is said of a step of its first layer that merges, if any."""
    engine = Engine([model], device="cpu")

    def drawn(config, step):
        request = ImageRequest("red", "", "tiny", seed=3, steps=8, guidance_scale=5.0, height=128, width=64)
        record = engine.tokens("me", request, config, lambda *_: None)
        layer = next((layer for layer, _ in record.maps), None)
        text, image = _drawn(record, step, layer)
        assert image.size == ((64, 128) if text.find("othing") >= 0 else (384, 768))
        return text

    return drawn


def test_a_step_that_feature_reuse_skips(drawn):
    config = agentsd.AgentSDConfig.preset("fast", min_tokens=0)
    assert [drawn(config, step) for step in (1, 2, 3, 4)] == [
        "Step 1: 128 tokens, their keys and values merged to 13.",
        *(
            f"Step {step}: nothing is merged in this layer. With feature reuse, the deep part of the UNet runs in one "
            "step of 3 only."
            for step in (2, 3)
        ),
        "Step 4: 128 tokens, their keys and values merged to 13.",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_tokens": 2048}, r'more than 128 tokens, and those of fewer than 2,048 are left alone.*preset "paper"'),
        ({"ratio": 0}, "^Nothing is merged: the ratio is 0.$"),
        ({"merge_attn": False}, "^Nothing is merged in any layer.$"),
    ],
)
def test_nothing_is_merged_at_all(drawn, values, message):
    assert re.search(message, drawn(agentsd.AgentSDConfig(**values), 1))
