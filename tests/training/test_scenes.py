"""Scenes for training: what is drawn at random, and that it is composed as described."""

import itertools
import math

import pytest
import torch
from toy_drawings import PLAIN, TAUGHT

from emoji_training.archives import Icon
from emoji_training.compose import compose
from emoji_training.images import to_bytes
from emoji_training.recipe import FULL, SMALL, TINY
from emoji_training.scenes import COLOURS as PALETTE
from emoji_training.scenes import Background, Scene, SceneSource, Thing
from emoji_training.sprites import Sprites


@pytest.mark.parametrize("recipe", [FULL, SMALL, TINY], ids=["full", "small", "tiny"])
def test_scenes_are_as_the_recipe_says(recipe, icons: list[Icon]) -> None:
    scenes = SceneSource([icon for icon in icons if icon.style in recipe.styles], recipe, "a").draw(300)
    assert {len(scene.things) for scene in scenes} == set(range(1, len(recipe.scene_counts) + 1))
    assert {scene.style for scene in scenes} == set(recipe.styles)
    for scene in scenes:
        assert all(icons[thing.row].name == thing.name for thing in scene.things)
        assert all(icons[thing.row].style == scene.style for thing in scene.things)
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            assert all(thing.size / 2 <= place <= 1 - thing.size / 2 for place in (thing.x, thing.y))
        for one, other in itertools.combinations(scene.things, 2):
            apart = math.dist((one.x, one.y), (other.x, other.y))
            assert apart >= 0.45 * (one.size + other.size)
    assert {scene.background.pattern for scene in scenes} <= {"plain", *recipe.backgrounds}
    # so that no two in a batch have to be told apart by nothing
    assert all({scenes[n + k].things[0].name for k in range(3)} == set(TAUGHT) for n in range(0, 300, 3))


def test_scenes_are_the_same_for_a_seed(icons: list[Icon]) -> None:
    first, second, other = (SceneSource(icons, FULL, seed).draw(5) for seed in ("a", "a", "b"))
    assert first == second != other


SQUARE = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)[:, None, None].expand(4, 16, 16)


def sprites_of(*images: torch.Tensor) -> Sprites:
    """Sprites without a drawing behind them."""
    return Sprites([Icon("noto", str(number), "", 1, 1) for number in range(len(images))], torch.stack(images))


def test_a_drawing_lies_where_the_scene_says() -> None:
    scene = Scene("noto", (Thing(0, "0", 0.25, 0.5, 0.25, 0.0),), PLAIN)
    image = to_bytes(compose([scene], sprites_of(SQUARE), 64))[0]
    red, teal = torch.tensor([255, 0, 0]), torch.tensor(PALETTE["teal"])
    assert (red == image[:, 25:39, 9:23].flatten(1).T).all()
    image[:, 23:41, 7:25] = teal.to(torch.uint8)[:, None, None]
    assert (teal == image.flatten(1).T).all()


def test_a_turn_is_clockwise_and_transparent_parts_show_what_is_behind() -> None:
    upper = SQUARE.clone()
    upper[:, 8:] = 0
    scene = Scene("noto", (Thing(0, "0", 0.5, 0.5, 0.5, 90.0),), PLAIN)
    image = to_bytes(compose([scene], sprites_of(upper), 32))[0]
    assert image[:, 16, 20].tolist() == [255, 0, 0]  # what was above is on the right
    assert image[:, 16, 12].tolist() == list(PALETTE["teal"])


def test_later_drawings_cover_earlier_ones_and_scenes_do_not_touch_each_other() -> None:
    blue = SQUARE[[1, 2, 0, 3]]
    both = (Thing(0, "0", 0.5, 0.5, 0.5, 0.0), Thing(1, "1", 0.6, 0.5, 0.5, 0.0))
    scenes = [Scene("noto", both[:1], PLAIN), Scene("noto", both, PLAIN), Scene("noto", both[1:], PLAIN)]
    together = compose(scenes, sprites_of(SQUARE, blue), 32)
    assert to_bytes(together)[:, :, 16, 16].tolist() == [[255, 0, 0], [0, 0, 255], [0, 0, 255]]
    apart = torch.cat([compose([scene], sprites_of(SQUARE, blue), 32) for scene in scenes])
    assert torch.allclose(together, apart, atol=1e-6)


@pytest.mark.parametrize("pattern", ["gradient", "stripes", "dots", "checks"])
def test_patterns_are_of_their_two_colours(pattern: str) -> None:
    scene = Scene("noto", (Thing(0, "0", 0.5, 0.5, 1e-3, 0.0),), Background(pattern, ("black", "white"), 0.0, 0.125))
    grey = compose([scene], sprites_of(SQUARE), 64)[0].mean(dim=0)
    low, high = PALETTE["black"][0] / 127.5 - 1, 1.0
    assert grey.min() < low + 0.05 and grey.max() > high - 0.05
    if pattern == "gradient":
        assert (grey.diff(dim=1)[:, :30] > 0).all() and grey.diff(dim=0).abs().max() < 0.05
    else:  # it repeats after an eighth of the side
        assert torch.allclose(grey[:, :20], grey[:, 8:28], atol=1e-4)
