"""Train `emoji`, the small text-to-image model that ships inside agentsd.

    python apps/train_emoji.py --stage all

does everything in a little over an hour on two CPU cores: it fetches the drawings with npm (or takes them from
``--data-dir``), trains the VAE, then the UNet with its text encoder, then an image encoder beside the text encoder,
and writes the model folder with its card.
Each stage also runs on its own; ``--resume`` goes on from the last checkpoint.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from emoji_training.data import DataError, find_archive, read_icons
from emoji_training.names import HELD_OUT, NAMES
from emoji_training.recipe import TINY, Recipe
from emoji_training.vae import train_vae


ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("vae", "unet", "clip", "export", "all"), default="all")
    parser.add_argument("--data-dir", type=Path, help="folder with `npm pack`ed icon archives (default: fetch them)")
    parser.add_argument("--work-dir", type=Path, help="checkpoints, logs, samples (default: ~/.cache/agentsd/emoji)")
    parser.add_argument("--out", type=Path, default=ROOT / "agentsd" / "models" / "emoji", help="model folder written")
    parser.add_argument("--minutes", type=float, help="time for the stage; with `all`, for the three training stages")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --work-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for torch (default: torch's choice)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the chain in seconds")
    parser.add_argument("--names", help="comma-separated names to train on instead of the fixed list")
    return parser.parse_args(arguments)


def stage_minutes(options: argparse.Namespace, recipe: Recipe) -> tuple[float, float, float]:
    """Minutes for the VAE, for the UNet and for the image encoder."""
    planned = (recipe.vae_minutes, recipe.unet_minutes, recipe.clip_minutes)
    if options.minutes is None:
        return planned
    if options.stage != "all":
        return options.minutes, options.minutes, options.minutes
    vae, unet, clip = (options.minutes * minutes / sum(planned) for minutes in planned)
    return vae, unet, clip


def train(options: argparse.Namespace) -> None:
    """Run the stages asked for."""
    recipe = replace(TINY if options.tiny else Recipe(), seed=options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agentsd"
    work = options.work_dir or cache / "emoji"
    names = tuple(options.names.split(",")) if options.names else NAMES
    archive = find_archive(options.data_dir, cache / "icons")
    icons = read_icons(archive, names)
    vae_minutes, unet_minutes, clip_minutes = stage_minutes(options, recipe)
    if options.stage in ("vae", "all"):
        train_vae(icons, recipe, work, vae_minutes, options.resume)
    if options.stage in ("unet", "all"):
        from emoji_training.unet import train_unet

        train_unet(icons, recipe, work, unet_minutes, options.resume)
    if options.stage in ("clip", "all"):
        from emoji_training.clip import train_clip

        train_clip(icons, recipe, work, clip_minutes, options.resume)
    if options.stage in ("export", "all"):
        from emoji_training.export import export

        export(icons, read_icons(archive, HELD_OUT, strict=False), recipe, work, options.out)


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
