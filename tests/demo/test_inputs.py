"""What the controls of the web page say, and what visitors are told of errors."""

from pathlib import Path

import gradio as gr
import pytest

from agentsd import AgentSDConfig
from agentsd.demo.events import answered
from agentsd.demo.inputs import config_of, wish_of
from agentsd.demo.requests import Wish


def test_a_wish_is_made_of_the_controls():
    wish = wish_of(["a", None, "m", 1, 2, 3.0, 64, 128])
    assert wish == Wish("a", "", "m", seed=1, steps=2, guidance_scale=3.0, height=64, width=128)


def test_a_configuration_is_made_of_the_controls():
    assert config_of([0.5, 0.2, 2, 0.1, 0.05, False, True, False]) == AgentSDConfig(
        ratio=0.5,
        agent_until=0.2,
        max_downsample=2,
        k_scale2=0.1,
        k_shortcut=0.05,
        use_rand=False,
        merge_crossattn=True,
        merge_mlp=False,
    )


def test_a_pipeline_is_called_with_the_wish():
    wish = Wish("red", "blue", "tiny", seed=3, steps=2, guidance_scale=2.0, height=64, width=128)
    assert wish.call == {
        "prompt": "red",
        "negative_prompt": "blue",
        "guidance_scale": 2.0,
        "height": 64,
        "width": 128,
    }


def test_visitors_are_not_told_paths_of_the_server():
    with pytest.raises(gr.Error) as told:
        answered(lambda: Path("/no/such/secret").read_text())()
    assert "secret" not in told.value.message
