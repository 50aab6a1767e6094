"""What was merged in a layer, as an image: which tokens share a representative, and where the agents are."""

import colorsys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from .models.unet import AttentionLayer
from .ops.merging import Merging
from .patch import patchable_models
from .runtime.install import patch_of
from .runtime.state import LayerState, Part
from .techniques.agent_attention import AgentAttention
from .techniques.kv_merging import KVMerging


# Neighbouring numbers get hues far apart when each is a golden section of the circle further on.
_GOLDEN_SECTION = 0.618034
_TINT = 0.55


@dataclass(frozen=True)
class TokenMap:
    """
    What was merged in one layer at one step, for one sample of the batch.

    Args:
        groups (`np.ndarray` of shape `(height, width)`): Index of the merged token that stands for each token.
        agents (`np.ndarray` of shape `(agents, 2)`, *optional*):
            Row and column of the token that each agent grew from; `None` where no agents were used.
        is_of_keys (`bool`, defaults to `False`):
            Whether tokens were merged for keys and values only: each had a query, and an output, of its own.
    """

    groups: np.ndarray
    agents: np.ndarray | None = None
    is_of_keys: bool = False

    @property
    def caption(self) -> str:
        """How many tokens there were, how many are left, and how many agents."""
        before, after = self.groups.size, len(np.unique(self.groups))
        if self.is_of_keys:
            return f"{before:,} tokens, their keys and values merged to {after:,}"
        agents = "no agents (token merging only)" if self.agents is None else f"{len(self.agents):,} agents"
        return f"{before:,} tokens merged to {after:,}, {agents}"


def map_of(part: Part, size: tuple[int, int]) -> TokenMap:
    """The map of what a block merges in the last sample of a part; with guidance, that is the one with the prompt."""
    assert part.match is not None
    if part.merging is None:
        assert isinstance(part.keys, KVMerging)
        return TokenMap(_groups(part.keys.merging(part.match), size), is_of_keys=True)
    groups = _groups(part.merging, size)
    operator, sources = part.phase.operator, part.match.sources
    merged = part.merging.members.shape[1]
    if not isinstance(operator, AgentAttention) or not operator.pays(groups.size, sources, merged):
        return TokenMap(groups)
    grown_from = operator.agents(part.match).members[-1].int().cpu().numpy()
    return TokenMap(groups, np.stack([grown_from // size[1], grown_from % size[1]], axis=1))


def _groups(merging: Merging, size: tuple[int, int]) -> np.ndarray:
    return merging.position[-1].reshape(size).int().cpu().numpy()


@contextmanager
def recorded_maps(pipe_or_unet: Any) -> Iterator[dict[tuple[str, int], TokenMap]]:
    """
    Record what a patched model merges while it runs in a `with` block.

    Args:
        pipe_or_unet (`DiffusionPipeline` or `UNet2DConditionModel`): A patched pipeline or model, not compiled.

    Yields:
        `dict[tuple[str, int], TokenMap]`: Filled while it runs. The keys are the name of the layer and the number
        of the UNet call, counted from 0 (most schedulers make one call per step). Layers and calls in which nothing is
        merged are left out.

    Raises:
        TypeError: If it is neither a pipeline with a UNet nor a model.
        ValueError: If it wraps a patched model, as `DistributedDataParallel` does.

    Examples:

    ```python
    >>> from agentsd import AgentSDPipeline
    >>> from agentsd.token_maps import recorded_maps
    >>> pipe = AgentSDPipeline.from_pretrained("emoji").pipe
    >>> pipe.set_progress_bar_config(disable=True)
    >>> with recorded_maps(pipe) as maps:
    ...     image = pipe("red apple", num_inference_steps=2, height=256, width=256)
    >>> next(iter(maps.values())).caption
    '1,024 tokens merged to 615, 64 agents'
    ```
    """
    unet = patchable_models(pipe_or_unet)[0][1]
    patch = patch_of(unet)
    maps: dict[tuple[str, int], TokenMap] = {}
    step = -1

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal step
        step += 1

    def record(layer: AttentionLayer, state: LayerState) -> Callable[..., None]:
        def after(block: Any, args: tuple[Any, ...], output: Any) -> None:
            call = state.call
            if not call.parts or call.size is None:
                return
            # The last sample's part: of samples in several phases, each phase has its own.
            part = max(call.parts, key=lambda part: 0 if part.rows is None else int(part.rows[-1]))
            if part.merging is not None or isinstance(part.keys, KVMerging):
                maps[layer.name, step] = map_of(part, call.size)

        return after

    handles = [unet.register_forward_pre_hook(count)]
    # Before the patch's own hook, which lets go of what was merged at the end of a block.
    handles += [
        layer.block.register_forward_hook(record(layer, state), prepend=True)
        for layer, state in (patch.layers if patch is not None else ())
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def draw_map(token_map: TokenMap, image: PIL.Image.Image, side: int = 768) -> PIL.Image.Image:
    """
    Draw a map over its image: one colour for each group of merged tokens, all other tokens as they are, and a dot on
    each agent.

    Args:
        token_map (`TokenMap`): What was merged.
        image (`PIL.Image.Image`): The image.
        side (`int`, defaults to `768`): Approximate length of the longer side in pixels.

    Returns:
        `PIL.Image.Image`: The drawing, with a whole number of pixels per token.

    Examples:

    ```python
    >>> import numpy as np
    >>> import PIL.Image
    >>> from agentsd.token_maps import TokenMap, draw_map
    >>> draw_map(TokenMap(np.array([[0, 0], [1, 2]])), PIL.Image.new("RGB", (16, 16)), side=64).size
    (64, 64)
    ```
    """
    height, width = token_map.groups.shape
    cell = max(1, side // max(height, width))
    sheet = image.convert("RGB").resize((width * cell, height * cell), PIL.Image.Resampling.LANCZOS)
    numbers, sizes = np.unique(token_map.groups, return_counts=True)
    colours = np.zeros((token_map.groups.max() + 1, 4), dtype=np.uint8)
    for number in numbers[sizes > 1]:
        red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN_SECTION % 1, 0.75, 0.95)
        colours[number] = [round(255 * part) for part in (red, green, blue, _TINT)]
    tint = PIL.Image.fromarray(colours[token_map.groups]).resize(sheet.size, PIL.Image.Resampling.NEAREST)
    sheet.paste(tint, mask=tint.getchannel("A"))
    draw = PIL.ImageDraw.Draw(sheet)
    for row, column in token_map.agents if token_map.agents is not None else ():
        middle = ((column + 0.5) * cell, (row + 0.5) * cell)
        draw.circle(middle, max(2, cell / 4), fill="white", outline="black", width=max(1, cell // 12))
    return sheet
