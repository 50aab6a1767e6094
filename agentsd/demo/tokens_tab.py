"""The tab that shows what is merged, and where the agents are."""

from typing import Any

import gradio as gr
import PIL.Image

from ..techniques.feature_reuse import FeatureReuseConfig
from ..token_maps import draw_map
from ..utils.progress import Progress
from .engine import Engine, TokensRun
from .inputs import config_of, request_of
from .tab_parts import GenerationButtons, with_messages, with_warnings


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
        request, config = request_of(values[: len(image)]), config_of(values[len(image) :], engine.device)
        record = engine.tokens(session, request, config, progress)
        layers = list(dict.fromkeys(name for name, _ in record.maps))
        first = layers[0] if layers else None
        text, drawn = _drawn(record, 1, first)
        return [
            text,
            record,
            # A slider needs two values at least.
            gr.update(value=1, maximum=max(record.steps, 2), interactive=record.steps > 1 and bool(layers)),
            gr.update(choices=layers, value=first, interactive=bool(layers)),
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
            trigger_mode="always_last",
        )


def _drawn(record: TokensRun | None, step: int, layer: str | None) -> tuple[str, PIL.Image.Image | None]:
    if record is None:
        return "", None
    token_map = record.maps.get((layer or "", step - 1))
    if token_map is None:
        return with_warnings(_why_nothing(record, step), record.warnings), record.image
    return with_warnings(f"Step {step}: {token_map.caption}.", record.warnings), draw_map(token_map, record.image)


def _why_nothing(record: TokensRun, step: int) -> str:
    config, layers = record.report.config, record.report.rows
    if record.maps:
        text = f"Step {step}: nothing is merged in this layer."
        if isinstance(config.reuse, FeatureReuseConfig):
            text += f" With feature reuse, the deep part of the UNet runs in one step of {config.reuse.interval} only."
        return text
    most = max((row.tokens for row in layers if row.tokens is not None), default=0)
    least = record.report.min_tokens
    if most < least:
        return (
            f"Nothing is merged: no layer of this image has more than {most:,} tokens, and those of fewer than "
            f'{least:,} are left alone. Draw a larger image, lower "Smallest layer", or choose the preset '
            '"paper".'
        )
    return "Nothing is merged" + (": the ratio is 0." if config.ratio == 0 else " in any layer.")
