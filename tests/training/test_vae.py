"""The VAE stage: its batches and its losses."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from emoji_training import vae
from emoji_training.archives import Icon
from emoji_training.images import to_float
from emoji_training.recipe import TINY
from emoji_training.scenes import SceneSource
from emoji_training.sprites import load_sprites


@pytest.mark.parametrize("fraction, side", [(0.0, 32), (0.2, 32), (0.75, 64), (1.0, 64)])
def test_crops_come_first_and_whole_images_last(fraction: float, side: int, icons: list[Icon], tmp_path: Path) -> None:
    sprites = load_sprites(icons, TINY.sprite_size, tmp_path / "sprites.safetensors")
    source = SceneSource(icons, TINY, "a")
    assert {vae.draw_batch(source, sprites, TINY, fraction).shape[-1] for _ in range(20)} == {side}


def test_of_two_windows_the_one_with_more_in_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:, 4:] = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    for corners in ([[0, 0], [4, 4]], [[4, 4], [0, 0]]):
        drawn = iter([torch.tensor([corner]) for corner in corners])
        monkeypatch.setattr(torch, "randint", lambda *_, drawn=drawn: next(drawn))
        assert torch.equal(vae.windows(image, 4), image[..., 4:, 4:])


def test_the_loss_of_a_shift_in_one_colour() -> None:
    """0.3 in one of three channels: 0.1 of the values, no edges, and two of three differences of colours."""
    target = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shifted = target.clone()
    shifted[:, 0] += 0.3
    parts = vae.vae_loss(shifted, target, torch.tensor(2.0), TINY)
    found = [float(parts[name]) for name in ("l1", "edges", "colour", "kl")]
    assert found == pytest.approx([0.1, 0, 0.7, 2], abs=1e-5)
    whole = 0.1 + TINY.vae_colour_weight * 0.7 + TINY.vae_kl_weight * 2
    assert float(parts["loss"]) == pytest.approx(whole, abs=1e-5)


def test_the_loss_of_a_ramp() -> None:
    """All pixels of a ramp by 0.1 to the right and 0.2 down differ by so much from their neighbours."""
    target = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    line = torch.arange(16.0)
    parts = vae.vae_loss(target + 0.1 * line + 0.2 * line[:, None], target, torch.tensor(0.0), TINY)
    assert float(parts["edges"]) == pytest.approx(0.3, abs=1e-5)
    assert float(parts["loss"]) == pytest.approx(
        float(parts["l1"]) + TINY.vae_gradient_weight * 0.3 + TINY.vae_colour_weight * float(parts["colour"]), abs=1e-5
    )


def test_the_kl_is_that_of_diffusers() -> None:
    model = vae.build_vae(TINY)
    with torch.no_grad():
        posterior = model.encode(to_float(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))).latent_dist
    assert float(vae.kl_loss(posterior)) == pytest.approx(float((posterior.kl() / posterior.mean[0].numel()).mean()))


def test_latents_that_hold_the_colours_cost_no_scaffold() -> None:
    target = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    colours = F.avg_pool2d(target, 8)
    assert vae.scaffold_loss(torch.cat([colours, torch.ones(2, 1, 2, 2)], dim=1), target) == 0
    assert float(vae.scaffold_loss(colours + 0.25, target)) == pytest.approx(0.25)


def test_pipelines_take_the_latents_as_they_are() -> None:
    assert vae.build_vae(TINY).config.scaling_factor == 1


def test_standardised_latents_decode_alike() -> None:
    torch.manual_seed(0)
    model = vae.build_vae(TINY).eval()
    for parameter in model.quant_conv.parameters():
        torch.nn.init.normal_(parameter)
    images = to_float(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        before = model.decode(posterior.mean).sample
        vae.standardise_latents(model, images)
        standard = model.encode(images).latent_dist
        latents = standard.mean
        after = model.decode(latents).sample
    assert (before - after).abs().max() <= 1e-2
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.05 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    scales = posterior.mean.std(dim=(0, 2, 3))
    assert torch.allclose(posterior.std, standard.std * scales[:, None, None], rtol=0.02), "as noisy as before"
