"""The UNet shapes of well-known models with random weights: speed does not depend on what a model has learned."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel


# Latents have an eighth of the image's height and width; CLIP always gives 77 text tokens.
LATENT_SCALE = 8
TEXT_TOKENS = 77
# Width of SDXL's pooled text state, and its six numbers on size and crop.
_POOLED_WIDTH = 1280
_TIME_IDS = 6

# Written out rather than left to diffusers' defaults, which may change.
_COMMON: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_SD_BLOCKS: dict[str, Any] = {
    **_COMMON,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
}

# `attention_head_dim` is the number of heads, in spite of its name.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {**_SD_BLOCKS, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {
        **_SD_BLOCKS,
        "sample_size": 96,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        **_COMMON,
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": _POOLED_WIDTH + _TIME_IDS * 256,
    },
}


def random_unet(shape: str, seed: int = 0) -> UNet2DConditionModel:
    """
    A UNet of the shape of a well-known model with random weights, in float32 on the CPU.

    Args:
        shape (`str`):
            `"sd15"` (Stable Diffusion 1.5, 860 million parameters), `"sd21"` (2.1, 866 million) or `"sdxl"` (XL, 2.6
            billion).
        seed (`int`, defaults to `0`): Seed of the weights.

    Returns:
        `UNet2DConditionModel`: The model in evaluation mode. Nothing is downloaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**SHAPES[shape]).eval().requires_grad_(False)


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


def unet_inputs(unet: UNet2DConditionModel, height: int, width: int, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """
    Random inputs for one call of a UNet.

    Args:
        unet (`UNet2DConditionModel`): The model that will be called; inputs get its device and dtype.
        height (`int`): Image height in pixels.
        width (`int`): Image width in pixels.
        batch (`int`, defaults to `1`): Images; each is two samples, for classifier-free guidance.
        seed (`int`, defaults to `0`): Seed of the inputs.

    Returns:
        `dict[str, Any]`: Keyword arguments of the model.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2 * batch, *shape, generator=generator).to(unet.device, unet.dtype)

    inputs: dict[str, Any] = {
        "sample": noise(unet.config.in_channels, height // LATENT_SCALE, width // LATENT_SCALE),
        # The middle of the noise range; patches with a single phase do not depend on it.
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": noise(TEXT_TOKENS, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        config = unet.config
        pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": noise(pooled), "time_ids": noise(_TIME_IDS)}
    return inputs


@torch.no_grad()
def call_unet(unet: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """
    Call a UNet once, without gradients.

    Args:
        unet (`UNet2DConditionModel`): The model.
        inputs (`Mapping[str, Any]`): What [`unet_inputs`] returns.

    Returns:
        `torch.Tensor`: The predicted noise.
    """
    others = {name: value for name, value in inputs.items() if name != "sample"}
    # The latents by position, as pipelines give them: tomesd looks for them there.
    return unet(inputs["sample"], **others).sample
