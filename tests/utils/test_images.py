"""Images that are made of images, and what is wrong with one."""

import math
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from agentsd.utils.images import difference_map, image_warnings, side_by_side


@pytest.mark.parametrize(("difference", "scale"), [(0, 1), (1, 64), (3, 64), (10, 16), (100, 2), (200, 1)])
def test_difference_map_is_bright_but_not_clipped(difference, scale):
    """A difference of one level must be seen, and a large one keep its shape."""
    first = PIL.Image.new("RGB", (16, 16), (20, 20, 20))
    second = PIL.Image.new("RGB", (16, 16), (20, 20 + difference, 20))
    image, found = difference_map(first, second)
    assert found == scale
    assert image.getpixel((3, 3)) == (difference * scale,) * 3
    assert difference_map(second, first)[0].tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (1024, 640)])
def test_side_by_side_shows_every_image_and_label(size):
    """Whole images, none hidden by a label, and the label drawn above it."""
    colours = ["red", "green", "blue"]
    sheet = side_by_side([PIL.Image.new("RGB", size, colour) for colour in colours], ["one", "two", "three"])
    factor = math.ceil(320 / size[0])
    counts = {tuple(colour): count for count, colour in sheet.getcolors(maxcolors=2**24)}
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert counts[colour] == size[0] * size[1] * factor**2
    assert counts[(0, 0, 0)] > 20
    assert sheet.height > size[1] * factor


def test_the_brightest_differences_stay_bright():
    first = np.zeros((16, 16, 3), np.uint8)
    second = first + 10
    second[0, 0] = 200
    found, _ = difference_map(PIL.Image.fromarray(first), PIL.Image.fromarray(second))
    assert found.getpixel((0, 0)) == (255, 255, 255)


def test_a_single_colour_is_noticed_whatever_it_is():
    brown = SimpleNamespace(images=np.full((1, 8, 8, 3), (0.5, 0.3, 0.1)))
    assert "single colour" in image_warnings(brown, "x", torch.float32)[0]
