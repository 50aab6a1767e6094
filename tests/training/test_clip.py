"""The stage of text and image encoder."""

import itertools
import math
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from toy_drawings import icons_called

from emoji_training import clip
from emoji_training.archives import Icon
from emoji_training.compose import compose
from emoji_training.images import to_float
from emoji_training.recipe import TINY
from emoji_training.scenes import SceneSource
from emoji_training.sprites import load_sprites
from emoji_training.text import build_tokenizer, tokenize


def test_the_images_of_a_batch_are_in_the_order_of_its_scenes(
    icons: list[Icon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some go through the VAE, and the captions must go along."""
    monkeypatch.setattr(clip, "reconstruct", lambda model, images: images)
    large = load_sprites(icons, TINY.sprite_size, tmp_path / "sprites.safetensors")
    scenes = SceneSource(icons, TINY, "a").draw(4)
    drawn = clip.draw_images(scenes, large.smaller(TINY.sprite_size // 2), large, None, TINY)
    own = clip.shrink(compose(scenes, large, TINY.image_size), TINY.clip_size)
    assert torch.cdist(drawn.flatten(1), own.flatten(1)).argmin(dim=1).tolist() == [0, 1, 2, 3]


def test_the_processor_makes_what_the_encoder_was_trained_on() -> None:
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, 64, mode="bicubic").clamp(0, 1).mul(255).round().byte()
    image = PIL.Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    given = clip.build_processor(TINY)(image, return_tensors="pt").pixel_values
    assert (given - clip.shrink(to_float(pixels), TINY.clip_size)).abs().max() < 0.03  # rounding to 255 levels


def test_padding_does_not_change_a_text_s_features(icons: list[Icon]) -> None:
    tokenizer = build_tokenizer(icons, TINY)
    model = clip.build_clip(TINY, tokenizer).eval()
    texts = ["a red heart", "a star on a teal background, 3d style", ""]
    with torch.no_grad():
        states = model.text_model(tokenize(tokenizer, texts)).pooler_output
        assert torch.allclose(clip.embed_texts(model, tokenizer, texts), model.text_projection(states), atol=1e-5)


def test_a_step_s_scenes_do_not_depend_on_who_draws_them() -> None:
    """Else a resumed training would see its first scenes again, or each worker the same ones."""
    icons = icons_called("red-heart", "blue-book", "star", "mango", "bell", "sun")
    here = clip.CaptionedScenes(icons, TINY, build_tokenizer(icons, TINY))
    workers = torch.utils.data.DataLoader(here, batch_size=None, sampler=itertools.count(3), num_workers=2)
    for step, (scenes, tokens) in zip(range(3, 7), workers, strict=False):
        assert scenes == here[step][0] != here[step + 1][0]
        assert torch.equal(tokens, here[step][1])


def test_the_contrastive_loss_pairs_each_image_with_its_own_text() -> None:
    images, texts = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).double().unbind()
    scale = torch.tensor(7.0, dtype=torch.float64)
    losses = []
    for first, second in ((images, texts), (texts, images)):
        for row in range(6):
            cosines = [float(first[row] @ other / first[row].norm() / other.norm()) for other in second]
            losses.append(math.log(sum(math.exp(7 * value) for value in cosines)) - 7 * cosines[row])
    assert float(clip.contrastive_loss(images, texts, scale)) == pytest.approx(sum(losses) / 12)
    assert clip.contrastive_loss(images, 3 * images, 10 * scale) < 0.01 < clip.contrastive_loss(images, texts, scale)
