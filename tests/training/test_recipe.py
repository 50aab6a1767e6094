"""Sizes and minutes of the recipes."""

import pytest
import torch
import toy_drawings  # noqa: F401  (skips these tests where a package is missing)
from train_emoji import parse, stage_minutes

from agentsd.models.unet import find_layers
from emoji_training import clip, unet, vae
from emoji_training.archives import Icon
from emoji_training.recipe import FULL, NATIVE512, NATIVE512_GPU, SMALL
from emoji_training.text import build_tokenizer


def test_minutes_are_those_of_the_stage_or_shared_out() -> None:
    assert stage_minutes(parse([]), SMALL) == (15, 10, 80)
    assert stage_minutes(parse(["--minutes", "21"]), SMALL) == pytest.approx((3, 2, 16))
    assert stage_minutes(parse(["--stage", "vae", "--minutes", "3"]), FULL)[0] == 3
    assert stage_minutes(parse(["--stage", "unet", "--minutes", "3"]), FULL)[2] == 3
    assert stage_minutes(parse(["--minutes", "3"]), NATIVE512_GPU) == (0, 0, 3), (
        "a tuned model's earlier stages are done"
    )


def test_the_full_model_has_the_sizes_that_were_asked_for(icons: list[Icon]) -> None:
    """About 15 to 20 million parameters in the UNet, attention at 64, 32 and 16, and 40 MB in half precision."""
    tokenizer = build_tokenizer(icons, FULL)
    with torch.device("meta"):
        parts = [unet.build_unet(FULL), vae.build_vae(FULL), clip.build_clip(FULL, tokenizer)]
    numbers = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert 14.5e6 < numbers[0] < 20e6
    layers = find_layers(parts[0])
    assert {FULL.latent_size // 2**layer.level for layer in layers if "mid_block" not in layer.name} == {64, 32, 16}
    # The text encoder comes twice, in the pipeline and beside the image encoder, and so does the whole vocabulary.
    text = FULL.vocabulary * FULL.text_width + sum(p.numel() for p in parts[2].text_model.parameters())
    reference = 4 * (FULL.clip_width**2 + FULL.clip_width) + 2 * FULL.reference_rows * FULL.clip_width
    assert 2 * (sum(numbers) + text) + reference < 40e6


def test_the_tuned_model_is_the_small_one_at_two_sizes() -> None:
    """The same weights fit both, and what it is judged by."""
    with torch.device("meta"):
        shapes = [
            {name: weight.shape for name, weight in unet.build_unet(recipe).state_dict().items()}
            for recipe in (SMALL, NATIVE512)
        ]
    assert shapes[0] == shapes[1]
    sizes = [(recipe.image_size, recipe.sprite_size, recipe.judged_scenes) for recipe in NATIVE512.judged_sizes()]
    assert sizes == [(512, 512, 128), (256, 256, 128)]
    assert [recipe.image_size for recipe in SMALL.judged_sizes()] == [256]
