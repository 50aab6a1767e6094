"""What the finished model is measured by; every number in its card comes from here."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from tqdm import tqdm
from transformers import CLIPModel

from agentsd.bench.set_metrics import ReferenceSet, clip_scores

from .captions import Captions, distinct_scenes
from .card import judged_row
from .clip import embed_images, embed_texts, load_clip, shrink
from .compose import compose
from .images import colour_error, psnr, to_bytes, to_float
from .loop import pick_device
from .recipe import Recipe
from .scenes import Scene, SceneSource
from .sprites import Sprites
from .text import load_tokenizer
from .unet import generate, load_trained
from .vae import reconstruct


@dataclass
class Judged:
    """Scenes the model never saw just so: captions, renders, and renders with all drawings mistaken, uint8."""

    prompts: list[str]
    renders: torch.Tensor
    mistaken: torch.Tensor


def render(scenes: list[Scene], sprites: Sprites, recipe: Recipe) -> torch.Tensor:
    """uint8 images of scenes, on the CPU."""
    parts = (scenes[start : start + 32] for start in range(0, len(scenes), 32))
    return torch.cat([to_bytes(compose(part, sprites, recipe.image_size)).cpu() for part in parts])


def draw_judged(sprites: Sprites, recipe: Recipe) -> Judged:
    """As many scenes as are to be judged, no two of one caption."""
    source = SceneSource(sprites.icons, recipe, f"judged {recipe.seed}")
    scenes = distinct_scenes(source, Captions(sprites.icons), recipe.judged_scenes)
    mistaken = [with_others_drawn(scene, source) for scene in scenes.values()]
    return Judged(list(scenes), render(list(scenes.values()), sprites, recipe), render(mistaken, sprites, recipe))


def with_others_drawn(scene: Scene, source: SceneSource) -> Scene:
    """The scene with another drawing of its style in the place of each, where there is one."""
    rows = source.rows[scene.style]
    others = [name for name in rows if name not in {thing.name for thing in scene.things}] or list(rows)
    names = source.rng.choices(others, k=len(scene.things))
    things = (replace(thing, name=name, row=rows[name]) for thing, name in zip(scene.things, names, strict=True))
    return replace(scene, things=tuple(things))


@torch.no_grad()
def features(clip: CLIPModel, images: torch.Tensor) -> np.ndarray:
    """The image encoder's features of uint8 images."""
    size = clip.config.vision_config.image_size
    parts = [
        embed_images(clip, shrink(to_float(part.to(clip.device)), size)).double().cpu() for part in images.split(32)
    ]
    return torch.cat(parts).numpy()


def reference_set(clip: CLIPModel, sprites: Sprites, recipe: Recipe) -> ReferenceSet:
    """Features of fresh renders, which sets of drawn images are compared with."""
    source, count = SceneSource(sprites.icons, recipe, f"reference {recipe.seed}"), recipe.reference_scenes
    parts = [
        features(clip, render(source.draw(min(64, count - start)), sprites, recipe))
        for start in tqdm(range(0, count, 64), desc="measure renders", unit="batch")
    ]
    return ReferenceSet.of(np.concatenate(parts), recipe.reference_rows)


def reference_sets(clip: CLIPModel, sprites: Sprites, recipe: Recipe) -> dict[int, ReferenceSet]:
    """Features of fresh renders at each size that the recipe judges at: each is judged by its own."""
    return {sized.image_size: reference_set(clip, at_size(sprites, sized), sized) for sized in recipe.judged_sizes()}


def at_size(sprites: Sprites, recipe: Recipe) -> Sprites:
    """The drawings at the recipe's size."""
    return sprites if sprites.images.shape[-1] == recipe.sprite_size else sprites.smaller(recipe.sprite_size)


def hit_rates(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """How often an image's own text, that of its row, is the nearest of all, and among the five nearest."""
    cosines = F.normalize(torch.from_numpy(images), dim=1) @ F.normalize(torch.from_numpy(texts), dim=1).T
    own = cosines.diagonal()[:, None]
    # what is as near counts as nearer, so that an encoder that sees nothing has no hits
    nearer = (cosines >= own).sum(dim=1) - 1
    return {
        "top1": round(float((nearer < 1).double().mean()), 3),
        "top5": round(float((nearer < 5).double().mean()), 3),
    }


def judge(
    pipe: StableDiffusionPipeline,
    clip: CLIPModel,
    judged: Judged,
    reference: ReferenceSet,
    recipe: Recipe,
    count: int | None = None,
) -> dict[str, dict[str, float]]:
    """
    Retrieval, CLIP score, FID and KID of renders, right and mistaken, and of what is drawn in so many steps.

    With a `count`, only so many captions are drawn; each is still to be found among all of them.
    """
    with torch.no_grad():
        texts = embed_texts(clip, pipe.tokenizer, judged.prompts).double().cpu().numpy()

    def rated(images: torch.Tensor) -> dict[str, float]:
        rows = features(clip, images)
        return hit_rates(rows, texts) | {
            "clip": round(float(np.mean(clip_scores(rows, texts[: len(rows)]))), 1),
            "fid": round(reference.frechet_distance(rows), 2),
            "kid": round(reference.kernel_distance(rows), 4),
        }

    drawn = {
        str(steps): rated(generate(pipe, judged.prompts[:count], steps, recipe, recipe.seed + 1000))
        for steps in recipe.judged_steps
    }
    return {"renders": rated(judged.renders), "mistaken": rated(judged.mistaken), **drawn}


def judge_sizes(
    pipe: StableDiffusionPipeline,
    clip: CLIPModel,
    references: dict[int, ReferenceSet],
    sprites: Sprites,
    recipe: Recipe,
    count: int | None = None,
) -> dict[int, dict[str, dict[str, float]]]:
    """The values of [`judge`] for each size that the recipe judges at."""
    values = {}
    for sized in recipe.judged_sizes():
        judged = draw_judged(at_size(sprites, sized), sized)
        values[sized.image_size] = judge(pipe, clip, judged, references[sized.image_size], sized, count)
    return values


def judge_stage(sprites: Sprites, recipe: Recipe, folder: Path, count: int | None = None) -> None:
    """Print what the card would say of the last checkpoint in `folder`/unet; from `count` drawn images, if given."""
    tokenizer = load_tokenizer(sprites.icons, recipe, folder)
    pipe, state = load_trained(tokenizer, recipe, folder, unfinished=True)
    clip = load_clip(tokenizer, recipe, folder)[0]
    sprites = sprites.to(pick_device())
    values = judge_sizes(pipe, clip, reference_sets(clip, sprites, recipe), sprites, recipe, count)
    print(f"step {state['step']}, {state['elapsed'] / 60:.0f} min")
    for size, rows in values.items():
        for name, row in rows.items():
            label = f"drawn in {name} steps" if name.isdigit() else name
            print(judged_row(f"{label}, {size}×{size}", row))


def vae_quality(pipe: StableDiffusionPipeline, judged: Judged, unseen: Sprites | None, recipe: Recipe) -> dict:
    """Mean PSNR and colour error on fresh scenes, and PSNR on scenes of drawings never seen."""

    def through(images: torch.Tensor) -> torch.Tensor:
        device = pick_device()
        return torch.cat(
            [to_bytes(reconstruct(pipe.vae, to_float(part.to(device)))).cpu() for part in images.split(16)]
        )

    renders = judged.renders[:128]
    out = through(renders)
    facts = {
        "psnr": round(float(psnr(out, renders).mean()), 1),
        "colour_error": round(colour_error(out, renders), 1),
    }
    if unseen is not None:
        others = render(SceneSource(unseen.icons, recipe, f"unseen {recipe.seed}").draw(64), unseen, recipe)
        facts["psnr_unseen"] = round(float(psnr(through(others), others).mean()), 1)
    return facts
