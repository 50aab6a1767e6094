"""What the finished model is measured by."""

from dataclasses import replace

import numpy as np
import torch
from toy_drawings import icons_called

from emoji_training.evaluate import hit_rates, with_others_drawn
from emoji_training.recipe import TINY
from emoji_training.scenes import SceneSource


def test_a_mistaken_scene_has_the_same_places_and_other_drawings() -> None:
    icons = icons_called("red-heart", "blue-book", "star", "mango")
    source = SceneSource(icons, replace(TINY, styles=("noto",)), "a")
    for scene in source.draw(20):
        mistaken = with_others_drawn(scene, source)
        assert mistaken.background == scene.background
        for thing, other in zip(scene.things, mistaken.things, strict=True):
            assert (other.x, other.y, other.size, other.turn) == (thing.x, thing.y, thing.size, thing.turn)
            assert icons[other.row].name == other.name not in {thing.name for thing in scene.things}


def test_a_image_finds_its_own_text() -> None:
    own = torch.eye(8, dtype=torch.float64).numpy()
    assert hit_rates(own, 3 * own) == {"top1": 1.0, "top5": 1.0}
    assert hit_rates(own, np.roll(own, 1, axis=0)) == {"top1": 0.0, "top5": 0.0}
    assert hit_rates(np.ones((8, 2)), np.ones((8, 2)))["top5"] == 0.0, "an encoder that sees nothing"
    images = own.copy()
    images[0] = [0.5, 1, 1, 1, 1, 0, 0, 0]  # four others are nearer
    images[1] = [1, 0.5, 1, 1, 1, 1, 0, 0]  # five others are
    assert hit_rates(images, own) == {"top1": 0.75, "top5": 0.875}
