"""The options that the commands share, and how what they were given is read and checked."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..presets import PRESETS
from ..utils.assignments import read_assignments
from ..utils.libraries import quiet_libraries
from ..utils.user_warnings import user_warnings
from .terminal import at_work, errors_as_messages, warn


if TYPE_CHECKING:
    from ..config import AgentSDConfig
    from ..presets import PresetName


Prompt = Annotated[str, typer.Argument(help="What to draw.")]
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="`emoji`, a folder, a `.safetensors` file, or an id on the Hugging Face Hub."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"A named patch: {', '.join(PRESETS)}; what else is given overrides what it sets. [default: paper]",
    ),
]
Ratio = Annotated[float | None, typer.Option(help="Share of tokens to merge, from 0 to below 1. [default: 0.4]")]
Reuse = Annotated[
    int | None,
    typer.Option(min=1, help="Run the deep part of the UNet in one of so many steps. [default: the preset's]"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other field of AgentSDConfig; may be given several times."),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. [default: the model's]")]
Height = Annotated[int | None, typer.Option(min=1, help="Height in pixels. [default: the model's]")]
Width = Annotated[int | None, typer.Option(min=1, help="Width in pixels. [default: the model's]")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to draw.")]
Device = Annotated[str | None, typer.Option(help="`cpu`, `cuda`, `cuda:1`, `mps`. [default: a GPU if there is one]")]
DType = Annotated[
    str | None,
    typer.Option(help="`float32`, `float16` or `bfloat16`. [default: `float16` on CUDA, else `float32`]"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the libraries' warnings.")]


def load_model(model: str, device: str | None, dtype: str | None, debug: bool) -> Any:
    """Load a model, or exit with a message."""
    with errors_as_messages(debug, exit_code=2), at_work(f"Starting {model}"):
        if not debug:
            quiet_libraries()
        check_model(model, device, dtype)
    with errors_as_messages(debug), at_work(f"Loading {model}"):
        from ..utils.loading import load_pipeline

        with user_warnings() as said:
            pipe = load_pipeline(model, device=device, dtype=dtype)
        warn(said)
        return pipe


def check_model(model: str, device: str | None, dtype: str | None) -> None:
    """Refuse a model, device or dtype that is not there, without loading anything."""
    from ..utils.loading import pick_device, pick_dtype, resolve_model

    resolve_model(model)
    pick_dtype(dtype, pick_device(device))


def patch_config(
    preset: str | None, ratio: float | None, reuse: int | None, settings: list[str] | None
) -> "AgentSDConfig":
    """The configuration that `--preset` and what overrides it ask for."""
    name = "paper" if preset is None else preset
    return preset_configs([name], overrides(ratio, reuse, settings))[name]


def preset_configs(names: Sequence[str], values: dict[str, Any]) -> dict[str, "AgentSDConfig"]:
    """The configurations of presets, with these values in place of their own."""
    from ..config import AgentSDConfig

    return {name: AgentSDConfig.preset(cast("PresetName", name), **values) for name in names}


def overrides(ratio: float | None, reuse: int | None, settings: list[str] | None) -> dict[str, Any]:
    """What `--ratio`, `--reuse` and `--set` set."""
    values = read_assignments(settings or [], "--set")
    for name, value in (("ratio", ratio), ("reuse", reuse)):
        if value is not None and name in values:
            raise ValueError(f"{name} is given twice.")
        if value is not None:
            values[name] = value
    return values


def check_image_file(file: Path) -> None:
    """Refuse a file that an image cannot be written to."""
    from PIL import Image

    if file.is_dir():
        raise ValueError(f"--out {file} is a folder: name a file, such as {file / 'image.png'}.")
    try:
        # Some kinds, such as .psd, can be read but not written, and some, such as .xbm, have no colours.
        kind = Image.registered_extensions()[file.suffix.lower()]
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=kind)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"--out {file} does not end in the suffix of a colour image format, such as .png.") from error
    check_folder(file.parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that results cannot be written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out {existing} is a file: name a folder.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--out {folder}: nothing can be written to {existing}.")


def sizes(heights: list[int] | None, widths: list[int] | None) -> tuple[tuple[int, int], ...] | None:
    """Pairs of height and width from options that may be given several times."""
    if len(heights or ()) != len(widths or ()):
        raise ValueError("Give --height and --width the same number of times, or neither.")
    return tuple(zip(heights, widths, strict=True)) if heights and widths else None


def check_size(height: int | None, width: int | None) -> None:
    """Refuse a height without a width, and a width without a height."""
    # Given one of them, some pipelines silently take their default for both.
    if (height is None) != (width is None):
        raise ValueError("Give both --height and --width, or neither.")
