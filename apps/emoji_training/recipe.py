"""Every size and rate of the training, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; the defaults make the shipped model."""

    image_size: int = 256
    seed: int = 0

    # VAE: early steps see square crops (more pictures a second), late steps whole pictures, because group
    # normalisation averages over the picture and a VAE trained on crops alone gets whole pictures' colours wrong.
    vae_channels: tuple[int, ...] = (24, 48, 96, 96)
    vae_groups: int = 8
    vae_variants: int = 12
    vae_crop: int = 128
    vae_batch: int = 8  # of crops; whole pictures come in batches of the same number of pixels
    vae_lr: float = 1e-3
    vae_gradient_weight: float = 0.5
    vae_colour_weight: float = 1.0
    vae_scaffold_weight: float = 1.0
    vae_kl_weight: float = 1e-3
    vae_minutes: float = 20.0

    # UNet and text encoder
    unet_channels: tuple[int, ...] = (48, 96, 240)
    unet_layers: int = 1
    unet_groups: int = 16
    unet_head_width: int = 48
    unet_variants: int = 10
    unet_batch: int = 16
    unet_lr: float = 1e-3
    unet_minutes: float = 99.0
    # What is drawn where is decided while there is almost only noise, and is learned last: after this part of the
    # time, most samples of a batch come from the noisiest part of the range.
    layout_from: float = 0.54
    layout_samples: float = 0.75
    layout_noise: float = 0.65
    ema_decay: float = 0.998
    caption_dropout: float = 0.1
    text_width: int = 192
    text_layers: int = 2
    text_heads: int = 6
    vocabulary: int = 1536

    # Image encoder for CLIP scores and distances between sets
    clip_size: int = 128
    clip_width: int = 128
    clip_layers: int = 4
    clip_heads: int = 4
    clip_variants: int = 24
    clip_batch: int = 128
    clip_lr: float = 1e-3
    clip_minutes: float = 10.0

    warmup_steps: int = 50
    checkpoint_seconds: float = 90.0
    sample_seconds: float = 1200.0
    sample_steps: int = 25
    guidance: float = 4.0
    match_steps: int = 10

    @property
    def latent_size(self) -> int:
        """Side of the latent picture: three downsamplings."""
        return self.image_size // 8


TINY = Recipe(
    image_size=64,
    vae_channels=(8, 8, 16, 16),
    vae_variants=2,
    vae_crop=32,
    vae_batch=4,
    vae_minutes=0.02,
    unet_channels=(32, 32, 64),
    unet_head_width=16,
    unet_variants=2,
    unet_batch=4,
    unet_minutes=0.02,
    text_width=32,
    text_heads=2,
    vocabulary=600,
    clip_size=32,
    clip_width=32,
    clip_layers=1,
    clip_heads=2,
    clip_variants=2,
    clip_minutes=0.02,
    sample_steps=2,
    match_steps=1,
    sample_seconds=1e9,
    warmup_steps=2,
)
