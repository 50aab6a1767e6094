"""Small diffusers pipelines with random weights, built in code: nothing is downloaded.

Every function returns real diffusers and transformers components, laid out like the models people use but a few
hundred times smaller, with the same weights on every call. Images are 128 x 128 pixels unless told otherwise, so the
UNet sees 16 x 16 latents, and one denoising step takes a few hundredths of a second.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


LATENT_SIZE = 16
TEXT_WIDTH = 32
TIME_ID_WIDTH = 8

START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells: one token a letter or digit, anything else is the unknown token."""
    characters = string.ascii_lowercase + string.digits
    entries = [*characters, *(f"{character}</w>" for character in characters), START, END]
    return CLIPTokenizer(vocab={entry: number for number, entry in enumerate(entries)}, merges=[], model_max_length=77)


def tiny_text_encoder(seed: int = 0, projection: bool = False, **overrides: Any) -> CLIPTextModel:
    """A two-layer CLIP text encoder for `tiny_tokenizer`; `projection` makes it SDXL's second one."""
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "projection_dim": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings.update(overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = CLIPTextModelWithProjection if projection else CLIPTextModel
        return kind(CLIPTextConfig(**settings)).eval()


def tiny_vae(seed: int = 0, **overrides: Any) -> AutoencoderKL:
    """A VAE that shrinks each side eight times, as Stable Diffusion's does."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 8 * LATENT_SIZE,
    }
    settings.update(overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**settings).eval()


# One level with one block of attention: to capture a graph takes seconds, most of it for what is not patched.
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


def tiny_unet(seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """A UNet laid out like SD 1.5's: self-attention at every level but the lowest, and in the middle block."""
    settings: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,  # the number of heads, whatever its name says
    }
    settings.update(overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**settings).eval()


def tiny_controlnet(unet: UNet2DConditionModel | None = None, seed: int = 0) -> ControlNetModel:
    """A ControlNet for `unet`. Its output convolutions, zero in a new ControlNet, are random, so it has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(
            unet or tiny_unet(), conditioning_channels=3, conditioning_embedding_out_channels=(8, 8, 8, 8)
        )
        for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight, std=0.1)
    return controlnet.eval()


def ddim(**overrides: Any) -> DDIMScheduler:
    """The noise schedule of Stable Diffusion."""
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    settings.update(overrides)
    return DDIMScheduler(**settings)


def tiny_sd(seed: int = 0, **unet_overrides: Any) -> StableDiffusionPipeline:
    """Laid out like Stable Diffusion 1.5; keywords change the UNet."""
    return _quiet(
        StableDiffusionPipeline(
            vae=tiny_vae(seed),
            text_encoder=tiny_text_encoder(seed),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(seed, **unet_overrides),
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def tiny_sd2(seed: int = 0, **unet_overrides: Any) -> StableDiffusionPipeline:
    """Laid out like Stable Diffusion 2.1: heads by level, linear projections, fp32 attention, v-prediction."""
    settings: dict[str, Any] = {
        "attention_head_dim": [2, 4, 4],
        "use_linear_projection": True,
        "upcast_attention": True,
    }
    settings.update(unet_overrides)
    return _quiet(
        StableDiffusionPipeline(
            vae=tiny_vae(seed),
            text_encoder=tiny_text_encoder(seed, hidden_act="gelu"),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(seed, **settings),
            scheduler=ddim(prediction_type="v_prediction"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def tiny_sdxl(seed: int = 0, **unet_overrides: Any) -> StableDiffusionXLPipeline:
    """Laid out like SDXL: no attention at the top level, more blocks below, two text encoders, size conditioning."""
    settings: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": [2, 4, 4],
        "use_linear_projection": True,
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": 6 * TIME_ID_WIDTH + TEXT_WIDTH,
    }
    settings.update(unet_overrides)
    return _quiet(
        StableDiffusionXLPipeline(
            vae=tiny_vae(seed),
            text_encoder=tiny_text_encoder(seed),
            text_encoder_2=tiny_text_encoder(seed + 1, projection=True, hidden_act="gelu"),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer(),
            unet=tiny_unet(seed, **settings),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        )
    )


def tiny_refiner(seed: int = 0, **unet_overrides: Any) -> StableDiffusionXLImg2ImgPipeline:
    """Laid out like the SDXL refiner: image to image, only the second text encoder, aesthetic-score conditioning."""
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": [2, 4, 4, 4],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": 5 * TIME_ID_WIDTH + TEXT_WIDTH,
    }
    settings.update(unet_overrides)
    return _quiet(
        StableDiffusionXLImg2ImgPipeline(
            vae=tiny_vae(seed),
            text_encoder=None,
            text_encoder_2=tiny_text_encoder(seed, projection=True, hidden_act="gelu"),
            tokenizer=None,
            tokenizer_2=tiny_tokenizer(),
            unet=tiny_unet(seed, **settings),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            requires_aesthetics_score=True,
            add_watermarker=False,
        )
    )


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's transformer, without encoders."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    encoders = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), None, **encoders)


def tiny_flux() -> FluxPipeline:
    """Flux's transformer, without encoders."""
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)
