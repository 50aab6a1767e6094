"""The UNet stage: what it is asked for, the pool that it learns from, and how images are drawn."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from emoji_training import unet, vae
from emoji_training.archives import Icon
from emoji_training.recipe import FULL, NATIVE512, SMALL, TINY
from emoji_training.sprites import load_sprites
from emoji_training.text import build_tokenizer, tokenize


def test_the_loss_asks_for_the_velocity_of_the_noise_that_was_added() -> None:
    """Whoever computes it from the noisy latents, the clean ones and the timestep has no loss."""
    trainer = object.__new__(unet.Trainer)
    trainer.recipe, trainer.device, trainer.scheduler = TINY, torch.device("cpu"), unet.build_scheduler()
    clean = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def oracle(noisy: torch.Tensor, times: torch.Tensor, states: None) -> SimpleNamespace:
        signal = trainer.scheduler.alphas_cumprod[times][:, None, None, None]
        noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
        return SimpleNamespace(sample=signal.sqrt() * noise - (1 - signal).sqrt() * clean)

    trainer.predict, trainer.text = oracle, lambda tokens: SimpleNamespace(last_hidden_state=None)
    assert trainer.loss(clean, None, 0.0) < 1e-4
    trainer.predict = lambda noisy, times, states: SimpleNamespace(sample=torch.zeros_like(noisy))
    assert trainer.loss(clean, None, 0.0) > 0.5


def test_sampling_undoes_the_noise_of_training() -> None:
    """From noise alone, which training must have shown, too."""
    scheduler = unet.build_scheduler()
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[-1] < 1e-8
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(scheduler.get_velocity(clean, noise, timestep[None]), timestep, x).prev_sample
    torch.testing.assert_close(x, clean, rtol=1e-3, atol=1e-3)


def test_a_latent_comes_with_its_own_caption(
    icons: list[Icon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after some were renewed."""
    sprites = load_sprites(icons, TINY.sprite_size, tmp_path / "sprites.safetensors")
    tokenizer = build_tokenizer(icons, TINY)
    drawn, said = itertools.count(), itertools.count()
    monkeypatch.setattr(unet, "compose", lambda scenes, *_: torch.tensor([float(next(drawn)) for _ in scenes]))
    monkeypatch.setattr(unet, "encode", lambda _, images: images[:, None, None, None].expand(-1, 4, 8, 8))
    monkeypatch.setattr(unet.Captions, "draw", lambda *_: str(next(said)))
    pool = unet.LatentPool(sprites, replace(TINY, caption_dropout=0.0), None, tokenizer, "a")
    for _ in range(5):
        pool.renew()
    for _ in range(4):
        for latent, tokens in zip(*pool.batch(), strict=True):
            assert torch.equal(tokens, tokenize(tokenizer, [str(int(latent[0, 0, 0]))])[0])


def test_images_are_drawn_by_the_recipe_and_each_from_its_own_seed() -> None:
    calls = []

    def pipe(prompts: list[str], **options) -> SimpleNamespace:
        calls.append((prompts, options))
        return SimpleNamespace(images=torch.full((len(prompts), 3, 4, 4), 0.5))

    pipe.device = torch.device("cpu")
    recipe = replace(TINY, judged_batch=2, guidance=3.5)
    assert unet.generate(pipe, ["a", "b", "c"], 5, recipe, seed=7).shape == (3, 3, 4, 4)
    assert [prompts for prompts, _ in calls] == [["a", "b"], ["c"]]
    assert {(options["height"], options["width"]) for _, options in calls} == {(64, 64)}
    assert {(options["guidance_scale"], options["num_inference_steps"]) for _, options in calls} == {(3.5, 5)}
    assert [g.initial_seed() for _, options in calls for g in options["generator"]] == [7, 8, 9]


def test_timesteps_cover_the_range_and_later_dwell_on_its_noisy_end(monkeypatch: pytest.MonkeyPatch) -> None:
    early = unet.draw_times(16, 1000, SMALL, fraction=0.0)
    assert all(index * 62.5 - 1 <= time < (index + 1) * 62.5 for index, time in enumerate(sorted(early.tolist())))
    late = unet.draw_times(16, 1000, SMALL, fraction=0.9)
    assert late.min() >= 0
    assert late.max() < 1000
    assert sum(time >= 650 for time in late[4:].tolist()) == 12
    assert late[:4].min() < 250 <= late[:4].max()
    whole, half = (unet.draw_times(8, 1000, NATIVE512, 0.0, half) for half in (False, True))
    assert [sum(time >= low for time in times[3:].tolist()) for times, low in ((whole, 780), (half, 650))] == [5, 5]
    assert half[3:].min() < 780
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 1 - 2**-24))
    assert unet.draw_times(256, 1000, FULL, fraction=0.0).max() == 999, "rounding does not leave the range"


def test_averaged_weights_follow_the_current_ones() -> None:
    """Fast while young, by the decay later; what is averaged is not touched."""
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(ema.weight)
    unet.update_ema(ema, model, decay=0.999, step=0)
    assert ema.weight.item() == pytest.approx(1 - 0.1)
    torch.nn.init.zeros_(ema.weight)
    unet.update_ema(ema, model, decay=0.999, step=10**6)
    assert ema.weight.item() == pytest.approx(1 - 0.999)
    assert model.weight.item() == 1


def test_captions_are_dropped_for_guidance(icons: list[Icon], tmp_path: Path) -> None:
    sprites = load_sprites(icons, TINY.sprite_size, tmp_path / "sprites.safetensors")
    tokenizer = build_tokenizer(icons, TINY)
    recipe = replace(TINY, unet_batch=2000, caption_dropout=0.25)
    pool = unet.LatentPool(sprites, recipe, vae.build_vae(TINY).eval(), tokenizer, seed="a")
    dropped = (pool.batch()[1] == tokenize(tokenizer, [""])).all(dim=1).float().mean()
    assert 0.2 < float(dropped) < 0.3  # five standard deviations


def test_the_pool_is_renewed_oldest_first(icons: list[Icon], tmp_path: Path) -> None:
    sprites = load_sprites(icons, TINY.sprite_size, tmp_path / "sprites.safetensors")
    recipe = replace(TINY, unet_fresh=3)
    parts = sprites, recipe, vae.build_vae(TINY).eval(), build_tokenizer(icons, TINY)
    pool = unet.LatentPool(*parts, seed="a")
    before = pool.latents.clone()
    pool.renew()
    changed = (pool.latents != before).flatten(1).any(dim=1)
    assert changed.tolist() == [True] * 3 + [False] * 5
    pool.renew()
    pool.renew()  # over the end
    changed = (pool.latents != before).flatten(1).any(dim=1)
    assert changed.all() and pool.next == 1
    latents, tokens = pool.batch()
    assert latents.shape == (4, 4, 8, 8) and tokens.shape == (4, 77)

    coarse = unet.LatentPool(*parts, seed="a", scale=2)
    coarse.renew()
    latents, tokens = coarse.batch()
    assert latents.shape == (16, 4, 4, 4) and tokens.shape == (16, 77)
    assert coarse.next == 12 % 8, "four times as many new ones, too"


def test_both_sizes_are_learnt_from_in_one_step(icons: list[Icon], tmp_path: Path) -> None:
    """Each in batches of its own size, renewed now and then, and kept for the next start."""
    sprites = load_sprites(icons, TINY.sprite_size, tmp_path / "sprites.safetensors")
    recipe = replace(TINY, half_batch=6, unet_fresh=0.4)
    parts = sprites, recipe, vae.build_vae(TINY).eval(), build_tokenizer(icons, TINY)
    half, whole = (unet.LatentPool(*parts, "a", scale, tmp_path / f"{scale}.safetensors") for scale in (2, 1))
    assert half.batch()[0].shape == (6, 4, 4, 4) and whole.batch()[0].shape == (4, 4, 8, 8)
    began = whole.latents.clone()
    renewed = []
    for _ in range(5):
        whole.renew()
        renewed.append(whole.next)
    assert renewed == [0, 0, 1, 1, 2], "two in five steps"
    again = unet.LatentPool(*parts, "b", 1, tmp_path / "1.safetensors")
    assert torch.equal(again.latents, began) and torch.equal(again.tokens[2:], whole.tokens[2:])
