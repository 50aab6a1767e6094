"""The tab that shows what is merged, and where the agents are."""

from typing import Any

import gradio as gr
import PIL.Image

from ..token_maps import draw_map
from ..utils.progress import Progress
from .engine import Engine, TokensRun
from .inputs import config_of, request_of
from .tab_parts import GenerationButtons, show_warnings, with_messages


_NO_TOKENS = "Nothing is merged at this step in this layer."
_KEPT_SECONDS = 3600


def tokens_tab(engine: Engine, image: list[Any], patch: list[Any]) -> None:
    """Fill the tab; it uses the controls of the image and of the patch."""
    gr.Markdown(
        "What agentsd merges: tokens that are merged together have the same colour; tokens without a colour stay on "
        "their own. Dots mark the tokens that the agents grow from."
    )
    buttons = GenerationButtons(engine, "tokens", "Draw and record")
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

    def run(session: str, progress: Progress, *values: Any) -> list[Any]:
        request, config = request_of(values[: len(image)]), config_of(values[len(image) :])
        record = engine.tokens(session, request, config, progress)
        show_warnings(record.warnings)
        layers = list(dict.fromkeys(name for name, _ in record.maps))
        first = layers[0] if layers else None
        steps = 1 + max((at for _, at in record.maps), default=0)
        text, drawn = _drawn(record, 1, first)
        return [
            text,
            record,
            # A slider needs two values at least.
            gr.update(value=1, maximum=max(steps, 2), interactive=steps > 1),
            gr.update(choices=layers, value=first, interactive=True),
            drawn,
        ]

    buttons.on_start(run, [*image, *patch], [recorded, step, layer, drawing], drawing)
    for changed in (step, layer):
        # Past the queue, which may be full.
        changed.input(
            with_messages(_drawn),
            [recorded, step, layer],
            [buttons.status, drawing],
            queue=False,
            api_visibility="private",
        )


def _drawn(record: TokensRun | None, step: int, layer: str | None) -> tuple[str, PIL.Image.Image | None]:
    if record is None:
        return "", None
    token_map = record.maps.get((layer or "", step - 1))
    if token_map is None:
        return _NO_TOKENS, record.image
    return f"Step {step}: {token_map.caption}.", draw_map(token_map, record.image)
