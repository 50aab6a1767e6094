"""Images as tensors: ranges, grids, and how far apart two are."""

import torch
import torch.nn.functional as F
from PIL import Image


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images between -1 and 1 as uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images between -1 and 1."""
    return images.float() / 127.5 - 1


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each uint8 image against its counterpart."""
    error = (first.float() - second.float()).pow(2).mean(dim=(1, 2, 3)).clamp_min(1e-6)
    return 10 * torch.log10(255.0**2 / error)


def colour_error(output: torch.Tensor, target: torch.Tensor) -> float:
    """Mean distance of the 8-pixel averages of uint8 images, in levels of 255."""
    return float((F.avg_pool2d(output.float(), 8) - F.avg_pool2d(target.float(), 8)).abs().mean())


def image_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """uint8 images (N, 3, H, W) side by side."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((3, rows * height, columns * width), 255, dtype=torch.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height, number % columns * width
        sheet[:, top : top + height, left : left + width] = image
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())
