"""Further small random-weight models for the compatibility tests: adapters, and pipelines of other layouts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionGLIGENPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from models import TEXT_WIDTH, ddim, tiny_sd, tiny_sdxl, tiny_unet
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image


IMAGE_EMBEDDING_WIDTH = 16


def ip_adapter_state_dict(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of an IP-Adapter (four image tokens) for `unet`, in the layout of the published files."""
    width, tokens = unet.config.cross_attention_dim, 4
    weights: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        crossing = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
        for number, name in enumerate(crossing):
            channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            processor = IPAdapterAttnProcessor2_0(channels, width, num_tokens=(tokens,))
            # The published layout counts self-attention layers too.
            weights[f"{2 * number + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight.detach()
            weights[f"{2 * number + 1}.to_v_ip.weight"] = 3 * processor.to_v_ip[0].weight.detach()
        projection = torch.nn.Linear(IMAGE_EMBEDDING_WIDTH, tokens * width)
    image = {f"proj.{name}": value.detach() for name, value in projection.named_parameters()}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": image, "ip_adapter": weights}


def ip_adapter_embeds(seed: int = 0) -> list[torch.Tensor]:
    """The embedding of one image, negative first, as pipelines take it with classifier-free guidance."""
    return [torch.randn(2, 1, IMAGE_EMBEDDING_WIDTH, generator=torch.Generator().manual_seed(seed))]


def save_lora(folder: Path, seed: int = 0) -> Path:
    """Write a LoRA for `tiny_sd` with PEFT and diffusers; it changes all attention layers strongly."""
    unet = tiny_unet()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:  # zero in a new LoRA, which would then change nothing
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=noise))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder


def image(seed: int = 0, size: int = 128) -> Image.Image:
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def half_mask(size: int = 128) -> Image.Image:
    """A mask whose right half is to be painted anew."""
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[:, size // 2 :] = 255
    return Image.fromarray(pixels)


def with_unet(pipeline_class: Any, base: Any = None, controlnet: Any = None, **unet_overrides: Any) -> Any:
    """A pipeline of another class from the parts of `tiny_sd`, with a UNet of its own."""
    base = base or tiny_sd(**unet_overrides)
    extra = {} if controlnet is None else {"controlnet": controlnet}
    accepted = inspect.signature(pipeline_class).parameters
    parts = {name: part for name, part in base.components.items() if name in accepted}
    pipe = pipeline_class(**parts, **extra, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_gligen() -> StableDiffusionGLIGENPipeline:
    """A pipeline whose blocks hold GLIGEN's gated self-attention; its gates, zero in a new one, are open."""
    pipe = with_unet(StableDiffusionGLIGENPipeline, attention_type="gated", cross_attention_dim=TEXT_WIDTH)
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            torch.nn.init.constant_(parameter, 1.0)
    # Nor does an untrained one make much of where a box is.
    torch.nn.init.normal_(pipe.unet.position_net.linears[-1].weight, generator=torch.Generator().manual_seed(0))
    return pipe


def tiny_instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    """A pipeline with eight input channels and guidance over three predictions."""
    return with_unet(StableDiffusionInstructPix2PixPipeline, in_channels=8)


def tiny_animatediff(seed: int = 0) -> AnimateDiffPipeline:
    """A video pipeline: the UNet of `tiny_sd` with motion modules between its blocks."""
    base = tiny_sd(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = MotionAdapter(
            block_out_channels=base.unet.config.block_out_channels,
            motion_layers_per_block=1,
            motion_norm_num_groups=8,
            motion_num_attention_heads=4,
            motion_max_seq_length=8,
        ).eval()
    pipe = AnimateDiffPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        motion_adapter=adapter,
        scheduler=ddim(beta_schedule="linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_modular_sdxl() -> Any:
    """The modular pipeline of SDXL with the parts of `tiny_sdxl`; its guider calls the UNet once a condition."""
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**tiny_sdxl().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_lcm() -> LatentConsistencyModelPipeline:
    """A latent consistency model: guidance is an input of the UNet, so that there is no second prediction."""
    base = tiny_sd(time_cond_proj_dim=16)
    base.scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return with_unet(LatentConsistencyModelPipeline, base)
