"""Scenes as descriptions: which drawings, where, how large, on what. No pixels here; see compose.py."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .archives import Icon
from .recipe import Recipe


# The colours of backgrounds, and how they are called in captions.
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 27),
    "gray": (158, 158, 158),
    "red": (229, 57, 53),
    "orange": (251, 140, 0),
    "yellow": (253, 216, 53),
    "green": (67, 160, 71),
    "teal": (0, 150, 136),
    "light blue": (129, 212, 250),
    "blue": (30, 136, 229),
    "purple": (142, 36, 170),
    "pink": (244, 143, 177),
    "brown": (109, 76, 65),
    "beige": (239, 222, 190),
}


@dataclass(frozen=True)
class Thing:
    """A drawing in a scene: its row among the sprites, centre and size in parts of the image's side, and turn."""

    row: int
    name: str
    x: float
    y: float
    size: float
    turn: float  # degrees, clockwise


@dataclass(frozen=True)
class Background:
    """What lies behind: `pattern` is "plain", "gradient", "stripes", "dots" or "checks", of one or two colours."""

    pattern: str
    colours: tuple[str, ...]
    angle: float  # degrees
    period: float  # in parts of the image's side


@dataclass(frozen=True)
class Scene:
    """One image, described."""

    style: str
    things: tuple[Thing, ...]
    background: Background


class SceneSource:
    """
    Draws scenes at random.

    Args:
        icons (`Sequence[Icon]`): The drawings, in the order of the sprites.
        recipe (`Recipe`): How many drawings a scene has, how large they are, and what lies behind them.
        seed (`str`): Of the draws.
    """

    def __init__(self, icons: Sequence[Icon], recipe: Recipe, seed: str):
        self.recipe, self.rng = recipe, random.Random(seed)
        self.rows: dict[str, dict[str, int]] = {}
        for row, icon in enumerate(icons):
            self.rows.setdefault(icon.style, {})[icon.name] = row
        self.names = sorted({icon.name for icon in icons})
        self.names_of = {style: list(rows) for style, rows in self.rows.items()}

    def draw(self, count: int) -> list[Scene]:
        """Random scenes; no two share the first drawing before every drawing has been a first one."""
        firsts: list[str] = []
        while len(firsts) < count:
            firsts += self.rng.sample(self.names, len(self.names))
        return [self.scene(first) for first in firsts[:count]]

    def scene(self, first: str) -> Scene:
        """A random scene with this drawing in it."""
        style = self.rng.choice([style for style, rows in self.rows.items() if first in rows])
        rows = self.rows[style]
        number = self.rng.choices(range(1, len(self.recipe.scene_counts) + 1), self.recipe.scene_counts)[0]
        others = [name for name in self.rng.sample(self.names_of[style], min(number, len(rows))) if name != first]
        names = [first, *others[: number - 1]]
        things = tuple(
            Thing(rows[name], name, *place, self.rng.uniform(-1, 1) * self.recipe.scene_turn)
            for name, place in zip(names, self.places(len(names)), strict=True)
        )
        return Scene(style, things, self.background())

    def places(self, count: int) -> list[tuple[float, float, float]]:
        """Centres and sizes that keep clear of each other."""
        low, high = self.recipe.scene_sizes[count - 1]
        shrink = 1.0
        while True:
            placed: list[tuple[float, float, float]] = []
            for _ in range(count):
                size = self.rng.uniform(low, high) * shrink
                room = self.recipe.scene_room * (1 - size) / 2
                placed.append((0.5 + self.rng.uniform(-room, room), 0.5 + self.rng.uniform(-room, room), size))
            pairs = [(a, b) for number, a in enumerate(placed) for b in placed[:number]]
            if all(math.dist(a[:2], b[:2]) >= 0.45 * (a[2] + b[2]) for a, b in pairs):
                return placed
            shrink *= 0.99  # so that an unlucky draw comes to an end

    def background(self) -> Background:
        """A random background."""
        pattern = self.rng.choices(list(self.recipe.backgrounds), list(self.recipe.backgrounds.values()))[0]
        angle, period = self.rng.uniform(0, 360), self.rng.uniform(0.06, 0.2)
        if pattern == "white":
            return Background("plain", ("white",), angle, period)
        colours = tuple(self.rng.sample(list(COLOURS), 1 if pattern == "plain" else 2))
        return Background(pattern, colours, angle, period)
