"""What the controls of the web page ask for."""

from agentsd import AgentSDConfig
from agentsd.demo.inputs import config_of, request_of
from agentsd.demo.requests import ImageRequest


def test_a_request_is_made_of_the_controls():
    image_request = request_of(["a", None, "m", 1, 2, 3.0, 64, 128])
    assert image_request == ImageRequest("a", "", "m", seed=1, steps=2, guidance_scale=3.0, height=64, width=128)


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


def test_a_pipeline_is_called_with_the_request():
    image_request = ImageRequest("red", "blue", "tiny", seed=3, steps=2, guidance_scale=2.0, height=64, width=128)
    assert image_request.call == {
        "prompt": "red",
        "negative_prompt": "blue",
        "guidance_scale": 2.0,
        "height": 64,
        "width": 128,
    }
