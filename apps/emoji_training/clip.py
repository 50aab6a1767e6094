"""Stage two: a text and an image encoder in one space, for CLIP scores, set distances, and the UNet's texts."""

import itertools
import os
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from .archives import Icon
from .captions import Captions
from .compose import compose
from .loop import (
    Checkpoint,
    Progress,
    autocast,
    descend,
    learning_rate,
    load_weights,
    new_state,
    pick_device,
    set_rate,
)
from .recipe import Recipe
from .scenes import Scene, SceneSource
from .sprites import Sprites
from .text import build_text_config, build_tokenizer, tokenize
from .vae import load_vae, reconstruct


# Pixels enter the encoder between -1 and 1, as they do the VAE.
PIXEL_MEAN = PIXEL_DEVIATION = [0.5, 0.5, 0.5]
LARGEST_LOGIT_SCALE = 100.0  # CLIP's own bound
THROUGH_VAE = 128  # one image in so many: it costs far more than the encoder itself


def build_clip(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP model with fresh weights that knows the tokens of `tokenizer`."""
    return CLIPModel(
        CLIPConfig(
            text_config=build_text_config(recipe, tokenizer).to_dict(),
            vision_config={
                "image_size": recipe.clip_size,
                "patch_size": recipe.clip_size // recipe.clip_patches,
                "hidden_size": recipe.clip_width,
                "intermediate_size": 4 * recipe.clip_width,
                "num_hidden_layers": recipe.clip_layers,
                "num_attention_heads": recipe.clip_heads,
            },
            projection_dim=recipe.clip_width,
        )
    )


def build_processor(recipe: Recipe) -> CLIPImageProcessor:
    """What turns images of any size into the encoder's input."""
    size = recipe.clip_size
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=PIXEL_MEAN,
        image_std=PIXEL_DEVIATION,
    )


def shrink(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images in the encoder's size, as its processor makes them smaller."""
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp_(-1, 1)


class CaptionedScenes(Dataset):
    """
    Scenes with the token ids of a caption each, a batch for every step: (list of `Scene`, ids of shape (batch, L)).

    A step's batch depends on nothing but its number: neither worker processes nor a resume change what is seen.
    """

    def __init__(self, icons: list[Icon], recipe: Recipe, tokenizer: CLIPTokenizer):
        self.icons, self.recipe, self.tokenizer, self.captions = icons, recipe, tokenizer, Captions(icons)

    def __getitem__(self, step: int) -> tuple[list[Scene], torch.Tensor]:
        seed = f"clip {self.recipe.seed} {step}"
        # Drawn together, so that no two begin with one drawing: two alike would have to be told apart by nothing.
        scenes = SceneSource(self.icons, self.recipe, seed).draw(self.recipe.clip_batch)
        rng = random.Random(f"words {seed}")
        texts = [self.captions.draw(scene, rng) for scene in scenes]
        return scenes, tokenize(self.tokenizer, texts, padding="longest")


def draw_images(
    scenes: list[Scene], small: Sprites, large: Sprites, vae: AutoencoderKL, recipe: Recipe
) -> torch.Tensor:
    """The scenes in the encoder's size, some of them after the VAE.

    What the encoder is to judge has come out of that VAE, and must not look strange to it.
    """
    count = max(1, len(scenes) // THROUGH_VAE)
    decoded = reconstruct(vae, compose(scenes[:count], large, recipe.image_size))
    rest = [compose(scenes[count:], small, recipe.clip_size)] if len(scenes) > count else []
    return torch.cat([shrink(decoded, recipe.clip_size), *rest])


def vary(images: torch.Tensor) -> torch.Tensor:
    """A little blur and noise, each on half of the images, so that no single pixel decides."""
    coins = torch.rand(2, len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(coins[0], F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False), images)
    return torch.where(coins[1], images + 0.1 * torch.randn_like(images), images)


def embed_images(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Features of images in the encoder's size, (images, width)."""
    return model.visual_projection(model.vision_model(pixel_values=images).pooler_output)


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Features of texts, (texts, width); padding comes after the token that they are read from, and cannot matter."""
    return embed_tokens(model, tokenize(tokenizer, texts, padding="longest").to(model.device))


def embed_tokens(model: CLIPModel, tokens: torch.Tensor) -> torch.Tensor:
    """Features of texts as token ids, (texts, width)."""
    return model.text_projection(model.text_model(tokens).pooler_output)


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: each image is to find its own text among all in the batch, and each text its image.

    Source: A. Radford et al.: Learning Transferable Visual Models From Natural Language Supervision (ICML 2021).
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_clip(sprites: Sprites, recipe: Recipe, folder: Path, minutes: float, resume: bool) -> None:
    """Train both encoders for `minutes`; the checkpoint ends in `folder`/clip."""
    torch.manual_seed(recipe.seed)
    device = pick_device()
    tokenizer = build_tokenizer(sprites.icons, recipe)
    model = build_clip(recipe, tokenizer).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.clip_lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    checkpoint = Checkpoint(folder / "clip", {"clip": model}, optimizer, recipe.checkpoint_seconds)
    state = (checkpoint.load() if resume else None) or new_state()
    if state.get("finished"):
        return
    vae = load_vae(recipe, folder)
    large = sprites.to(device)
    small = large.smaller(max(1, recipe.sprite_size * recipe.clip_size // recipe.image_size))
    torch.manual_seed(recipe.seed + state["step"])
    # Words and places are Python's work; for a large GPU one process is too slow at it.
    batches = DataLoader(
        CaptionedScenes(sprites.icons, recipe, tokenizer),
        batch_size=None,
        sampler=itertools.count(state["step"]),
        num_workers=(os.cpu_count() or 1) // 2,
    )
    progress = Progress("clip", state, minutes, recipe.log_steps)
    for fraction, (scenes, tokens) in zip(progress, batches, strict=False):
        images = draw_images(scenes, small, large, vae, recipe)
        set_rate(optimizer, learning_rate(recipe.clip_lr, fraction, state["step"], recipe.warmup_steps))
        with autocast(device):
            image_states = embed_images(model, vary(images))
            text_states = embed_tokens(model, tokens.to(device))
        loss = contrastive_loss(image_states.float(), text_states.float(), model.logit_scale.exp())
        descend(loss, optimizer)
        with torch.no_grad():
            model.logit_scale.clamp_(max=torch.tensor(LARGEST_LOGIT_SCALE).log().item())
        progress.end_step({"loss": loss})
        checkpoint.save_if_due(state)
    checkpoint.save(state | {"finished": True})


def load_clip(tokenizer: CLIPTokenizer, recipe: Recipe, folder: Path) -> tuple[CLIPModel, dict]:
    """The trained model in `folder`/clip, and that stage's state."""
    model = build_clip(recipe, tokenizer)
    state = load_weights(model, folder / "clip", "clip")
    return model.to(pick_device()).eval(), state
