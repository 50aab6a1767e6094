"""Stage four: the model folder with its card. Every number in the card is measured here."""

import copy
import json
import os
import platform
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from . import card
from .clip import build_processor, hit_rates, load_clip, retrieval
from .data import Icon, prompt_of, render_variants
from .loop import load_weights, pick_device
from .recipe import Recipe
from .unet import SAMPLE_PROMPTS, generate, load_trained
from .vae import build_vae, encode, picture_grid, psnr, reconstruct


matplotlib.use("Agg")
import matplotlib.pyplot as plt


SHARD = "14MB"
GUIDANCES = (4.0, 7.5)
DEFAULT_GUIDANCE = 7.5  # the pipeline's own: the grid shows what a user gets who sets nothing


def export(icons: list[Icon], held_out: list[Icon], recipe: Recipe, folder: Path, out: Path) -> None:
    """Write the trained model in `folder` to `out` in half precision, measure what was written, write the card."""
    pipe, unet_state = load_trained(icons, recipe, folder)
    pipe.to(pick_device())
    vae_state = load_weights(build_vae(recipe), folder / "vae", "vae")
    images = render_variants(icons, recipe.image_size, 2, recipe.seed + 2)
    pipe.vae.register_to_config(scaling_factor=float(1 / encode(pipe.vae, images.flatten(0, 1)).std()))
    save_model(pipe, out)
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(pick_device())
    clip, clip_state = load_clip(icons, recipe, folder)
    save_clip(clip, pipe.tokenizer, recipe, out / "clip")
    prompts = [prompt_of(icon.name) for icon in icons]
    drawn = {str(scale): draw_prompts(pipe, prompts, recipe, scale) for scale in GUIDANCES}
    drawings = render_variants(icons, 64, 48, recipe.seed + 3)
    facts = {
        "names": [icon.name for icon in icons],
        "prompts": prompts,
        "vae": stage_facts(vae_state, recipe.vae_minutes) | vae_quality(pipe, images, held_out, recipe),
        "unet": stage_facts(unet_state, recipe.unet_minutes),
        "match": {scale: match_rate(pictures, drawings, icons) for scale, pictures in drawn.items()},
        "clip": stage_facts(clip_state, recipe.clip_minutes)
        | {
            "real": retrieval(clip, pipe.tokenizer, images[:, 1], prompts),
            "drawn": {scale: retrieval(clip, pipe.tokenizer, pictures, prompts) for scale, pictures in drawn.items()},
        },
        "parameters": {
            name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("vae", "unet", "text_encoder")
        }
        | {"image_encoder": sum(p.numel() for p in clip.vision_model.parameters())},
        "vocabulary": len(pipe.tokenizer),
        "held_out": len(held_out),
        "match_steps": recipe.match_steps,
        "sample_steps": recipe.sample_steps,
        "sample_prompts": list(SAMPLE_PROMPTS),
        "layout": {
            "from": recipe.layout_from,
            "samples": recipe.layout_samples,
            "noise": recipe.layout_noise,
        },
        "seed": recipe.seed,
        "machine": f"{os.cpu_count()} CPU cores" if pick_device().type == "cpu" else torch.cuda.get_device_name(),
        "software": f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}",
    }
    save_samples(pipe, recipe, out)
    plot_losses(vae_state["log"], unet_state["log"], clip_state["log"], out / "loss.png")
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
    finish_folder(out, out / "text_encoder" / "config.json", out / "tokenizer", pipe.tokenizer)


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, recipe: Recipe, out: Path) -> None:
    """The image encoder with its texts' side as a CLIP model of its own, in half precision."""
    copy.deepcopy(model).half().save_pretrained(out, max_shard_size=SHARD)
    build_processor(recipe).save_pretrained(out)
    tokenizer.save_pretrained(out)
    finish_folder(out, out / "config.json", out, tokenizer)


def finish_folder(out: Path, config_file: Path, tokenizer_folder: Path, tokenizer: CLIPTokenizer) -> None:
    """What saving leaves undone for a model that everybody is to load, in any release of transformers."""
    for weights in out.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written for the owner alone, and a package is for everybody
    # Without a dtype given, transformers would load its models as stored, in half precision, and diffusers its own in
    # single; naming the wanted default keeps both alike.
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # transformers before 5 reads these two instead of tokenizer.json
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = json.dumps(backend["vocab"], ensure_ascii=False)
    (tokenizer_folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in backend["merges"])
    (tokenizer_folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def stage_facts(state: dict, planned: float) -> dict:
    """How long a stage trained, of the minutes it was to have, and where its loss ended."""
    last = [row["loss"] for row in state["log"][-10:]]
    return {
        "steps": state["step"],
        "minutes": round(state["elapsed"] / 60, 1),
        "budget": round(state.get("budget", planned), 1),
        "loss": round(sum(last) / len(last), 4) if last else None,
    }


def vae_quality(pipe: StableDiffusionPipeline, images: torch.Tensor, held_out: list[Icon], recipe: Recipe) -> dict:
    """Mean PSNR on new placements of the trained drawings and on drawings never seen, and the mean hue shift."""
    placed = images[:, 1]
    out = reconstruct(pipe.vae, placed)
    facts = {
        "psnr_trained": round(float(psnr(out, placed).mean()), 1),
        "colour_error": round(colour_error(out, placed), 1),
    }
    if held_out:
        unseen = render_variants(held_out, recipe.image_size, 1, recipe.seed)[:, 0]
        facts["psnr_unseen"] = round(float(psnr(reconstruct(pipe.vae, unseen), unseen).mean()), 1)
    return facts


def colour_error(output: torch.Tensor, target: torch.Tensor) -> float:
    """Mean distance of 8-pixel averages where there is something drawn, in levels of 255."""
    a, b = F.avg_pool2d(output.float(), 8), F.avg_pool2d(target.float(), 8)
    drawn = b.amin(dim=1) < 250
    return float((a - b).abs().mean(dim=1)[drawn].mean())


def small(images: torch.Tensor) -> torch.Tensor:
    """Pictures as vectors of 16×16 colours, to compare what and where, not fine lines."""
    return F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1)


def draw_prompts(pipe: StableDiffusionPipeline, prompts: list[str], recipe: Recipe, guidance: float) -> torch.Tensor:
    """Each prompt drawn once, in few steps: uint8, (prompts, 3, size, size)."""
    return torch.cat(
        [
            generate(pipe, chunk, recipe.match_steps, guidance, recipe.seed + 1000 + 8 * number)
            for number, chunk in enumerate(tqdm(chunks(prompts, 8), desc=f"prompts at guidance {guidance:g}"))
        ]
    )


def match_rate(pictures: torch.Tensor, drawings: torch.Tensor, icons: list[Icon]) -> dict:
    """How often the drawing nearest to a generated picture is the one its prompt names.

    The drawings compared with are several placements of every trained one, at 16×16.
    """
    distance = torch.cdist(small(pictures), small(drawings.flatten(0, 1))).unflatten(1, drawings.shape[:2])
    ranks = distance.amin(dim=2).argsort(dim=1)
    nearest = [icons[int(row)].name for row in ranks[:, 0]]
    missed = {icon.name: near for icon, near in zip(icons, nearest, strict=True) if icon.name != near}
    return {**hit_rates(ranks), "missed": missed}


def chunks(items: list[str], size: int) -> list[list[str]]:
    """The list in pieces of `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def save_samples(pipe: StableDiffusionPipeline, recipe: Recipe, out: Path) -> None:
    """The sample grid, half size: the fixed prompts, seeds counted up from the recipe's, nothing picked."""
    pictures = generate(pipe, list(SAMPLE_PROMPTS), recipe.sample_steps, DEFAULT_GUIDANCE, recipe.seed)
    picture_grid(F.avg_pool2d(pictures.float(), 2).round().to(torch.uint8), 6).save(out / "samples.png", optimize=True)


def plot_losses(vae_log: list[dict], unet_log: list[dict], clip_log: list[dict], path: Path) -> None:
    """Each stage's loss over the minutes trained."""
    logs = {
        "VAE: total loss": vae_log,
        "UNet: v-prediction error": unet_log,
        "image encoder: contrastive loss": clip_log,
    }
    figure, axes = plt.subplots(1, len(logs), figsize=(12, 3), layout="constrained")
    for axis, (title, log) in zip(axes, logs.items(), strict=True):
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
