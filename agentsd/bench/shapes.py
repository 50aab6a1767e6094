"""The UNet shapes of well-known models with random weights: speed does not depend on what a model has learned."""

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel


# Stable Diffusion 1.5, written out rather than left to diffusers' defaults, which may change.
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,  # the number of heads, in spite of its name
    "cross_attention_dim": 768,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}

# Latents have an eighth of the picture's height and width; CLIP always gives 77 text tokens.
LATENT_SCALE = 8
TEXT_TOKENS = 77


def sd15_unet(seed: int = 0) -> UNet2DConditionModel:
    """
    Stable Diffusion 1.5's UNet (860 million parameters) with random weights, in float32 on the CPU.

    Args:
        seed (`int`, defaults to `0`): Seed of the weights.

    Returns:
        `UNet2DConditionModel`: The model in evaluation mode. Nothing is downloaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**SD15_UNET).eval().requires_grad_(False)


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """
    A copy of a model with modules of its own and the same weights, so that several patched copies fit in memory.

    Args:
        model (`torch.nn.Module`): The model.

    Returns:
        `torch.nn.Module`: The copy.

    Examples:

    ```python
    >>> import torch
    >>> linear = torch.nn.Linear(2, 2)
    >>> share_weights(linear).weight is linear.weight
    True
    ```
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def unet_inputs(
    unet: UNet2DConditionModel, height: int, width: int, batch: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Random inputs for one call of a UNet.

    Args:
        unet (`UNet2DConditionModel`): The model that will be called; inputs get its device and dtype.
        height (`int`): Picture height in pixels.
        width (`int`): Picture width in pixels.
        batch (`int`, defaults to `2`): Two is one picture with classifier-free guidance.
        seed (`int`, defaults to `0`): Seed of the inputs.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Latents, timestep and text states.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(
        batch, unet.config.in_channels, height // LATENT_SCALE, width // LATENT_SCALE, generator=generator
    )
    text = torch.randn(batch, TEXT_TOKENS, unet.config.cross_attention_dim, generator=generator)
    # The middle of the noise range; patches with a single phase do not depend on it.
    return latents.to(unet.device, unet.dtype), torch.tensor(500, device=unet.device), text.to(unet.device, unet.dtype)
