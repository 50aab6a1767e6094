"""How many operations a patch saves, counted on a copy of the UNet that has no weights."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from .models.devices import device_of
from .models.unet import plain_name
from .patch import apply_patch
from .runtime.break_even import least_tokens
from .runtime.install import ModelPatch, patch_of
from .runtime.steps import running_phases


_TEXT_TOKENS = 77  # CLIP's
# Nothing of them is counted, and on tensors without data they take long.
_NOT_COUNTED = (torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.SiLU)
# What only adds to the embedding of the timestep or the text: next to no operations, but inputs of many kinds.
_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


def expected_speedup(unet: Any, patch: ModelPatch, height: int, width: int) -> float | None:
    """
    By how much a patch divides the operations of a long run, whose steps are spread evenly over the noise range.

    Matrix products and convolutions are counted. Merging, normalisation and the like take time too, so this is more
    than what is measured.

    Args:
        unet (`UNet2DConditionModel`): The patched model. Only its configuration and its device are read.
        patch (`ModelPatch`): Its patch.
        height (`int`): Height of the latents.
        width (`int`): Width of the latents.

    Returns:
        `float`, *optional*: The quotient; `None` for another kind of model, whose inputs are not known.

    Examples:

    ```python
    >>> import agentsd
    >>> from agentsd.operations import expected_speedup
    >>> from agentsd.runtime.install import patch_of
    >>> unet = agentsd.AgentSDPipeline.from_pretrained("emoji", preset="fast").pipe.unet
    >>> 2 < expected_speedup(unet, patch_of(unet), 32, 32) < 3
    True
    ```
    """
    if not isinstance(unet, UNet2DConditionModel) or not isinstance(unet.config.cross_attention_dim, int):
        return None
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config({**unet.config, **dict.fromkeys(_CONDITIONS)})
        inputs = {
            "sample": torch.empty(1, twin.config.in_channels, height, width),
            "encoder_hidden_states": torch.empty(1, _TEXT_TOKENS, twin.config.cross_attention_dim),
        }
    for module in twin.modules():
        if isinstance(module, _NOT_COUNTED):
            module.forward = _unchanged  # type: ignore[method-assign]
    plain = _operations(twin, inputs, 0.0)
    names = {plain_name(layer.name) for layer, _ in patch.layers}
    config = replace(patch.config, min_tokens=least_tokens(patch.config.min_tokens, device_of(unet)))
    apply_patch(twin, config=config, filter_fn=lambda name, _: plain_name(name) in names)
    own = patch_of(twin)
    assert own is not None
    clock = own.clock
    interval = config.reuse.interval if config.reuse is not None else 1
    steps = interval * (config.match_interval or 1)
    patched = 0.0
    # From the last phase on: where timesteps go up, another image begins, with a step that runs the whole UNet.
    for start, phase in reversed(running_phases(clock.phases)):
        middle = (1 - (start + phase.until) / 2) * clock.num_train_timesteps
        # As many steps of a run as it takes until all is as in the first: of one phase, so hardly apart.
        run = [_operations(twin, inputs, middle * (1 - 1e-6 * step)) for step in range(steps)]
        patched += (phase.until - start) * sum(run) / steps
    return plain / patched


def _unchanged(input: torch.Tensor) -> torch.Tensor:
    return input


def _operations(unet: Any, inputs: dict[str, Any], timestep: float) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(timestep=timestep, **inputs)
    return counter.get_total_flops()
