"""The controls: what determines the image, and the patch."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import gradio as gr
import torch

from ..config import AgentSDConfig, LatePhase
from ..presets import PRESETS, PresetName
from ..runtime.break_even import least_tokens
from ..techniques.feature_reuse import FeatureReuseConfig
from .engine import Engine
from .requests import SIDE_UNIT, SMALLEST_SIDE, ImageRequest


_PROMPTS = ("a red apple", "a cat face", "a red heart", "a pineapple", "a fir tree", "a rainbow")
_SEEDS = 2**31
_CPU = torch.device("cpu")
# What the page starts with.
_PRESET: PresetName = "balanced"
# Values that are no preset's.
_CUSTOM = "custom"
PRESET_INFO = {
    "balanced": "A quarter of the keys in large layers; the deep part of the UNet only at every second step",
    "fast": "A tenth of the keys in large layers; the deep part of the UNet only at every third step",
    "paper": "Agents while the image is mostly noise, later token merging",
    "agent": "Agents at every step",
    "tome": "Token merging at every step, no agents",
    _CUSTOM: "What is set below",
}
# Fields of a configuration, in the order of their controls.
_FIELDS = (
    *("ratio", "agent_until", "late_phase", "min_tokens", "max_downsample", "k_scale2", "k_shortcut"),
    *("match_interval", "use_rand", "merge_crossattn", "merge_mlp"),
)
# What the ends of the agent phase's slider are: one phase for all steps, whatever the scheduler's timesteps mean.
_SINGLE_PHASES = {0: PRESETS["tome"], 1: PRESETS["agent"]}
_LATE_PHASES: list[tuple[str, LatePhase]] = [
    ("Token merging", "tome"),
    ("Keys and values: means of 2×2 cells", "kv-mean"),
    ("Keys and values: one token of each 2×2 cell (ToDo)", "kv-nearest"),
    ("Keys and values: merged", "kv-merged"),
]


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
    # Past the queue, which may be full. What is chosen while an answer is on its way is asked for after it: it would
    # be dropped by default, and of two answers at once the earlier choice's may come last.
    common = {"queue": False, "api_visibility": "private", "trigger_mode": "always_last"}
    # A dropdown tells of each choice twice as `input`, and the second answer could undo what was set after the first.
    model.change(engine.own_settings, [model], [rows, columns, strength], **common)
    return [model, seed, steps, strength, rows, columns]


def patch_inputs(engine: Engine) -> list[gr.components.Component]:
    """What the patch is made of, for [`config_of`], under a preset that fills it in."""
    values = values_of(AgentSDConfig.preset(_PRESET), engine.device)
    ratio, share, late, smallest, levels, exponent, shortcut, matching, is_random, cross, mlp, *of_reuse = values
    interval, order, branch = of_reuse
    preset = gr.Radio([*PRESET_INFO], value=_PRESET, label="Preset", info=PRESET_INFO[_PRESET], elem_id="preset")
    with gr.Accordion("Token merging and agent attention", open=False):
        attention = [
            gr.Slider(0, 0.95, value=ratio, step=0.05, label="Ratio", info="Share of tokens, or of keys, merged away"),
            gr.Slider(
                0,
                1,
                value=share,
                step=0.05,
                label="Agent phase",
                info="Share of the noise range, from its noisy end, that uses agents, 1 at every step",
            ),
            gr.Dropdown(_LATE_PHASES, value=late, label="Late phase", info="What runs in the rest of the noise range"),
            gr.Slider(
                0,
                16384,
                value=smallest,
                step=256,
                label="Smallest layer",
                info="Leave layers of fewer tokens alone; the largest have 4,096 in an image of 512×512 pixels",
            ),
            gr.Dropdown(
                [1, 2, 4, 8],
                value=levels,
                label="Deepest layers",
                info="Patch layers down-sampled by at most this factor",
            ),
            gr.Slider(
                0,
                1,
                value=exponent,
                step=0.05,
                label="k_scale2",
                info="Exponent on the softmax scale where queries read agents",
            ),
            gr.Slider(0, 1, value=shortcut, step=0.025, label="k_shortcut", info="Weight of the value shortcut"),
            gr.Slider(
                0,
                10,
                value=matching,
                step=1,
                label="Matching",
                info="Tokens are matched in one of so many steps that run the whole UNet, 0 in every step of all",
            ),
            gr.Checkbox(is_random, label="Choose each cell's destination at random"),
            gr.Checkbox(cross, label="Also merge in cross-attention"),
            gr.Checkbox(mlp, label="Also merge in the feed-forward layers"),
        ]
    with gr.Accordion("Feature reuse", open=False):
        reuse = [
            gr.Slider(
                1,
                10,
                value=interval,
                step=1,
                label="Interval",
                info="The deep part of the UNet runs in one step of so many; 1 is every step, without reuse",
            ),
            gr.Radio(
                [("repeat", 0), ("forecast", 1)],
                value=order,
                label="In between",
                info="Repeat what the deep part gave last, or forecast it from the last two",
            ),
            gr.Slider(
                0,
                11,
                value=branch,
                step=1,
                label="Branch",
                info="How many more layers near the output run in every step: closer to the baseline, and slower",
            ),
        ]
    controls = [*attention, *reuse]
    # By `input`, which is the user's: neither answers the other. For the rest, see `image_inputs`.
    common = {
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
        "trigger_mode": "always_last",
    }
    preset.input(
        partial(_filled_in, device=engine.device),
        [preset, *controls],
        [preset, *controls],
        **common,
    )
    named = partial(_named, device=engine.device)
    gr.on([control.input for control in controls], named, controls, [preset], **common)
    return controls


def _filled_in(name: str, *values: Any, device: torch.device = _CPU) -> list[Any]:
    """What is said of a preset, and its values: for none of them, those that are there."""
    chosen = values if name == _CUSTOM else values_of(AgentSDConfig.preset(cast("PresetName", name)), device)
    return [gr.update(info=PRESET_INFO[name]), *chosen]


def _named(*values: Any, device: torch.device = _CPU) -> dict[str, Any]:
    """The preset that has these values, if there is one."""
    config = config_of(values, device)
    name = next((name for name, fields in PRESETS.items() if AgentSDConfig(**fields) == config), _CUSTOM)
    return gr.update(value=name, info=PRESET_INFO[name])


def request_of(values: Sequence[Any]) -> ImageRequest:
    """The image that the values of [`prompt_inputs`] and [`image_inputs`] ask for."""
    prompt, negative, model, seed, steps, guidance, height, width = values
    return ImageRequest(prompt, negative or "", model, seed, steps, guidance, height, width)


def config_of(values: Sequence[Any], device: torch.device = _CPU) -> AgentSDConfig:
    """The patch that the values of [`patch_inputs`] ask for on the page's device."""
    *of_attention, interval, order, branch = values
    fields = dict(zip(_FIELDS, of_attention, strict=True))
    fields["match_interval"] = fields["match_interval"] or None
    if fields["min_tokens"] == least_tokens("auto", device):
        fields["min_tokens"] = "auto"
    end = fields["agent_until"]
    if end == 1 or (end == 0 and fields["late_phase"] == "tome"):
        del fields["agent_until"], fields["late_phase"]
        fields |= _SINGLE_PHASES[end]
    elif end == 0 and fields["late_phase"] == "kv-merged":
        fields["kv_ratio"] = fields.pop("ratio")  # nothing else is merged
    reuse = None if interval == 1 else FeatureReuseConfig(interval, order, branch)
    return AgentSDConfig(**fields, reuse=reuse)


def values_of(config: AgentSDConfig, device: torch.device = _CPU) -> list[Any]:
    """The values with which [`config_of`] gives a preset's configuration."""
    fields = {**config.to_dict(), "match_interval": config.match_interval or 0}
    fields["min_tokens"] = least_tokens(config.min_tokens, device)
    if not config.is_scheduled:
        fields["agent_until"] = next(at for at, phase in _SINGLE_PHASES.items() if phase.items() <= fields.items())
        fields["late_phase"] = "tome"
    if config.agent_until == 0 and config.kv_ratio is not None:
        fields["ratio"] = config.kv_ratio
    reuse = config.reuse if isinstance(config.reuse, FeatureReuseConfig) else FeatureReuseConfig(interval=1)
    return [*(fields[name] for name in _FIELDS), reuse.interval, reuse.order, reuse.branch]
