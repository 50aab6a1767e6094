"""The `agentsd` command. Torch and diffusers are imported inside the commands, so that `agentsd --help` is quick."""

import importlib.util
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import __version__
from ..presets import PRESETS
from ..utils.libraries import how_to_install, quiet_libraries
from ..utils.user_warnings import user_warnings
from .bench import bench
from .interrupt import ends_on_interrupt
from .options import (
    Debug,
    Device,
    DType,
    Guidance,
    Height,
    Model,
    NegativePrompt,
    Preset,
    Prompt,
    Ratio,
    Reuse,
    Seed,
    Settings,
    Steps,
    Width,
    check_folder,
    check_image_file,
    check_size,
    load_model,
    overrides,
    patch_config,
    preset_configs,
)
from .terminal import (
    allow_any_text,
    at_work,
    errors_as_messages,
    print_table,
    progress_bar,
    warn,
)


# What `compare` shows by itself.
_COMPARED_PRESETS = ("paper", "balanced", "fast")

app = typer.Typer(
    name="agentsd",
    help="Agent attention for Stable Diffusion: faster images, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"agentsd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    allow_any_text()


@app.command()
def generate(
    prompt: Prompt,
    model: Model = "emoji",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("agentsd.png"),
    no_patch: Annotated[bool, typer.Option("--no-patch", help="Generate without agentsd.")] = False,
    preset: Preset = None,
    ratio: Ratio = None,
    reuse: Reuse = None,
    settings: Settings = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    negative_prompt: NegativePrompt = None,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Generate an image."""
    with errors_as_messages(debug, exit_code=2):
        config = patch_config(preset, ratio, reuse, settings)
        if no_patch and (preset is not None or ratio is not None or reuse is not None or settings):
            raise ValueError(
                "--no-patch leaves nothing for --preset, --ratio, --reuse and --set to change: leave out one or the "
                "other."
            )
        check_image_file(out)
        check_size(height, width)
    pipe = load_model(model, device, dtype, debug)
    with errors_as_messages(debug):
        import torch

        from ..patch import apply_patch
        from ..utils.calls import check_draws_from_text, pipeline_call
        from ..utils.generation import draw
        from ..utils.images import image_warnings, to_image

        call = pipeline_call(prompt, guidance, height, width, negative_prompt)
        check_draws_from_text(pipe, call, steps, is_timed=False)
        if not no_patch:
            with user_warnings() as said:
                apply_patch(pipe, config=config)
            warn(said)
        # No bar where nobody watches.
        pipe.set_progress_bar_config(disable=None)
        start = time.perf_counter()
        drawn = draw(pipe, call, steps, torch.Generator().manual_seed(seed))
        seconds = time.perf_counter() - start
        image = to_image(drawn.values)
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out)
        options = {"preset": preset, "ratio": ratio, "reuse": reuse}
        given = [f"{name} {value}" for name, value in options.items() if value is not None]
        patch = ", ".join(["with agentsd", *(given or [f"ratio {config.ratio:g}"])])
        how = "without agentsd" if no_patch else patch
        warn([*drawn.said, *image_warnings(drawn.output, how.split(",")[0], pipe.dtype)])
        print(f"{out}: {image.width}×{image.height}, {steps} steps in {seconds:.1f} s {how}, seed {seed}")


@app.command()
def compare(
    prompt: Prompt,
    model: Model = "emoji",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("agentsd-comparison"),
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"A named patch: {', '.join(PRESETS)}; may be given several times. [default: "
            f"{', '.join(_COMPARED_PRESETS)}; with --ratio, --reuse or --set and no preset, only what they ask for]",
        ),
    ] = None,
    ratio: Ratio = None,
    reuse: Reuse = None,
    settings: Settings = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    negative_prompt: NegativePrompt = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long to go on timing while no difference shows; 0 times once.")
    ] = 30,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Generate the same image without agentsd and with one or more presets, and compare times and images."""
    with errors_as_messages(debug, exit_code=2):
        given = overrides(ratio, reuse, settings)
        patches: dict[str, Any]
        if given and not preset:
            patches = {"config": patch_config(None, ratio, reuse, settings)}
        else:
            patches = {"configs": preset_configs(preset or _COMPARED_PRESETS, given)}
        check_folder(out)
        check_size(height, width)
    pipe = load_model(model, device, dtype, debug)
    with errors_as_messages(debug):
        from ..compare import compare as run_comparison
        from ..utils.calls import check_draws_from_text, pipeline_call
        from ..utils.memory import keep_freed_memory

        check_draws_from_text(pipe, pipeline_call(prompt, guidance, height, width, negative_prompt), steps)
        if pipe.device.type == "cpu":
            keep_freed_memory()
        with progress_bar() as progress:
            comparison = run_comparison(
                pipe,
                prompt,
                **patches,
                steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                seed=seed,
                negative_prompt=negative_prompt,
                seconds=seconds,
                progress=progress,
            )
        files = comparison.save(out)
        warn(comparison.warnings)
        print_table(comparison.table())
        for file in files.values():
            print(file)


app.command()(bench)


@app.command()
def report(
    model: Model = "emoji",
    preset: Preset = None,
    ratio: Ratio = None,
    reuse: Reuse = None,
    settings: Settings = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Show what agentsd does to each layer of a model: tokens, agents and operations."""
    with errors_as_messages(debug, exit_code=2):
        config = patch_config(preset, ratio, reuse, settings)
        check_size(height, width)
    pipe = load_model(model, device, None, debug)
    with errors_as_messages(debug):
        from ..patch import apply_patch
        from ..patch_report import report as report_patch
        from ..utils.loading import own_size

        if height is None or width is None:
            height, width = own_size(pipe)
        apply_patch(pipe, config=config)
        print(f"{width}×{height} pixels")
        print(report_patch(pipe, height=height, width=width))


@app.command()
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="As for the other commands; may be given several times. [default: emoji]"),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="A folder written by `agentsd bench --out`, to show; may be given several times."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 for the whole network. [default: this machine]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port. [default: the first free one from 7860]")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Open a public link through Gradio's servers.")] = False,
    max_side: Annotated[int, typer.Option(help="Longest side of an image in pixels.")] = 1024,
    max_steps: Annotated[int, typer.Option(help="Largest number of denoising steps.")] = 100,
    max_waiting: Annotated[int, typer.Option(help="How many generations may wait for their turn.")] = 8,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Serve a web page that compares speed and images side by side."""
    with errors_as_messages(debug, exit_code=2), at_work("Starting"):
        if not debug:
            quiet_libraries()
        missing = [name for name in ("gradio", "matplotlib") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"The web page needs {' and '.join(missing)}: {how_to_install('demo')}")
        from ..demo import build_demo, launch_demo
        from ..demo.engine import Engine
        from ..demo.requests import Limits

        limits = Limits(side=max_side, steps=max_steps, waiting=max_waiting)
        with user_warnings() as said:
            engine = Engine(model or ("emoji",), device=device, dtype=dtype, limits=limits)
        warn(said)
        page = build_demo(engine, results or ())
    with errors_as_messages(debug):
        print("Press Ctrl+C to stop.")
        launch_demo(page, host=host or "127.0.0.1", port=port, share=share)


@app.command()
def env(debug: Debug = False) -> None:
    """Show versions, device and precision: what a bug report needs."""
    with errors_as_messages(debug):
        with at_work("Collecting versions"):
            if not debug:
                quiet_libraries()
            from ..utils.environment import environment
            from ..utils.loading import pick_device, pick_dtype

            device = pick_device()
            facts = environment(device, pick_dtype(device=device))
        table = Table(box=None, show_header=False)
        for name, value in facts.items():
            table.add_row(name, "none" if value is None else str(value))
        print_table(table)


def main() -> None:
    """Run the command line."""
    allow_any_text()  # for `--help`, too, and mistakes
    with ends_on_interrupt():
        app(prog_name="agentsd")
