"""The command `agentsd bench`."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.assignments import read_assignments
from ..utils.libraries import how_to_install, quiet_libraries
from .options import (
    Debug,
    Device,
    DType,
    Guidance,
    Seed,
    Settings,
    check_folder,
    check_model,
    sizes,
)
from .terminal import at_work, errors_as_messages, print_table, progress_bars, warn


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model, as for `--model` of the other commands; for suites of UNet calls, `sd15`, `sd21` or "
            "`sdxl`. [default: emoji, or all shapes]"
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="`speed` times generations, `quality` also judges images, `paper` repeats the paper's table, "
            "`shapes` times UNets of real models with random weights, `cpu` those of Stable Diffusion 1.5 on the CPU."
        ),
    ] = "speed",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas; those of agentsd may set options of their own: "
            "`agentsd:agent_until=0.2:k_scale2=1`. [default: the suite's]"
        ),
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of tokens to merge; may be given several times. [default: 0.4]"),
    ] = None,
    height: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Height in pixels; may be given several times, as often as --width."),
    ] = None,
    width: Annotated[list[int] | None, typer.Option(min=1, help="Width in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. [default: 20]")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="`ddim`, `plms`, `dpm++2m` or `euler-a`. [default: the model's own; `plms` for `paper`]"),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images in one generation; may be given several times. [default: 1]"),
    ] = None,
    warmup: Annotated[int | None, typer.Option(min=1, help="Untimed runs of each case. [default: 1]")] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=0, help="Timed rounds; with 0, images are only drawn and judged. [default: 5]"),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|N",
            help="The images in a set: a file with one prompt per line, or how many of the built-in ones. For "
            "any model but emoji, `paper` needs a prompt for each ImageNet class, such as `a photo of a goldfish`.",
        ),
    ] = None,
    images_of: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Draw nothing: take over what an earlier run of the same images, on a GPU say, found of them.",
        ),
    ] = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    settings: Settings = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Judge pairs of images by LPIPS too.")] = False,
    features: Annotated[
        str | None,
        typer.Option(
            help="For FID, KID and CLIP score: `emoji`, `inception`, or a folder or hub id of a CLIP model. "
            "[default: for the model emoji, its own]"
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What to compare sets with instead of the baseline's images: a folder of images, a file of features, "
            "or `emoji`. [default: for the model emoji, its own]"
        ),
    ] = None,
    device: Device = None,
    dtype: DType = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Run every method, baseline too, through torch.compile.")
    ] = False,
    compile_mode: Annotated[
        str | None,
        typer.Option(help="As --compile, in another mode than the default: `reduce-overhead` runs CUDA graphs."),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory/--no-memory",
            help="Measure peak memory; on a CPU, each case runs once more, in a process that alone ends if it needs "
            "too much.",
        ),
    ] = True,
    budget_minutes: Annotated[
        float | None,
        typer.Option(help="Start no further size or batch after this many minutes; --resume measures the rest."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for rows, images, plots and reports.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")] = False,
    debug: Debug = False,
) -> None:
    """
    Measure speed, memory and image quality, with agentsd and with other methods.

    Several GPUs, or several processes on a CPU, share the drawing of images when started by
    `accelerate launch --multi_gpu --num_processes 2 -m agentsd bench`.
    """
    with errors_as_messages(debug, exit_code=2), at_work("Starting"):
        if not debug:
            quiet_libraries()
        from ..bench import BenchSettings, run_bench
        from ..bench.images import read_prompts

        given: dict[str, Any] = {
            "models": (model,) if model is not None else None,
            "methods": tuple(name.strip() for name in methods.split(",")) if methods is not None else None,
            "ratios": tuple(ratio) if ratio else None,
            "sizes": sizes(height, width),
            "batches": tuple(batch) if batch else None,
            "steps": steps,
            "scheduler": scheduler,
            "warmup": warmup,
            "repeats": repeats,
            "images_of": images_of,
            "guidance_scale": guidance,
            "seed": seed,
            "options": read_assignments(settings or [], "--set"),
            "lpips": lpips,
            "features": features,
            "reference": reference,
            "device": device,
            "dtype": dtype,
            "compile": compile_ if compile_mode is None else compile_mode,
            "memory": memory,
            "budget_minutes": budget_minutes,
        }
        if prompts is not None:
            if prompts.isdecimal():
                given["images"] = int(prompts)
            else:
                given["prompts"] = read_prompts(prompts)
                given["images"] = len(given["prompts"])
        if out is not None:
            check_folder(out)
        elif resume:
            raise ValueError("--resume needs the folder of the run: name it with --out.")
        asked = BenchSettings.of_suite(suite, **{name: value for name, value in given.items() if value is not None})
        if asked.kind == "generation":
            for name in asked.models:
                check_model(name, device, dtype)
    with errors_as_messages(debug):
        with progress_bars() as bars:
            task = bars.add_task("loading", total=None)

            def advance(name: str, done: int, total: int) -> None:
                bars.update(task, description=name, completed=done, total=total)

            result = run_bench(asked, out=out, resume=resume, progress=advance)
        from ..bench.report import NOT_IN_TERMINAL
        from ..bench.workers import Workers

        if not Workers().is_main:
            return
        warn(result.warnings)
        print_table(result.table())
        for note in result.notes(intervals=False, without=NOT_IN_TERMINAL):
            print(f"- {note}")
        if out is None:
            return
        for file in result.save(out):
            print(file)
        if importlib.util.find_spec("matplotlib") is None:
            warn([f"No plots were drawn, as matplotlib is not installed: {how_to_install('bench')}"])
