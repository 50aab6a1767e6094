"""Drawings for training: which are taken, and how they are rendered."""

from pathlib import Path

import pytest
import torch
from toy_drawings import TAUGHT

from emoji_training.archives import Icon, gather_icons, is_taught
from emoji_training.names import HELD_OUT, NAMES
from emoji_training.recipe import FULL
from emoji_training.sprites import Sprites, load_sprites, render


def test_what_cannot_be_learnt_is_left_out(archive_dir: Path, tmp_path: Path) -> None:
    taught, unseen = gather_icons(FULL.styles, None, HELD_OUT, archive_dir, tmp_path)
    assert [(icon.style, icon.name) for icon in taught] == [(s, name) for s in FULL.styles for name in TAUGHT]
    assert [(icon.style, icon.name) for icon in unseen] == [(style, "mango") for style in FULL.styles]
    left_out = (
        "keycap-5 eleven-thirty eleven-oclock letter-a cool-button man-elf mermaid-tone1 digit-one 5 ok-hand-dark"
    )
    left_out += " woman-walking-facing-right triangular-flag waving-hand-medium-skin-tone input-latin-letters"
    assert not [name for name in left_out.split() if is_taught(name)]
    assert all(is_taught(name) for name in (*NAMES, *HELD_OUT, "mango", "phoenix", "couch-and-lamp"))


def test_sprites_are_rendered_once(icons: list[Icon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_sprites(icons, 24, tmp_path / "sprites.safetensors")
    monkeypatch.setattr("emoji_training.sprites.render", None)
    again = load_sprites(icons, 24, tmp_path / "sprites.safetensors")
    assert torch.equal(first.images, again.images) and first.images.shape == (9, 4, 24, 24)
    with pytest.raises(TypeError):  # others are not taken for these
        load_sprites(icons[1:], 24, tmp_path / "sprites.safetensors")


def test_sprites_are_cut_out_and_smaller_ones_average_them(icons: list[Icon]) -> None:
    heart = torch.from_numpy(render(icons[1], 32))
    assert heart[:, 16, 16].tolist() == [0xF4, 0x43, 0x36, 255] and heart[:, 0, 0].tolist() == [0, 0, 0, 0]
    edge = (heart[3] > 0) & (heart[3] < 255)
    assert edge.any() and (heart[0][edge].int() <= heart[3][edge].int()).all(), "colours are multiplied by alpha"
    small = Sprites(icons, torch.stack([heart])).smaller(2).images[0]
    assert (
        small.float() - heart.float().unflatten(2, (2, 16)).unflatten(1, (2, 16)).mean(dim=(2, 4))
    ).abs().max() <= 1
