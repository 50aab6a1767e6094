"""The stages of training and what the finished model is measured by, on toy sizes."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_drawings import icons_called

from agentsd.sites import find_sites
from emoji_training import clip, loop, unet, vae
from emoji_training.archives import Icon
from emoji_training.evaluate import hit_rates, with_others_drawn
from emoji_training.pictures import to_float
from emoji_training.recipe import FULL, SMALL, TINY
from emoji_training.scenes import SceneSource
from emoji_training.sprites import load_sprites
from emoji_training.text import build_tokenizer, tokenize


def test_padding_does_not_change_a_text_s_features(icons: list[Icon]) -> None:
    tokenizer = build_tokenizer(icons, TINY)
    model = clip.build_clip(TINY, tokenizer).eval()
    texts = ["a red heart", "a star on a teal background, 3d style", ""]
    with torch.no_grad():
        states = model.text_model(tokenize(tokenizer, texts)).pooler_output
        assert torch.allclose(clip.embed_texts(model, tokenizer, texts), model.text_projection(states), atol=1e-5)


def test_timesteps_cover_the_range_and_later_dwell_on_its_noisy_end(monkeypatch: pytest.MonkeyPatch) -> None:
    early = unet.draw_times(16, 1000, SMALL, fraction=0.0)
    assert all(index * 62.5 - 1 <= time < (index + 1) * 62.5 for index, time in enumerate(sorted(early.tolist())))
    late = unet.draw_times(16, 1000, SMALL, fraction=0.9)
    assert late.min() >= 0
    assert late.max() < 1000
    assert sum(time >= 650 for time in late[4:].tolist()) == 12
    assert late[:4].min() < 250 <= late[:4].max()
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 1 - 2**-24))
    assert unet.draw_times(256, 1000, FULL, fraction=0.0).max() == 999, "rounding does not leave the range"


def test_the_full_model_has_the_sizes_that_were_asked_for(icons: list[Icon]) -> None:
    """About 15 to 20 million parameters in the UNet, attention at 64, 32 and 16, and 40 MB in half precision."""
    tokenizer = build_tokenizer(icons, FULL)
    with torch.device("meta"):
        parts = [unet.build_unet(FULL), vae.build_vae(FULL), clip.build_clip(FULL, tokenizer)]
    numbers = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert 14.5e6 < numbers[0] < 20e6
    sites = find_sites(parts[0])
    assert {FULL.latent_size // 2**site.level for site in sites if "mid_block" not in site.name} == {64, 32, 16}
    # The text encoder comes twice, in the pipeline and beside the image encoder, and so does the whole vocabulary.
    text = FULL.vocabulary * FULL.text_width + sum(p.numel() for p in parts[2].text_model.parameters())
    reference = 4 * (FULL.clip_width**2 + FULL.clip_width) + 2 * FULL.reference_rows * FULL.clip_width
    assert 2 * (sum(numbers) + text) + reference < 40e6


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


def test_the_loss_log_holds_means(capsys: pytest.CaptureFixture[str]) -> None:
    kept = loop.new_state()
    progress = loop.Progress("stage", kept, minutes=1, log_steps=3)
    for number, _ in zip(range(1, 8), progress, strict=False):
        progress.end_step({"loss": torch.tensor(float(number))})
    assert [(row["step"], row["loss"]) for row in kept["log"]] == [(1, 1.0), (3, 2.5), (6, 5.0)]


def test_a_mistaken_scene_has_the_same_places_and_other_drawings() -> None:
    icons = icons_called("red-heart", "blue-book", "star", "mango")
    source = SceneSource(icons, replace(TINY, styles=("noto",)), "a")
    for scene in source.draw(20):
        mistaken = with_others_drawn(scene, source)
        assert mistaken.background == scene.background
        for thing, other in zip(scene.things, mistaken.things, strict=True):
            assert (other.x, other.y, other.size, other.turn) == (thing.x, thing.y, thing.size, thing.turn)
            assert icons[other.row].name == other.name not in {thing.name for thing in scene.things}


def test_a_picture_finds_its_own_text() -> None:
    own = torch.eye(8, dtype=torch.float64).numpy()
    assert hit_rates(own, 3 * own) == {"top1": 1.0, "top5": 1.0}
    assert hit_rates(own, np.roll(own, 1, axis=0)) == {"top1": 0.0, "top5": 0.0}
    assert hit_rates(np.ones((8, 2)), np.ones((8, 2)))["top5"] == 0.0, "an encoder that sees nothing"
    pictures = own.copy()
    pictures[0] = [0.5, 1, 1, 1, 1, 0, 0, 0]  # four others are nearer
    pictures[1] = [1, 0.5, 1, 1, 1, 1, 0, 0]  # five others are
    assert hit_rates(pictures, own) == {"top1": 0.75, "top5": 0.875}


def test_a_step_s_scenes_do_not_depend_on_who_draws_them() -> None:
    """Else a resumed training would see its first scenes again, or each worker the same ones."""
    icons = icons_called("red-heart", "blue-book", "star", "mango", "bell", "sun")
    here = clip.CaptionedScenes(icons, TINY, build_tokenizer(icons, TINY))
    workers = torch.utils.data.DataLoader(here, batch_size=None, sampler=itertools.count(3), num_workers=2)
    for step, (scenes, tokens) in zip(range(3, 7), workers, strict=False):
        assert scenes == here[step][0] != here[step + 1][0]
        assert torch.equal(tokens, here[step][1])


def test_the_contrastive_loss_pairs_each_picture_with_its_own_text() -> None:
    images, texts = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).double().unbind()
    scale = torch.tensor(7.0, dtype=torch.float64)
    losses = []
    for first, second in ((images, texts), (texts, images)):
        for row in range(6):
            cosines = [float(first[row] @ other / first[row].norm() / other.norm()) for other in second]
            losses.append(math.log(sum(math.exp(7 * value) for value in cosines)) - 7 * cosines[row])
    assert float(clip.contrastive_loss(images, texts, scale)) == pytest.approx(sum(losses) / 12)
    assert clip.contrastive_loss(images, 3 * images, 10 * scale) < 0.01 < clip.contrastive_loss(images, texts, scale)


def test_a_batch_gone_wrong_changes_nothing() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    loop.descend(model(torch.ones(1, 2)).sum(), optimizer)
    before = model.weight.clone()
    loop.descend(model(torch.full((1, 2), torch.inf)).sum(), optimizer)
    assert torch.equal(model.weight, before)
    loop.descend(model(torch.ones(1, 2)).sum(), optimizer)
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)


def test_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    from emoji_training.loop import Checkpoint

    model = torch.nn.Linear(2, 2)
    keep = Checkpoint(tmp_path / "stage", {"m": model}, torch.optim.AdamW(model.parameters()), 0.0)
    keep.save({"step": 1})
    (tmp_path / "stage").rename(tmp_path / "stage.old")  # as if the machine stopped between the two renames
    (tmp_path / "stage.new").mkdir()
    assert keep.load() == {"step": 1}


def test_standardised_latents_decode_alike() -> None:
    torch.manual_seed(0)
    model = vae.build_vae(TINY).eval()
    for parameter in model.quant_conv.parameters():
        torch.nn.init.normal_(parameter)
    pictures = to_float(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        before = model.decode(model.encode(pictures).latent_dist.mean).sample
        vae.standardise_latents(model, pictures)
        latents = model.encode(pictures).latent_dist.mean
        after = model.decode(latents).sample
    assert (before - after).abs().max() <= 1e-2
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.05 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
