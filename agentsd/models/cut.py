"""Where a UNet can be cut: what lies deeper than one of its layers, and can be skipped."""

from dataclasses import dataclass
from typing import Any

import torch

from .unet import block_layers, layer_modules


@dataclass
class Cut:
    """
    Where a UNet is cut.

    Args:
        skipped (`list[torch.nn.Module]`): What does not run in a step that skips; the last one gives the tensor that
            the layers which still run read.
        residuals (`int`): How many outputs of the down blocks are read all the same, `conv_in`'s included.
    """

    skipped: list[torch.nn.Module]
    residuals: int


def cut_unet(unet: Any, branch: int) -> Cut:
    """Everything deeper than `branch`; an error if the UNet has no such place."""
    blocks = list(reversed(list(unet.up_blocks)))
    places = [(b, layer) for b, block in enumerate(blocks) for layer in range(block_layers(block))]
    if branch >= len(places):
        raise ValueError(
            f"`branch` must be below {len(places)}, the number of layers in the up blocks of this "
            f"{type(unet).__name__}, but got {branch}."
        )
    # Block `b` from the output, of which the last `layer + 1` layers run.
    b, layer = places[branch]
    skipped: list[torch.nn.Module] = []
    if layer == 0:
        skipped += unet.down_blocks[b:]
    else:
        edge = unet.down_blocks[b]
        for number in range(layer, block_layers(edge)):
            skipped += layer_modules(edge, number)
        skipped += edge.downsamplers or []
        skipped += unet.down_blocks[b + 1 :]
    skipped += [unet.mid_block] if unet.mid_block is not None else []
    skipped += reversed(blocks[b + 1 :])
    for number in range(block_layers(blocks[b]) - layer - 1):
        skipped += layer_modules(blocks[b], number)
    # Each kept layer of an up block reads one of them: `conv_in`'s, then the layers' and samplers' before the cut.
    return Cut(skipped, residuals=branch + 1)
