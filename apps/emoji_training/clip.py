"""Stage three: an image encoder in one space with the texts, for CLIP scores and distances between sets."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from .data import Icon, captions_of, render_variants, to_float
from .loop import Checkpoint, Clock, autocast, learning_rate, load_weights, pick_device, ticks
from .recipe import Recipe
from .text import build_text_encoder
from .unet import build_tokenizer
from .vae import load_vae, reconstruct


# Pixels enter the encoder between -1 and 1, as they do the VAE.
PIXEL_MEAN = PIXEL_DEVIATION = [0.5, 0.5, 0.5]
LARGEST_LOGIT_SCALE = 100.0  # CLIP's own bound


def build_clip(recipe: Recipe, text_encoder: CLIPTextModel) -> CLIPModel:
    """A CLIP model whose text side is a copy of `text_encoder`; image side and projections have fresh weights."""
    config = CLIPConfig(
        text_config=text_encoder.config.to_dict(),
        vision_config={
            "image_size": recipe.clip_size,
            "patch_size": recipe.clip_size // 8,
            "hidden_size": recipe.clip_width,
            "intermediate_size": 4 * recipe.clip_width,
            "num_hidden_layers": recipe.clip_layers,
            "num_attention_heads": recipe.clip_heads,
        },
        projection_dim=recipe.clip_width,
    )
    model = CLIPModel(config)
    model.text_model.load_state_dict(text_encoder.state_dict())
    return model


def build_processor(recipe: Recipe) -> CLIPImageProcessor:
    """What turns pictures of any size into the encoder's input."""
    size = recipe.clip_size
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=PIXEL_MEAN,
        image_std=PIXEL_DEVIATION,
    )


def training_pictures(icons: list[Icon], recipe: Recipe, folder: Path) -> torch.Tensor:
    """uint8 pictures, (icons, variants, 3, size, size): renders, and some of them after the VAE.

    What the encoder is to judge has come out of that VAE, and must not look strange to it.
    """
    images = render_variants(icons, recipe.image_size, recipe.clip_variants, recipe.seed + 4)
    through = images[:, : max(1, recipe.clip_variants // 8)]
    vae = load_vae(recipe, folder)
    decoded = reconstruct(vae, through.flatten(0, 1)).unflatten(0, through.shape[:2])
    images = torch.cat([images, decoded], dim=1)
    small = F.interpolate(images.flatten(0, 1).float(), size=recipe.clip_size, mode="area")
    return small.round().to(torch.uint8).unflatten(0, images.shape[:2])


def vary(pictures: torch.Tensor) -> torch.Tensor:
    """A little blur and noise, each on half of the pictures, so that no single pixel decides."""
    coins = torch.rand(2, len(pictures), 1, 1, 1, device=pictures.device) < 0.5
    pictures = torch.where(coins[0], F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False), pictures)
    return torch.where(coins[1], pictures + 0.1 * torch.randn_like(pictures), pictures)


@torch.no_grad()
def embed_captions(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """The text side's pooled states, (captions, width); they stay the same, as the text side is not trained."""
    states = []
    for start in range(0, len(captions), 64):
        tokens = tokenizer(
            captions[start : start + 64], padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        states.append(model.text_model(tokens.input_ids.to(model.device)).pooler_output.float())
    return torch.cat(states)


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: each picture is to find its own text among all in the batch, and each text its picture.

    Source: A. Radford et al.: Learning Transferable Visual Models From Natural Language Supervision (ICML 2021).
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_clip(icons: list[Icon], recipe: Recipe, folder: Path, minutes: float, resume: bool) -> None:
    """Train the image encoder for `minutes` against the text encoder found in `folder`, which stays as it is."""
    torch.manual_seed(recipe.seed)
    device = pick_device()
    tokenizer = build_tokenizer(icons, recipe)
    text = build_text_encoder(recipe, tokenizer)
    load_weights(text, folder / "unet", "ema_text")
    model = build_clip(recipe, text).to(device)
    model.text_model.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.clip_lr, betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint = Checkpoint(folder / "clip", {"clip": model}, optimizer, recipe.checkpoint_seconds)
    state = (checkpoint.load() if resume else None) or {"step": 0, "elapsed": 0.0, "log": []}
    if state.get("finished"):
        return
    pictures = training_pictures(icons, recipe, folder)
    captions = [captions_of(icon.name) for icon in icons]
    states = [embed_captions(model, tokenizer, list(dict.fromkeys(some))) for some in captions]
    torch.manual_seed(recipe.seed + state["step"])
    rng = random.Random(recipe.seed + state["step"])
    clock = Clock(minutes, state["elapsed"])
    state["budget"] = minutes
    for bar in ticks(clock, "clip"):
        # One picture of each drawing: two of the same in a batch would have to be told apart by nothing.
        rows = torch.randperm(len(icons))[: recipe.clip_batch]
        batch = to_float(pictures[rows, torch.randint(pictures.shape[1], (len(rows),))]).to(device)
        texts = torch.stack([states[row][rng.randrange(len(states[row]))] for row in rows.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.clip_lr, clock.fraction, state["step"], recipe.warmup_steps)
        with autocast(device):
            image_states = model.visual_projection(model.vision_model(pixel_values=vary(batch)).pooler_output)
            text_states = model.text_projection(texts)
        loss = contrastive_loss(image_states.float(), text_states.float(), model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=torch.tensor(LARGEST_LOGIT_SCALE).log().item())
        state["step"] += 1
        state["elapsed"] = clock.elapsed
        if state["step"] % 10 == 0 or state["step"] == 1:
            state["log"].append({"step": state["step"], "minutes": clock.elapsed / 60, "loss": loss.item()})
            bar.set_postfix(step=state["step"], loss=f"{loss.item():.4f}")
        checkpoint.save_if_due(state)
    checkpoint.save(state | {"finished": True})


def load_clip(icons: list[Icon], recipe: Recipe, folder: Path) -> tuple[CLIPModel, dict]:
    """The trained model in `folder`/clip, and that stage's state."""
    model = build_clip(recipe, build_text_encoder(recipe, build_tokenizer(icons, recipe)))
    state = load_weights(model, folder / "clip", "clip")
    return model.to(pick_device()).eval(), state


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, prompts: list[str]) -> dict:
    """How often a uint8 picture's own prompt is the nearest of all, and among the five nearest."""
    size = model.config.vision_config.image_size
    inputs = to_float(F.interpolate(pictures.float(), size=size, mode="area")).to(model.device)
    images = torch.cat(
        [model.visual_projection(model.vision_model(pixel_values=part).pooler_output) for part in inputs.split(32)]
    )
    texts = model.text_projection(embed_captions(model, tokenizer, prompts))
    ranks = (F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T).argsort(dim=1, descending=True).cpu()
    return hit_rates(ranks)


def hit_rates(ranks: torch.Tensor) -> dict:
    """How often row i's own candidate i is its best, and among its five best; `ranks` is (rows, rows), best first."""
    hits = ranks == torch.arange(len(ranks))[:, None]
    return {
        "top1": round(float(hits[:, 0].float().mean()), 3),
        "top5": round(float(hits[:, :5].any(dim=1).float().mean()), 3),
    }
