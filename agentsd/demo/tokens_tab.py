"""The tab that shows what is merged, and where the agents are."""

from typing import Any

import gradio as gr
import PIL.Image

from ..token_maps import draw_map
from .engine import Engine, TokensRun
from .events import answered, buttons, on_start
from .inputs import config_of, wish_of
from .queue import Progress, Stopped


_NO_TOKENS = "Nothing is merged at this step in this layer."
_KEPT_SECONDS = 3600


def tokens_tab(engine: Engine, asked: list[Any], patch: list[Any]) -> None:
    """
    Fill the tab.

    Args:
        engine (`Engine`): What generates.
        asked (`list[Component]`): From `prompt_inputs` and `image_inputs`.
        patch (`list[Component]`): From `patch_inputs`.
    """
    gr.Markdown(
        "What agentsd merges: tokens that are merged together have the same colour; tokens without a colour stay on "
        "their own. Dots mark the tokens that the agents grow from."
    )
    start, status = buttons(engine, "Draw and record", "tokens")
    recorded = gr.State(None, time_to_live=_KEPT_SECONDS)
    with gr.Row():
        step = gr.Slider(1, 20, value=1, step=1, label="Step", interactive=False, elem_id="tokens-step")
        layer = gr.Dropdown([], label="Layer", interactive=False, elem_id="tokens-layer")
    drawing = gr.Image(
        label="Merged tokens and agents",
        type="pil",
        format="png",
        interactive=False,
        elem_id="tokens-drawing",
        alt_text="The image, with one colour for each group of merged tokens and a dot on each agent",
    )

    def run(visitor: str, progress: Progress, *values: Any) -> list[Any]:
        wish, config = wish_of(values[: len(asked)]), config_of(values[len(asked) :])
        try:
            record = engine.tokens(visitor, wish, config, progress)
        except Stopped:
            return ["Stopped.", *[gr.skip()] * 4]
        for warning in record.warnings:
            gr.Warning(warning)
        layers = list(dict.fromkeys(name for name, _ in record.maps))
        first = layers[0] if layers else None
        text, image = _drawn(record, 1, first)
        return [
            text,
            record,
            gr.update(value=1, maximum=1 + max((at for _, at in record.maps), default=0), interactive=True),
            gr.update(choices=layers, value=first, interactive=True),
            image,
        ]

    on_start(start, run, [*asked, *patch], [status, recorded, step, layer, drawing], drawing, "tokens")
    draw = answered(_drawn)
    for changed in (step, layer):
        changed.input(draw, [recorded, step, layer], [status, drawing], api_visibility="private")


def _drawn(record: TokensRun | None, step: int, layer: str | None) -> tuple[str, PIL.Image.Image | None]:
    if record is None:
        return "", None
    token_map = record.maps.get((layer or "", step - 1))
    if token_map is None:
        return _NO_TOKENS, record.image
    return f"Step {step}: {token_map.caption}.", draw_map(token_map, record.image)
