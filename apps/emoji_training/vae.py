"""Stage one: the VAE between 256 px pictures and 32×32 latents."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from .data import Icon, render_variants, to_float
from .loop import Checkpoint, Clock, autocast, learning_rate, load_weights, pick_device, ticks
from .recipe import Recipe


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


def sample_windows(images: torch.Tensor, crop: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random windows of `crop` pixels; of two candidates each time the one with less white is kept."""

    def one() -> torch.Tensor:
        index = int(torch.randint(len(images), (), generator=generator))
        top, left = torch.randint(images.shape[-1] - crop + 1, (2,), generator=generator).tolist()
        return images[index, :, top : top + crop, left : left + crop]

    pairs = [(one(), one()) for _ in range(count)]
    return torch.stack([a if a.float().mean() <= b.float().mean() else b for a, b in pairs])


def vary(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the batch and swap the colours of a quarter.

    With swapped colours the VAE cannot guess a hue from a shape ("round with a leaf: red"), it has to store it.
    """
    out = batch.clone()
    for row in range(len(out)):
        coin = torch.rand(2, generator=generator)
        if coin[0] < 0.5:
            out[row] = out[row].flip(-1)
        if coin[1] < 0.25:
            out[row] = out[row][torch.randperm(3, generator=generator)]
    return out


def draw_batch(images: torch.Tensor, recipe: Recipe, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """Crops early, whole pictures late; both cost the same time."""
    whole = float(torch.rand((), generator=generator)) < 2.0 * fraction - 0.4
    crop = images.shape[-1] if whole else recipe.vae_crop
    count = max(1, recipe.vae_batch * recipe.vae_crop**2 // crop**2)
    return to_float(vary(sample_windows(images, crop, count, generator), generator))


def vae_loss(output: torch.Tensor, target: torch.Tensor, kl: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    """L1 for the picture, L1 of its gradients for sharp edges, L1 of colours, a small KL.

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


def scaffold_loss(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Distance of the first three latent channels from the picture's 8-pixel colour averages.

    Left alone, the encoder fills all channels with light and dark and finds hue a thousand steps later, if at all.
    Colours that lie in the latents plainly are also easier for the UNet to get right.
    """
    return (mean[:, :3].float() - F.avg_pool2d(target, 8)).abs().mean()


def train_vae(icons: list[Icon], recipe: Recipe, folder: Path, minutes: float, resume: bool) -> None:
    """Train for `minutes`; the checkpoint in `folder`/vae ends with latents of mean 0 and deviation 1."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    device = pick_device()
    images = render_variants(icons, recipe.image_size, recipe.vae_variants, recipe.seed).flatten(0, 1)
    vae = build_vae(recipe).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = Checkpoint(folder / "vae", {"vae": vae}, optimizer, recipe.checkpoint_seconds)
    state = (checkpoint.load() if resume else None) or {"step": 0, "elapsed": 0.0, "log": []}
    if state.get("finished"):
        return
    generator.manual_seed(recipe.seed + state["step"])
    clock = Clock(minutes, state["elapsed"])
    state["budget"] = minutes
    for bar in ticks(clock, "vae"):
        batch = draw_batch(images, recipe, clock.fraction, generator).to(device, memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.vae_lr, clock.fraction, state["step"], recipe.warmup_steps)
        with autocast(device):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1.0 - posterior.logvar.float()).mean()
        parts = vae_loss(output, batch, kl, recipe)
        parts["scaffold"] = scaffold_loss(posterior.mean, batch)
        # taken down over the first part of the training, then the channels are free
        parts["loss"] = parts["loss"] + recipe.vae_scaffold_weight * (1 - clock.fraction) * parts["scaffold"]
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        state["step"] += 1
        state["elapsed"] = clock.elapsed
        if state["step"] % 10 == 0 or state["step"] == 1:
            row = {"step": state["step"], "minutes": clock.elapsed / 60} | {k: v.item() for k, v in parts.items()}
            state["log"].append(row)
            bar.set_postfix(step=state["step"], **{k: f"{v.item():.4f}" for k, v in parts.items()})
        checkpoint.save_if_due(state)
    standardise_latents(vae, images, device)
    checkpoint.save(state | {"finished": True})


def load_vae(recipe: Recipe, folder: Path) -> AutoencoderKL:
    """The trained VAE, in evaluation mode."""
    vae = build_vae(recipe)
    load_weights(vae, folder / "vae", "vae")
    return vae.to(pick_device()).eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Latent means of uint8 pictures, on the CPU."""
    device = pick_device()
    parts = []
    for chunk in tqdm(images.split(batch), desc="encode", unit="batch", disable=len(images) < 500):
        with autocast(device):
            parts.append(vae.encode(to_float(chunk).to(device)).latent_dist.mean.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> None:
    """Fold a shift and a scale of each latent channel into the VAE's 1×1 convolutions.

    Pipelines know one scaling factor for all channels and no shift, yet white backgrounds push the means of channels
    far from zero. After this the latents have mean 0 and deviation 1, and the VAE decodes exactly as before.
    """
    latents = encode(vae.eval(), images[:: max(1, len(images) // 512)])
    mean = latents.mean(dim=(0, 2, 3)).to(device)
    deviation = latents.std(dim=(0, 2, 3)).to(device)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.bias[4:] -= 2 * deviation.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= deviation[None, :, None, None]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures through the VAE and back."""
    device = pick_device()
    parts = []
    for chunk in images.split(8):
        out = vae.decode(vae.encode(to_float(chunk).to(device)).latent_dist.mean).sample
        parts.append(((out.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each uint8 picture against its counterpart."""
    error = (a.float() - b.float()).pow(2).mean(dim=(1, 2, 3)).clamp_min(1e-6)
    return 10 * torch.log10(255.0**2 / error)


def picture_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """uint8 pictures (N, 3, H, W) side by side."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((3, rows * height, columns * width), 255, dtype=torch.uint8)
    for number, picture in enumerate(images):
        top, left = number // columns * height, number % columns * width
        sheet[:, top : top + height, left : left + width] = picture
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())
