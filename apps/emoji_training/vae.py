"""Stage one: the VAE between images and latents of an eighth of their side."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .compose import compose
from .loop import (
    Checkpoint,
    Progress,
    autocast,
    descend,
    learning_rate,
    load_weights,
    new_state,
    pick_device,
    set_rate,
)
from .recipe import Recipe
from .scenes import SceneSource
from .sprites import Sprites


def build_vae(recipe: Recipe) -> AutoencoderKL:
    """The VAE with fresh weights: factor 8, four latent channels."""
    depth = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=recipe.vae_groups,
        sample_size=recipe.image_size,
        scaling_factor=1.0,
    )


def vary(batch: torch.Tensor) -> torch.Tensor:
    """Mirror half of the batch and swap the colours of a quarter.

    With swapped colours the VAE cannot guess a hue from a shape ("round with a leaf: red"), it has to store it.
    """
    coins = torch.rand(2, len(batch), 1, 1, 1, device=batch.device)
    batch = torch.where(coins[0] < 0.5, batch.flip(-1), batch)
    rows = torch.arange(len(batch), device=batch.device)[:, None]
    orders = torch.rand(len(batch), 3, device=batch.device).argsort(dim=1)
    return torch.where(coins[1] < 0.25, batch[rows, orders], batch)


def windows(images: torch.Tensor, crop: int) -> torch.Tensor:
    """A window of `crop` pixels out of each image, of two at random the one with more in it."""
    candidates = []
    for _ in range(2):
        corners = torch.randint(images.shape[-1] - crop + 1, (len(images), 2)).tolist()
        cut = [
            image[:, top : top + crop, left : left + crop] for image, (top, left) in zip(images, corners, strict=True)
        ]
        candidates.append(torch.stack(cut))
    first, second = candidates
    contrast = [candidate.std(dim=(2, 3), keepdim=True).mean(dim=1, keepdim=True) for candidate in candidates]
    return torch.where(contrast[0] >= contrast[1], first, second)


def draw_batch(source: SceneSource, sprites: Sprites, recipe: Recipe, fraction: float) -> torch.Tensor:
    """Crops early, whole images late; both cost the same time."""
    whole = float(torch.rand(())) < 2.0 * fraction - 0.4
    count = recipe.vae_batch * recipe.vae_crop**2 // recipe.image_size**2 if whole else recipe.vae_batch
    images = compose(source.draw(max(1, count)), sprites, recipe.image_size)
    return vary(images if whole else windows(images, recipe.vae_crop))


def vae_loss(output: torch.Tensor, target: torch.Tensor, kl: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    """L1 for the image, L1 of its gradients for sharp edges, L1 of colours, a small KL.

    The colour term compares 4-pixel averages, and their colour differences three times over: light and dark are
    learnt first and hue last, so on a short budget hue needs the push.
    """
    output = output.float()
    edges = (output.diff(dim=-1) - target.diff(dim=-1)).abs().mean() + (
        output.diff(dim=-2) - target.diff(dim=-2)
    ).abs().mean()
    tint = F.avg_pool2d(output, 4) - F.avg_pool2d(target, 4)
    colour = tint.abs().mean() + 3.0 * (tint - tint.roll(1, dims=1)).abs().mean()
    parts = {"l1": (output - target).abs().mean(), "edges": edges, "colour": colour, "kl": kl}
    parts["loss"] = (
        parts["l1"]
        + recipe.vae_gradient_weight * edges
        + recipe.vae_colour_weight * colour
        + recipe.vae_kl_weight * kl
    )
    return parts


def kl_loss(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """Mean over the latents of the divergence from a standard normal distribution."""
    return 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1.0 - posterior.logvar.float()).mean()


def scaffold_loss(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Distance of the first three latent channels from the image's 8-pixel colour averages.

    Left alone, the encoder fills all channels with light and dark and finds hue a thousand steps later, if at all.
    Colours that lie in the latents plainly are also easier for the UNet to get right.
    """
    return (mean[:, :3].float() - F.avg_pool2d(target, 8)).abs().mean()


def train_vae(sprites: Sprites, recipe: Recipe, folder: Path, minutes: float, resume: bool) -> None:
    """Train for `minutes`; the checkpoint in `folder`/vae ends with latents of mean 0 and deviation 1."""
    torch.manual_seed(recipe.seed)
    device = pick_device()
    vae = build_vae(recipe).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    checkpoint = Checkpoint(folder / "vae", {"vae": vae}, optimizer, recipe.checkpoint_seconds)
    state = (checkpoint.load() if resume else None) or new_state()
    if state.get("finished"):
        return
    torch.manual_seed(recipe.seed + state["step"])
    sprites = sprites.to(device)
    source = SceneSource(sprites.icons, recipe, f"vae {recipe.seed} {state['step']}")
    progress = Progress("vae", state, minutes, recipe.log_steps)
    for fraction in progress:
        batch = draw_batch(source, sprites, recipe, fraction).to(memory_format=torch.channels_last)
        set_rate(optimizer, learning_rate(recipe.vae_lr, fraction, state["step"], recipe.warmup_steps))
        with autocast(device):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
        parts = vae_loss(output, batch, kl_loss(posterior), recipe)
        parts["scaffold"] = scaffold_loss(posterior.mean, batch)
        # taken down over the first part of the training, then the channels are free
        parts["loss"] = parts["loss"] + recipe.vae_scaffold_weight * (1 - fraction) * parts["scaffold"]
        descend(parts["loss"], optimizer)
        progress.end_step(parts)
        checkpoint.save_if_due(state)
    some = compose(SceneSource(sprites.icons, recipe, "latents").draw(256), sprites, recipe.image_size)
    standardise_latents(vae, some)
    checkpoint.save(state | {"finished": True})


def load_vae(recipe: Recipe, folder: Path) -> AutoencoderKL:
    """The trained VAE, in evaluation mode."""
    vae = build_vae(recipe)
    load_weights(vae, folder / "vae", "vae")
    return vae.to(pick_device(), memory_format=torch.channels_last).eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latent means of images between -1 and 1, on their device."""
    with autocast(images.device):
        return torch.cat([vae.encode(part).latent_dist.mean.float() for part in images.split(64)])


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images between -1 and 1 through the VAE and back."""
    with autocast(images.device):
        return torch.cat(
            [vae.decode(vae.encode(part).latent_dist.mean).sample.float().clamp_(-1, 1) for part in images.split(16)]
        )


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold a shift and a scale of each latent channel into the VAE's 1×1 convolutions.

    Pipelines know one scaling factor for all channels and no shift, yet white backgrounds push the means of channels
    far from zero. After this the latents have mean 0 and deviation 1, and the VAE decodes exactly as before.
    """
    latents = encode(vae.eval(), images)
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.bias[4:] -= 2 * deviation.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= deviation[None, :, None, None]
