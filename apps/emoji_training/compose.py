"""From scenes to pixels, on any device: backgrounds by formula, drawings by sampling their sprites."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .scenes import COLOURS, Background, Scene
from .sprites import Sprites


# Scenes are composed larger and averaged, so that neither edges nor shrunk drawings show steps.
OVERSAMPLING = 2
PIXELS_AT_ONCE = 2**24  # bounds the memory


def compose(scenes: Sequence[Scene], sprites: Sprites, side: int) -> torch.Tensor:
    """The scenes as images between -1 and 1, (scenes, 3, side, side), on the sprites' device."""
    count = max(1, PIXELS_AT_ONCE // (OVERSAMPLING * side) ** 2)
    parts = [
        F.avg_pool2d(_compose(scenes[start : start + count], sprites, OVERSAMPLING * side), OVERSAMPLING)
        for start in range(0, len(scenes), count)
    ]
    return torch.cat(parts).mul_(2).sub_(1)


def _compose(scenes: Sequence[Scene], sprites: Sprites, side: int) -> torch.Tensor:
    """The scenes between 0 and 1, without averaging."""
    device = sprites.images.device
    canvas = draw_backgrounds([scene.background for scene in scenes], side, device)
    for layer in range(max(len(scene.things) for scene in scenes)):
        which = [number for number, scene in enumerate(scenes) if len(scene.things) > layer]
        things = [scenes[number].things[layer] for number in which]
        rows = torch.tensor([thing.row for thing in things]).to(device)
        maps = torch.tensor([sampling_map(thing.x, thing.y, thing.size, thing.turn) for thing in things]).to(device)
        grid = F.affine_grid(maps, [len(things), 4, side, side], align_corners=False)
        drawn = F.grid_sample(sprites.images[rows].float() / 255, grid, align_corners=False)
        index = torch.tensor(which).to(device)
        canvas[index] = drawn[:, :3] + canvas[index] * (1 - drawn[:, 3:])
    return canvas


def sampling_map(x: float, y: float, size: float, turn: float) -> list[list[float]]:
    """The affine map from an image's coordinates to a sprite's, both from -1 to 1, as `affine_grid` takes it."""
    cos, sin = math.cos(math.radians(turn)) / size, math.sin(math.radians(turn)) / size
    middle_x, middle_y = 2 * x - 1, 2 * y - 1
    return [
        [cos, sin, -cos * middle_x - sin * middle_y],
        [-sin, cos, sin * middle_x - cos * middle_y],
    ]


def draw_backgrounds(backgrounds: Sequence[Background], side: int, device: torch.device) -> torch.Tensor:
    """Backgrounds between 0 and 1, (backgrounds, 3, side, side)."""
    first, last = (
        torch.tensor([COLOURS[background.colours[which]] for background in backgrounds]).to(device)[:, :, None, None]
        / 255
        for which in (0, -1)
    )
    canvas = first.expand(-1, -1, side, side).clone()
    places = (torch.arange(side, device=device) + 0.5) / side - 0.5
    for pattern in sorted({background.pattern for background in backgrounds} - {"plain"}):
        which = [number for number, background in enumerate(backgrounds) if background.pattern == pattern]
        angle, period = (
            torch.tensor([getattr(backgrounds[number], value) for number in which]).to(device)[:, None, None]
            for value in ("angle", "period")
        )
        cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
        along = cos * places[None, :] + sin * places[:, None]
        across = cos * places[:, None] - sin * places[None, :]
        share = share_of_second(pattern, along, across, period)[:, None]
        index = torch.tensor(which).to(device)
        canvas[index] = first[index] + share * (last - first)[index]
    return canvas


def share_of_second(pattern: str, along: torch.Tensor, across: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """How much of the second colour is where; coordinates in parts of the side, 0 in the middle."""
    if pattern == "gradient":
        return (along + 0.5).clamp(0, 1)
    first, second = along.remainder(period) / period, across.remainder(period) / period
    if pattern == "stripes":
        return (first < 0.5).float()
    if pattern == "checks":
        return ((first < 0.5) ^ (second < 0.5)).float()
    return ((first - 0.5) ** 2 + (second - 0.5) ** 2 < 0.28**2).float()
