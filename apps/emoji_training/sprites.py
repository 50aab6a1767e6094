"""Drawings rendered once, to be placed in scenes."""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .archives import DataError, Icon


@dataclass
class Sprites:
    """Rendered drawings: `images` is uint8, (icons, 4, side, side), the colours already multiplied by alpha."""

    icons: list[Icon]
    images: torch.Tensor

    def smaller(self, side: int) -> "Sprites":
        """The same drawings at a smaller side, averaged, so that small scenes need not skip pixels."""
        parts = [F.adaptive_avg_pool2d(part.float(), side).round_().to(torch.uint8) for part in self.images.split(64)]
        return Sprites(self.icons, torch.cat(parts))

    def to(self, device: torch.device) -> "Sprites":
        """The same drawings on another device."""
        return Sprites(self.icons, self.images.to(device))


def render(icon: Icon, side: int) -> np.ndarray:
    """A drawing on nothing: uint8, (4, side, side), centred in a square, multiplied by alpha."""
    square = max(icon.width, icon.height)
    left, top = (icon.width - square) / 2, (icon.height - square) / 2
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {square} {square}" width="{side}" height="{side}">{icon.body}</svg>'
    )
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    except ValueError as error:
        raise DataError(f"the drawing {icon.name!r} of style {icon.style!r} cannot be rendered: {error}") from error
    pixels = np.asarray(Image.open(BytesIO(bytes(png))).convert("RGBA")).astype(np.uint16)
    pixels[..., :3] = (pixels[..., :3] * pixels[..., 3:] + 127) // 255
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(2, 0, 1))


def render_sprites(icons: list[Icon], side: int) -> Sprites:
    """Render all drawings, on all cores: in processes, since the renderer does not let go of Python's lock."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(partial(render, side=side), icons, chunksize=8)
        images = np.stack(list(tqdm(jobs, total=len(icons), desc="render", unit="img")))
    return Sprites(icons, torch.from_numpy(images))


def load_sprites(icons: list[Icon], side: int, file: Path) -> Sprites:
    """The drawings from `file` if it holds just these at this size; else rendered, and kept there."""
    key = hashlib.sha256(json.dumps([side, *([i.style, i.name, i.body] for i in icons)]).encode()).hexdigest()
    if file.is_file():
        with safe_open(file, framework="pt") as kept:
            if kept.metadata()["key"] == key:
                return Sprites(icons, kept.get_tensor("images"))
    sprites = render_sprites(icons, side)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    save_file({"images": sprites.images}, unfinished, metadata={"key": key})
    unfinished.replace(file)
    return sprites
