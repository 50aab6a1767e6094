"""Train `emoji`, the text-to-image model that ships inside agentsd.

    python apps/train_emoji.py --stage all

does everything in less than two hours on two CPU cores: it fetches the drawings with npm (or takes them from
``--data-dir``), trains the VAE, then a text and an image encoder, then the UNet with its text encoder, and writes the
model folder with its card. Each stage also runs on its own; ``--resume`` goes on from the last checkpoint.

``--recipe small``, the default, makes a model of single drawings on white at 256 px. ``--recipe native512`` tunes the
model in ``--start`` to draw 512 px as well, in eight hours; ``--recipe native512-gpu`` does it in minutes on a large
GPU. ``--recipe full`` is for half an hour on a large GPU: scenes of 512 px with one to three drawings, in three
styles. ``--recipe tiny`` runs the whole chain of the full recipe in seconds, for nothing but trying it.

``--stage judge`` prints what the card would say of the last checkpoint, be it finished or not, and
``--stage export --unfinished`` writes a model of it.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path


# Read when torch is loaded. By default a thread that waits for the others keeps its core busy, and on a machine with
# other work to do a step then takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from agentsd.utils.memory import keep_freed_memory


try:
    from emoji_training.archives import DataError, gather_icons
    from emoji_training.clip import train_clip
    from emoji_training.evaluate import judge_stage
    from emoji_training.export import export
    from emoji_training.names import HELD_OUT
    from emoji_training.recipe import RECIPES, Recipe
    from emoji_training.sprites import load_sprites, render_sprites
    from emoji_training.start import is_started, start_from
    from emoji_training.unet import train_unet
    from emoji_training.vae import train_vae
except ModuleNotFoundError as missing:  # better now than after hours
    sys.exit(f"error: {missing.name} is not installed: `pip install -e '.[train]'` brings all that training needs")


MODEL = Path(__file__).resolve().parent.parent / "agentsd" / "assets" / "emoji"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("vae", "clip", "unet", "judge", "export", "all"), default="all")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="small", help="what is trained (default: small)")
    parser.add_argument("--data-dir", type=Path, help="folder with `npm pack`ed icon archives (default: fetch them)")
    parser.add_argument("--work-dir", type=Path, help="checkpoints, logs, samples (default: ~/.cache/agentsd/emoji)")
    parser.add_argument("--out", type=Path, default=MODEL, help="model folder written")
    parser.add_argument("--start", type=Path, default=MODEL, help="model folder that tuning starts from")
    parser.add_argument(
        "--minutes", type=float, help="training time of the stage, or of `all` three (preparing comes on top)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --work-dir")
    parser.add_argument("--scenes", type=int, help="how many images `judge` draws at each size (default: as the card)")
    parser.add_argument("--unfinished", action="store_true", help="export the last checkpoint of a training under way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for torch (default: torch's choice)")
    parser.add_argument("--names", help="comma-separated names to train on instead of the recipe's")
    return parser.parse_args(arguments)


def stage_minutes(options: argparse.Namespace, recipe: Recipe) -> tuple[float, float, float]:
    """Minutes for the VAE, for the text and image encoder, and for the UNet."""
    earlier = (0.0, 0.0) if recipe.tuned else (recipe.vae_minutes, recipe.clip_minutes)
    planned = (*earlier, recipe.unet_minutes)
    if options.minutes is None:
        return planned
    if options.stage != "all":
        return options.minutes, options.minutes, options.minutes
    vae, clip, unet = (options.minutes * minutes / sum(planned) for minutes in planned)
    return vae, clip, unet


def train(options: argparse.Namespace) -> None:
    """Run the stages asked for."""
    recipe = replace(RECIPES[options.recipe], seed=options.seed)
    if options.names:
        recipe = replace(recipe, names=tuple(options.names.split(",")))
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True  # each stage's sizes stay the same
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agentsd"
    work = options.work_dir or cache / f"emoji-{options.recipe}"
    icons, unseen = gather_icons(recipe.styles, recipe.names, HELD_OUT, options.data_dir, cache / "icons")
    sprites = load_sprites(icons, recipe.sprite_size, work / "sprites.safetensors")
    exporting = options.stage in ("export", "all")
    # before anything else: worker processes are best begun while this one is still small
    held_out = render_sprites(unseen, recipe.sprite_size) if exporting and unseen else None
    vae_minutes, clip_minutes, unet_minutes = stage_minutes(options, recipe)
    if recipe.tuned and options.stage in ("unet", "all") and not (options.resume and is_started(work)):
        start_from(options.start, work)
    if options.stage in ("vae", "all") and not recipe.tuned:
        train_vae(sprites, recipe, work, vae_minutes, options.resume)
    if options.stage in ("clip", "all") and not recipe.tuned:
        train_clip(sprites, recipe, work, clip_minutes, options.resume)
    if options.stage in ("unet", "all"):
        train_unet(sprites, recipe, work, unet_minutes, options.resume)
    if options.stage == "judge":
        judge_stage(sprites, recipe, work, options.scenes)
    if exporting:
        export(sprites, held_out, recipe, options.recipe, work, options.out, options.unfinished)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        train(parse(arguments))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
