"""Every size and rate of the training, in one place."""

from dataclasses import dataclass, field, replace

from .names import NAMES


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; the defaults are those of the full model, for one large GPU."""

    seed: int = 0
    image_size: int = 512
    tuned: bool = False  # from the model that ships, whose VAE, image encoder and tokenizer stay: see start.py
    compiled: bool = True  # torch.compile, where there is a GPU

    # What is drawn: see scenes.py
    styles: tuple[str, ...] = ("noto", "flat", "3d")
    names: tuple[str, ...] | None = None  # all that can be learnt
    sprite_size: int = 384
    scene_counts: tuple[float, ...] = (0.5, 0.3, 0.2)  # weights of one drawing, two, three …
    scene_sizes: tuple[tuple[float, float], ...] = ((0.5, 0.85), (0.34, 0.5), (0.26, 0.4))
    scene_room: float = 0.9  # the part of the free margin that drawings move in
    scene_turn: float = 20.0  # degrees
    backgrounds: dict[str, float] = field(
        default_factory=lambda: {
            "white": 0.3,
            "plain": 0.4,
            "gradient": 0.15,
            "stripes": 0.05,
            "dots": 0.05,
            "checks": 0.05,
        }
    )

    # VAE: early steps see square crops (more images a second), late steps whole images, because group
    # normalisation averages over the image and a VAE trained on crops alone gets whole images' colours wrong.
    vae_channels: tuple[int, ...] = (32, 48, 64, 96)
    vae_groups: int = 8
    vae_crop: int = 256
    vae_batch: int = 48  # of crops; whole images come in batches of the same number of pixels
    vae_lr: float = 1e-3
    vae_gradient_weight: float = 0.5
    vae_colour_weight: float = 1.0
    vae_scaffold_weight: float = 1.0
    vae_kl_weight: float = 1e-3
    vae_minutes: float = 5.0

    # Text and image encoder, for CLIP scores and distances between sets; the UNet starts from its text encoder
    text_width: int = 160
    text_layers: int = 2
    text_heads: int = 5
    vocabulary: int = 1536
    clip_size: int = 128
    clip_patches: int = 16  # a side
    clip_width: int = 128
    clip_layers: int = 4
    clip_heads: int = 4
    clip_batch: int = 1024
    clip_lr: float = 1e-3
    clip_minutes: float = 2.0

    # UNet and text encoder
    unet_channels: tuple[int, ...] = (64, 128, 192, 192)
    unet_layers: int = 1
    unet_groups: int = 16
    unet_head_width: int = 64
    unet_lr: float = 1e-3
    unet_batch: int = 128
    unet_pool: int = 16384  # encoded scenes that batches are taken from …
    unet_fresh: float = 12  # … and how many of them each step replaces
    unet_minutes: float = 11.5
    # Small images first, four at the price of one: what is to be drawn is learnt from many, its detail later.
    coarse_until: float = 0.35  # part of the time
    # What is drawn where is decided while there is almost only noise, and is learned last: after this part of the
    # time, most samples of a batch come from the noisiest part of the range.
    layout_from: float = 0.55
    layout_samples: float = 0.65
    layout_noise: float = 0.65
    # Or both sizes throughout: so many images of half the side in each step, and the part of the range that decides
    # what is drawn where at that side. An image with four times the pixels takes four times the noise to hide it.
    half_batch: int = 0
    half_layout_noise: float = 0.65
    hold_until: float = 0.0  # part of the time at the full learning rate, before it falls
    ema_decay: float = 0.999
    caption_dropout: float = 0.1

    warmup_steps: int = 200
    checkpoint_seconds: float = 90.0
    sample_seconds: float = 400.0
    log_steps: int = 10

    # What the card is measured by
    guidance: float = 4.0
    judged_scenes: int = 1000
    judged_steps: tuple[int, ...] = (20, 50)
    judged_batch: int = 100
    reference_scenes: int = 5000
    reference_rows: int = 1000
    sample_scenes: int = 64
    sample_steps: int = 20
    judged_halves: bool = False  # at half the side, too

    @property
    def latent_size(self) -> int:
        """Side of the latent image: three downsamplings."""
        return self.image_size // 8

    def judged_sizes(self) -> list["Recipe"]:
        """The recipe for each size that the model is judged at."""
        half = replace(self, image_size=self.image_size // 2, sprite_size=self.sprite_size // 2)
        return [self, half] if self.judged_halves else [self]


FULL = Recipe()

# Single drawings on white, for two CPU cores and two hours.
SMALL = replace(
    FULL,
    image_size=256,
    styles=("noto",),
    names=NAMES,
    sprite_size=256,
    scene_counts=(1.0,),
    scene_sizes=((0.82, 0.97),),
    scene_room=0.8,
    scene_turn=0.0,
    backgrounds={"white": 1.0},
    vae_channels=(24, 48, 96, 96),
    vae_crop=128,
    vae_batch=8,
    vae_minutes=15.0,
    text_width=192,
    text_heads=6,
    clip_patches=8,
    clip_batch=128,
    clip_minutes=10.0,
    unet_channels=(48, 96, 240),
    unet_head_width=48,
    unet_batch=16,
    unet_pool=1280,
    unet_fresh=1,
    unet_minutes=80.0,
    layout_from=0.54,
    layout_samples=0.75,
    ema_decay=0.998,
    warmup_steps=50,
    sample_seconds=1200.0,
    judged_scenes=128,
    judged_steps=(20,),
    judged_batch=8,
    reference_scenes=2000,
    sample_scenes=24,
)

# The small model, tuned to draw 512 pixels as well as 256: eight hours on two CPU cores, in any number of parts. Sizes
# and noise levels are mixed alike at all times, so that the averaged weights are good whenever a part ends.
NATIVE512 = replace(
    SMALL,
    image_size=512,
    sprite_size=512,
    tuned=True,
    unet_lr=4e-4,
    unet_batch=6,
    half_batch=12,
    unet_pool=768,
    unet_fresh=0.4,
    unet_minutes=480.0,
    coarse_until=0.0,
    layout_from=0.0,
    layout_samples=0.65,
    layout_noise=0.78,
    hold_until=0.7,
    ema_decay=0.999,
    warmup_steps=100,
    sample_seconds=2400.0,
    sample_scenes=16,
    judged_halves=True,
)

# The same on one large GPU, in minutes: as many images a step as it takes to keep it busy.
NATIVE512_GPU = replace(
    NATIVE512,
    compiled=False,  # compiling would take as long as the training
    unet_lr=8e-4,
    unet_batch=48,
    half_batch=64,
    unet_pool=4096,
    unet_fresh=0.5,
    unet_minutes=3.5,
    hold_until=0.4,
    ema_decay=0.998,
    judged_batch=32,
)

# Toy sizes of the full recipe, to try the whole chain in seconds.
TINY = replace(
    FULL,
    image_size=64,
    sprite_size=48,
    vae_channels=(8, 8, 16, 16),
    vae_crop=32,
    vae_batch=4,
    vae_minutes=0.02,
    text_width=32,
    text_heads=2,
    vocabulary=600,
    clip_size=32,
    clip_patches=8,
    clip_width=32,
    clip_layers=1,
    clip_heads=2,
    clip_batch=4,
    clip_minutes=0.02,
    unet_channels=(32, 32, 64),
    unet_head_width=16,
    unet_batch=4,
    unet_pool=8,
    unet_fresh=2,
    unet_minutes=0.02,
    warmup_steps=2,
    judged_scenes=6,
    judged_steps=(1, 2),
    judged_batch=3,
    reference_scenes=8,
    reference_rows=4,
    sample_scenes=4,
    sample_steps=1,
    sample_seconds=0.0,
)

RECIPES: dict[str, Recipe] = {
    "full": FULL,
    "small": SMALL,
    "native512": NATIVE512,
    "native512-gpu": NATIVE512_GPU,
    "tiny": TINY,
}
