"""The controls: what determines the image, and the patch."""

import random
from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..config import AgentSDConfig
from .engine import Engine
from .requests import SIDE_UNIT, SMALLEST_SIDE, ImageRequest


_PROMPTS = ("a red apple", "a cat face", "a red heart", "a pineapple", "a fir tree", "a rainbow")
_SEEDS = 2**31


def prompt_inputs(engine: Engine) -> list[gr.components.Component]:
    """What to draw, and what not: the first part of what [`request_of`] takes."""
    longest = engine.limits.prompt
    with gr.Row():
        prompt = gr.Textbox(
            _PROMPTS[0], label="Prompt", lines=2, max_lines=4, max_length=longest, scale=2, min_width=300
        )
        negative = gr.Textbox(
            "",
            label="Negative prompt",
            lines=2,
            max_lines=4,
            max_length=longest,
            placeholder="what not to draw",
            min_width=200,
        )
    gr.Examples(
        [[text] for text in _PROMPTS], [prompt], label="Examples (for the emoji model)", api_visibility="private"
    )
    return [prompt, negative]


def image_inputs(engine: Engine) -> list[gr.components.Component]:
    """What else determines the image: the second part of what [`request_of`] takes."""
    limits = engine.limits
    height, width, guidance = engine.own_settings(engine.models[0])
    model = gr.Dropdown(engine.models, value=engine.models[0], label="Model")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        dice = gr.Button("⚄ New seed", min_width=100)
    steps = gr.Slider(1, limits.steps, value=min(20, limits.steps), step=1, label="Steps")
    strength = gr.Slider(0, 20, value=guidance, step=0.5, label="Guidance")
    with gr.Row():
        rows = gr.Slider(
            SMALLEST_SIDE, limits.side, value=height, step=SIDE_UNIT, label="Height in pixels", min_width=120
        )
        columns = gr.Slider(
            SMALLEST_SIDE, limits.side, value=width, step=SIDE_UNIT, label="Width in pixels", min_width=120
        )
    dice.click(lambda: random.randrange(_SEEDS), outputs=[seed], queue=False, api_visibility="private")
    # Past the queue, which may be full.
    model.input(engine.own_settings, [model], [rows, columns, strength], queue=False, api_visibility="private")
    return [model, seed, steps, strength, rows, columns]


def patch_inputs() -> list[gr.components.Component]:
    """What the patch is made of, for [`config_of`]."""
    default = AgentSDConfig()
    ratio = gr.Slider(
        0,
        0.95,
        value=default.ratio,
        step=0.05,
        label="Ratio",
        info="Share of tokens merged away",
    )
    until = gr.Slider(
        0,
        1,
        value=default.agent_until,
        step=0.05,
        label="Agent phase",
        info="Share of the noise range, from its noisy end, that uses agents; the rest only merges tokens",
    )
    with gr.Accordion("More", open=False):
        levels = gr.Dropdown(
            [1, 2, 4, 8],
            value=default.max_downsample,
            label="Deepest layers",
            info="Patch layers down-sampled by at most this factor",
        )
        exponent = gr.Slider(
            0,
            1,
            value=default.k_scale2,
            step=0.05,
            label="k_scale2",
            info="Exponent on the softmax scale where queries read agents",
        )
        shortcut = gr.Slider(
            0, 1, value=default.k_shortcut, step=0.025, label="k_shortcut", info="Weight of the value shortcut"
        )
        is_random = gr.Checkbox(default.use_rand, label="Choose each cell's destination at random")
        cross = gr.Checkbox(default.merge_crossattn, label="Also merge in cross-attention")
        mlp = gr.Checkbox(default.merge_mlp, label="Also merge in the feed-forward layers")
    return [ratio, until, levels, exponent, shortcut, is_random, cross, mlp]


def request_of(values: Sequence[Any]) -> ImageRequest:
    """The image that the values of [`prompt_inputs`] and [`image_inputs`] ask for."""
    prompt, negative, model, seed, steps, guidance, height, width = values
    return ImageRequest(prompt, negative or "", model, seed, steps, guidance, height, width)


def config_of(values: Sequence[Any]) -> AgentSDConfig:
    """The patch that the values of [`patch_inputs`] ask for."""
    names = "ratio agent_until max_downsample k_scale2 k_shortcut use_rand merge_crossattn merge_mlp".split()
    return AgentSDConfig.from_dict(dict(zip(names, values, strict=True)))
