"""Images for people: from values to images, their difference, and several side by side."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch


# A difference is brightened at most this much: below, it is rounding.
_MAX_DIFFERENCE_SCALE = 64
_MIN_PANEL_WIDTH = 320
# What pipelines call the images that they give: most of them; those that give a depth map as well; those of videos.
IMAGE_OUTPUTS = ("images", "rgb", "frames")


def drawn_images(output: Any) -> list[np.ndarray]:
    """The images that a pipeline gave, of shape `(height, width, 3)` in `[0, 1]`; of each video, its first."""
    name = next((name for name in IMAGE_OUTPUTS if getattr(output, name, None) is not None), None)
    if name is None:
        raise TypeError(f"there are no images in its {type(output).__name__}")
    given = getattr(output, name)
    return [_as_array(each[0] if name == "frames" else each) for each in given]


def _as_array(image: Any) -> np.ndarray:
    # Some pipelines from elsewhere know one kind of output, whatever they are asked for.
    if isinstance(image, PIL.Image.Image):
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return image.float().permute(1, 2, 0).cpu().numpy() if isinstance(image, torch.Tensor) else image


def difference_map(image: PIL.Image.Image, reference: PIL.Image.Image) -> tuple[PIL.Image.Image, int]:
    """Where two images differ, black where they agree, and how many times that was brightened."""
    first, second = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (image, reference))
    difference = np.abs(first - second).max(axis=-1)
    peak = np.percentile(difference, 99)
    scale = 1
    while peak > 0 and scale < _MAX_DIFFERENCE_SCALE and peak * scale * 2 <= 255:
        scale *= 2
    return PIL.Image.fromarray(np.minimum(difference * scale, 255).astype(np.uint8)).convert("RGB"), scale


def side_by_side(images: list[PIL.Image.Image], labels: list[str]) -> PIL.Image.Image:
    """Put images of one size beside each other, each under its label."""
    factor = math.ceil(_MIN_PANEL_WIDTH / images[0].width)
    width, height = images[0].width * factor, images[0].height * factor
    gap = width // 32
    font = PIL.ImageFont.load_default(size=width // 20)
    bar = 2 * gap + width // 16
    sheet = PIL.Image.new("RGB", (len(images) * (width + gap) + gap, bar + height + gap), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = gap + number * (width + gap)
        draw.text((left, bar // 2), label, fill="black", font=font, anchor="lm")
        sheet.paste(image.resize((width, height), PIL.Image.Resampling.NEAREST), (left, bar))
    return sheet


def image_warnings(output: Any, name: str, dtype: torch.dtype) -> list[str]:
    """What is wrong with a generated image, so that a black one is never taken for a result."""
    image = drawn_images(output)[0]
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        return [f"The safety checker replaced the image {name} with a black one."]
    cure = "" if dtype == torch.float32 else f" {dtype} may be too coarse for this model: try float32."
    if not np.isfinite(image).all():
        return [f"The image {name} has values that are not finite (NaN), shown as black.{cure}"]
    if np.ptp(image, axis=(0, 1)).max() < 1 / 255:
        return [f"The image {name} is a single colour.{cure}"]
    return []


def to_image(image: np.ndarray) -> PIL.Image.Image:
    """An image of shape `(height, width, 3)` in `[0, 1]` as a PIL image, black where it is not a number."""
    finite = np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0)
    return PIL.Image.fromarray((finite * 255).round().astype(np.uint8))


def opened(file: str | Path) -> PIL.Image.Image:
    """Read an image file and close it."""
    with PIL.Image.open(file) as image:
        return image.convert("RGB")
