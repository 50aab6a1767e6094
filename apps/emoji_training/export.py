"""Stage four: the model folder with its card. Every number in the card is measured here."""

import json
import os
import platform
import shutil
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from . import card
from .clip import build_processor, load_clip
from .evaluate import draw_judged, judge_sizes, reference_sets, vae_quality
from .images import image_grid
from .loop import half_pays, load_weights, pick_device
from .recipe import Recipe
from .sprites import Sprites
from .text import load_tokenizer
from .unet import generate, load_trained, sample_prompts
from .vae import build_vae


matplotlib.use("Agg")
import matplotlib.pyplot as plt


SHARD = "14MB"
SAMPLE_SIDE = 128  # pixels of an image in the sample grid


def export(
    sprites: Sprites,
    unseen: Sprites | None,
    recipe: Recipe,
    recipe_name: str,
    folder: Path,
    out: Path,
    unfinished: bool = False,
) -> None:
    """Write the trained model in `folder` to `out` in half precision, measure what was written, write the card."""
    device = pick_device()
    tokenizer = load_tokenizer(sprites.icons, recipe, folder)
    trained, unet_state = load_trained(tokenizer, recipe, folder, unfinished)
    vae_state = load_weights(build_vae(recipe), folder / "vae", "vae")
    clip, clip_state = load_clip(tokenizer, recipe, folder)
    save_model(trained, out)
    if recipe.tuned:
        for part, kept in (("clip", folder / "start" / "clip"), ("tokenizer", folder / "tokenizer")):
            shutil.copytree(kept, out / part, dirs_exist_ok=True)
    else:
        save_clip(clip, tokenizer, recipe, out / "clip")

    pipe = StableDiffusionPipeline.from_pretrained(out).to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    clip = CLIPModel.from_pretrained(out / "clip", use_safetensors=True).to(device).eval()
    sprites = sprites.to(device)
    references = reference_sets(clip, sprites, recipe)
    references[recipe.image_size].save(out / "clip" / "reference.safetensors")
    judged, values = draw_judged(sprites, recipe), judge_sizes(pipe, clip, references, sprites, recipe)
    samples = sample_prompts(sprites, recipe, recipe.sample_scenes, recipe.seed)
    facts = {
        "recipe": recipe_name,
        "styles": {style: sum(icon.style == style for icon in sprites.icons) for style in recipe.styles},
        "names": sorted({icon.name for icon in sprites.icons}),
        "prompts": judged.prompts,
        "image_size": recipe.image_size,
        "most_drawings": len(recipe.scene_counts),
        "backgrounds": list(recipe.backgrounds),
        "vae": stage_facts(vae_state)
        | vae_quality(pipe, judged, unseen.to(device) if unseen is not None else None, recipe),
        "clip": stage_facts(clip_state),
        "unet": stage_facts(unet_state),
        "judged": values.pop(recipe.image_size),
        "judged_scenes": len(judged.prompts),
        "reference_scenes": recipe.reference_scenes,
        "guidance": recipe.guidance,
        "parameters": {
            name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("vae", "unet", "text_encoder")
        }
        | {"image_encoder": sum(p.numel() for p in clip.vision_model.parameters())},
        "levels": [recipe.latent_size // 2**level for level in range(len(recipe.unet_channels))],
        "vocabulary": len(tokenizer),
        "held_out": len(unseen.icons) if unseen is not None else 0,
        "sample_steps": recipe.sample_steps,
        "sample_prompts": samples,
        "coarse_until": recipe.coarse_until,
        "layout": {
            "from": recipe.layout_from,
            "samples": recipe.layout_samples,
            "noise": recipe.layout_noise,
        },
        "seed": recipe.seed,
        "precision": "float16" if device.type == "cuda" else "bfloat16" if half_pays() else "float32",
        "machine": f"{os.cpu_count()} CPU cores" if device.type == "cpu" else torch.cuda.get_device_name(),
        "software": f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}",
    }
    if recipe.tuned:
        facts |= {
            "before": unet_state["before"],
            "half": {
                "image_size": recipe.image_size // 2,
                "judged": values.pop(recipe.image_size // 2),
                "batch": recipe.half_batch,
                "layout_noise": recipe.half_layout_noise,
            },
            "batch": recipe.unet_batch,
            "hold_until": recipe.hold_until,
        }
    images = [generate(pipe, samples, sized.sample_steps, sized, sized.seed) for sized in recipe.judged_sizes()]
    small = [F.interpolate(part.float(), size=SAMPLE_SIDE, mode="area").round().to(torch.uint8) for part in images]
    image_grid(torch.cat(small), 8).quantize(256).save(out / "samples.png", optimize=True)
    plot_losses(vae_state["log"], clip_state["log"], unet_state["log"], out / "loss.png")
    for weights in out.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written for the owner alone, and a package is for everybody
    facts["megabytes"] = round(sum(f.stat().st_size for f in out.rglob("*.safetensors")) / 1e6, 1)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card.text(facts), encoding="utf-8")


def save_model(pipe: StableDiffusionPipeline, out: Path) -> None:
    """Half-precision safetensors in shards; loads with and without a dtype given."""
    for old in out.rglob("*.safetensors*"):
        old.unlink()
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(out, max_shard_size=SHARD)
    finish_folder(out / "text_encoder" / "config.json", out / "tokenizer", pipe.tokenizer)


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, recipe: Recipe, out: Path) -> None:
    """The image encoder with its texts' side as a CLIP model of its own, in half precision."""
    model.half().save_pretrained(out, max_shard_size=SHARD)
    build_processor(recipe).save_pretrained(out)
    tokenizer.save_pretrained(out)
    finish_folder(out / "config.json", out, tokenizer)


def finish_folder(config_file: Path, tokenizer_folder: Path, tokenizer: CLIPTokenizer) -> None:
    """What saving leaves undone for a model that is to load in any release of transformers."""
    # Without a dtype given, transformers would load its models as stored, in half precision, and diffusers its own in
    # single; naming the wanted default keeps both alike.
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # transformers before 5 reads these two instead of tokenizer.json
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = json.dumps(backend["vocab"], ensure_ascii=False)
    (tokenizer_folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in backend["merges"])
    (tokenizer_folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def stage_facts(state: dict) -> dict:
    """How long a stage trained, of the minutes it was to have, and where its loss ended."""
    last = [row["loss"] for row in state["log"][-10:]]
    return {
        "steps": state["step"],
        "minutes": round(state["elapsed"] / 60, 1),
        "budget": round(state["budget"], 1),
        "loss": round(sum(last) / len(last), 4) if last else state.get("loss"),
        "log": thinned(state["log"]),
    }


def thinned(log: list[dict], rows: int = 200) -> list[dict]:
    """At most so many rows of a log, each the mean of its neighbours, to go on from and to plot."""
    size = -(-len(log) // rows)
    parts = [log[start : start + size] for start in range(0, len(log), max(1, size))]
    return [
        {"step": part[-1]["step"]}
        | {key: round(sum(row[key] for row in part) / len(part), 4) for key in ("minutes", "loss")}
        for part in parts
    ]


def plot_losses(vae_log: list[dict], clip_log: list[dict], unet_log: list[dict], path: Path) -> None:
    """Each stage's loss over the minutes trained."""
    logs = {
        "VAE: total loss": vae_log,
        "text and image encoder: contrastive loss": clip_log,
        "UNet: v-prediction error": unet_log,
    }
    logs = {title: log for title, log in logs.items() if log}  # a tuned model's earlier stages left none
    figure, axes = plt.subplots(1, len(logs), figsize=(12, 3), layout="constrained", squeeze=False)
    for axis, (title, log) in zip(axes[0], logs.items(), strict=True):
        minutes, losses = [row["minutes"] for row in log], [row["loss"] for row in log]
        axis.plot(minutes, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axis.plot(minutes, smooth(losses), color="tab:blue")
        axis.set(title=title, xlabel="minutes", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def smooth(values: list[float], keep: float = 0.7) -> list[float]:
    """Exponential running mean."""
    out: list[float] = []
    for value in values:
        out.append(keep * out[-1] + (1 - keep) * value if out else value)
    return out
