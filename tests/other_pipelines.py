"""Small pipelines of diffusers that give something else than images, or start from something else than a prompt."""

from __future__ import annotations

from typing import Any

import torch
from compat_models import with_unet
from diffusers import (
    AudioLDMPipeline,
    DDPMScheduler,
    MusicLDMPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionLDM3DPipeline,
    StableDiffusionUpscalePipeline,
    StableUnCLIPImg2ImgPipeline,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from models import LATENT_SIZE, TEXT_WIDTH, ddim, tiny_sd, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)


def tiny_ldm3d() -> StableDiffusionLDM3DPipeline:
    """An image and its depth map from a prompt."""
    parts = {**tiny_sd().components, "vae": tiny_vae(in_channels=6, out_channels=6)}
    return _quiet(StableDiffusionLDM3DPipeline(**parts, requires_safety_checker=False))


def tiny_text_to_video() -> TextToVideoSDPipeline:
    """A video from a prompt, by a pipeline with the callback of older ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet3DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8,
        ).eval()
    parts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer(), "scheduler": ddim()}
    return _quiet(TextToVideoSDPipeline(vae=tiny_vae(), unet=unet, **parts))


def tiny_audio(kind: Any = AudioLDMPipeline) -> Any:
    """Sound from a prompt; its encoder of prompts is another than real ones have, as it is never run."""
    unet = tiny_unet(class_embed_type="simple_projection", projection_class_embeddings_input_dim=TEXT_WIDTH)
    layers = {"upsample_rates": [2], "upsample_kernel_sizes": [4], "resblock_kernel_sizes": [3]}
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(model_in_dim=8, upsample_initial_channel=16, resblock_dilation_sizes=[[1]], **layers)
    )
    parts = {"vae": tiny_vae(), "unet": unet, "scheduler": ddim(), "vocoder": vocoder, "tokenizer": tiny_tokenizer()}
    extra = {"feature_extractor": None} if kind is MusicLDMPipeline else {}
    return _quiet(kind(**parts, text_encoder=tiny_text_encoder(), **extra))


def tiny_upscaler() -> StableDiffusionUpscalePipeline:
    """A larger image from a small one and a prompt, by a pipeline with the callback of older ones."""
    base = tiny_sd(in_channels=7, num_class_embeds=1000)
    parts = {name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return _quiet(StableDiffusionUpscalePipeline(**parts, low_res_scheduler=DDPMScheduler(), max_noise_level=350))


def tiny_image_encoder() -> CLIPVisionModelWithProjection:
    """A CLIP image encoder."""
    size = {"hidden_size": TEXT_WIDTH, "intermediate_size": TEXT_WIDTH, "projection_dim": TEXT_WIDTH}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**size, **depth)).eval()


def tiny_image_processor() -> CLIPImageProcessor:
    """What its images go through first."""
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def tiny_image_variation() -> StableDiffusionImageVariationPipeline:
    """An image from an image, without any prompt."""
    base = tiny_sd()
    parts = {name: getattr(base, name) for name in ("vae", "unet", "scheduler")}
    image_parts = {"image_encoder": tiny_image_encoder(), "feature_extractor": tiny_image_processor()}
    return _quiet(
        StableDiffusionImageVariationPipeline(
            **parts, **image_parts, safety_checker=None, requires_safety_checker=False
        )
    )


def tiny_unclip() -> StableUnCLIPImg2ImgPipeline:
    """An image from an image or its embedding, with a prompt or without."""
    return _quiet(
        StableUnCLIPImg2ImgPipeline(
            feature_extractor=tiny_image_processor(),
            image_encoder=tiny_image_encoder(),
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=TEXT_WIDTH),
            image_noising_scheduler=DDPMScheduler(),
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(),
            unet=tiny_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * TEXT_WIDTH),
            scheduler=ddim(),
            vae=tiny_vae(),
        )
    )


def without_size(kind: Any, **unet_overrides: Any) -> Any:
    """A pipeline whose UNet does not say which size it was made for."""
    pipe = with_unet(kind, **unet_overrides)
    pipe.unet.register_to_config(sample_size=None)
    return pipe


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
