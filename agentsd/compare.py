"""Draws the same image with and without the patch, and times both in turn."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .comparison import ONLY, Comparison, PatchedRun, step_speed_up
from .config import AgentSDConfig
from .patch import is_patched, patchable_models, patched, plan_patch, unpatched
from .patch_report import PatchReport, report
from .presets import PresetName
from .runtime.checks import plain_value, shown
from .runtime.install import patch_of
from .utils.calls import check_call, pipeline_call
from .utils.environment import environment
from .utils.generation import Run, TimedImage
from .utils.progress import Progress
from .utils.timing import Stopwatch, Variant, time_rounds


_OWN_OPTIONS = {
    *("callback", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback_steps", "generator"),
    *("num_images_per_prompt", "num_inference_steps", "num_videos_per_prompt", "output_type", "return_dict"),
}
# Files that are no variant's image.
_TAKEN_NAMES = ("baseline", "side_by_side", "comparison")


def compare(
    pipe: Any,
    prompt: str | None = None,
    *,
    config: AgentSDConfig | None = None,
    configs: Mapping[str, AgentSDConfig] | Sequence[PresetName] | None = None,
    steps: int = 25,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    seconds: float = 30.0,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """
    Generate one image without the patch and with it, or with several, from the same seed, and time all.

    After a warm-up they are timed in turn, in rounds of alternating order: three of them, and more while the 95%
    interval of a speed-up per step still contains 1 and `seconds` are not over. Afterwards the pipeline is patched,
    or not, as it was before.

    Args:
        pipe (`DiffusionPipeline`):
            A pipeline with a UNet that draws images and takes `callback_on_step_end` (or, in older ones, `callback`),
            which is used to time steps. Of a video its first frame is compared, of an image with depth the image.
        prompt (`str`, *optional*): What to draw, where the pipeline takes a prompt and `options` hold no embeddings.
        config (`AgentSDConfig`, *optional*):
            The patch to compare with; by default the one that the pipeline has, or else `AgentSDConfig()`.
        configs (`Mapping[str, AgentSDConfig]` or `Sequence[str]`, *optional*):
            Several patches instead of `config`: names of presets, or configurations by names of your own.
        steps (`int`, defaults to `25`): Denoising steps.
        guidance_scale (`float`, *optional*): Strength of the prompt; by default the pipeline's own.
        height (`int`, *optional*): Height in pixels; by default, like the width, the pipeline's own.
        width (`int`, *optional*): Width in pixels.
        seed (`int`, defaults to `0`): Seed of the noise.
        negative_prompt (`str`, *optional*): What not to draw.
        seconds (`float`, defaults to `30.0`):
            How long to go on timing. Where one round takes longer, it is the only one, and there is no interval; so
            it is with a compiled model.
        progress (`Callable[[str, int, int], None]`, *optional*):
            Called at each step with what is drawn (such as `"baseline, round 2"`), the steps done and all steps of
            that image. An exception that it raises ends the comparison. It replaces the pipeline's progress bar.
        options:
            Passed to the pipeline: whatever it takes, such as `image`, `strength`, `prompt_2` or `prompt_embeds`.

    Returns:
        `Comparison`: The images, their difference, times and fidelity.

    Raises:
        RuntimeError: If the run was interrupted (`pipe._interrupt`).
        TypeError: If an argument has the wrong type, an option is one that the comparison sets itself, or the pipeline
            gives no images, needs more, does not take an option, or does not tell of its steps.
        ValueError: If an argument is out of range.

    Examples:

    ```python
    >>> from agentsd.compare import compare
    >>> from agentsd.utils.loading import load_pipeline
    >>> pipe = load_pipeline("emoji")
    >>> comparison = compare(pipe, "red apple", steps=2, height=256, width=256, seconds=0, progress=lambda *step: None)
    >>> comparison.speed_up > 0
    True
    ```
    """
    chosen = _chosen_configs(config, configs)
    pipe = getattr(pipe, "pipe", pipe)  # an AgentSDPipeline's own
    _check(prompt, steps, seed, seconds, options)
    call = pipeline_call(prompt, guidance_scale, height, width, negative_prompt, **options)
    check_call(pipe, call, steps)
    for each in chosen.values():
        plan_patch(pipe, config=each)  # what is wrong with it is better known before any image than after
    variants = {
        name: nullcontext if each is None and is_patched(pipe) else partial(patched, pipe, config=each)
        for name, each in chosen.items()
    }
    # What the pipeline's own patch has said in earlier calls belongs to this comparison too.
    for _, model in patchable_models(pipe) if None in chosen.values() else []:
        patch = patch_of(model)
        if patch is not None:
            patch.repeat_warnings()
    runs, reports = _timed_runs(pipe, call, steps, seed, seconds, progress, variants)
    baseline = runs.pop("baseline")
    return Comparison(
        baseline_run=baseline,
        variants={name: PatchedRun(run, baseline, reports[name]) for name, run in runs.items()},
        settings={
            "pipeline": type(pipe).__name__,
            "prompt": prompt,
            "negative_prompt": plain_value(negative_prompt),
            "seed": seed,
            "steps": len(baseline.time.steps) if {"timesteps", "sigmas"} & options.keys() else steps,
            "guidance_scale": plain_value(guidance_scale),
            "height": baseline.image.height,
            "width": baseline.image.width,
            "options": {name: plain_value(value) for name, value in options.items()},
            "seconds": seconds,
            **_plain_patches(reports),
        },
        environment=environment(pipe._execution_device, pipe.unet.dtype),
    )


def _timed_runs(
    pipe: Any,
    call: dict[str, Any],
    steps: int,
    seed: int,
    seconds: float,
    progress: Progress | None,
    variants: Mapping[str, Callable[[], AbstractContextManager]],
) -> tuple[dict[str, Run], dict[str, PatchReport]]:
    """The runs of the baseline and of every variant, within whose context it is drawn, and what that did to layers."""
    contexts: dict[str, Callable[[], AbstractContextManager]] = {"baseline": partial(unpatched, pipe), **variants}
    # All together, as each is patched anew in each round, and most of what there is to say is true of all.
    said: list[str] = []
    images = {
        name: TimedImage(pipe, call, steps, seed, f"with {name}" if name in variants else "without agentsd", said)
        for name in contexts
    }
    reports = {}

    def draw(name: str, watch: Stopwatch) -> None:
        images[name].draw(watch, f"{name}, round {len(images[name].watches) + 1}", progress)

    def is_clear() -> bool:
        before, *others = (image.rounds for image in images.values())
        return all(step_speed_up(before, after).is_difference for after in others)

    with ExitStack() as stack:

        def switch_to(name: str) -> None:
            stack.close()
            stack.enter_context(contexts[name]())

        def warm_up(name: str) -> None:
            switch_to(name)
            images[name].warm_up(f"{name}, warm-up", progress)

        # What is wrong with a patch is better known before the image without it than after.
        for name in [*variants, "baseline"]:
            warm_up(name)
            if name in variants:
                reports[name] = report(pipe)
        timed = [Variant(name, partial(draw, name)) for name in images]
        # Each switch has a compiled model compiled anew, and only so often.
        seconds, before_call = (0, warm_up) if _is_compiled(pipe) else (seconds, switch_to)
        time_rounds(timed, images["baseline"].device, seconds, is_clear, before_call)
    return {name: image.run() for name, image in images.items()}, reports


def _is_compiled(pipe: Any) -> bool:
    models = [model for model in (pipe.unet, getattr(pipe, "controlnet", None)) if isinstance(model, torch.nn.Module)]
    parts = [part for model in models for part in model.modules()]
    # As a whole by `torch.compile`, or in place, as diffusers does with blocks.
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)


def _chosen_configs(
    config: AgentSDConfig | None, configs: Mapping[str, AgentSDConfig] | Sequence[PresetName] | None
) -> Mapping[str, AgentSDConfig | None]:
    """The patches to compare, by name; `None` is the pipeline's own, or else the default."""
    if configs is None:
        return {ONLY: config}
    if config is not None:
        raise ValueError("Give either `config` or `configs`, not both.")
    if isinstance(configs, str) or not isinstance(configs, (Mapping, Sequence)):
        raise TypeError(f"`configs` must be names of presets, or configurations by name, but got {shown(configs)}.")
    if not configs:
        raise ValueError("`configs` is empty: there is nothing to compare with.")
    named = configs if isinstance(configs, Mapping) else {str(name): AgentSDConfig.preset(name) for name in configs}
    for name, each in named.items():
        if not isinstance(each, AgentSDConfig):
            raise TypeError(f"`configs[{name!r}]` must be an AgentSDConfig, but got {type(each).__name__}.")
        # Images are saved under these names.
        if not isinstance(name, str) or name in ("", *_TAKEN_NAMES) or Path(name).name != name:
            raise ValueError(f"A configuration cannot be called {name!r}, since its image is saved under that name.")
    return named


def _check(prompt: str | None, steps: int, seed: int, seconds: float, options: dict[str, Any]) -> None:
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"`prompt` must be one string, but got {type(prompt).__name__}.")
    for name, value, low in (("steps", steps, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an integer, but got {shown(value)}.")
        if value < low:
            raise ValueError(f"`{name}` must be at least {low}, but got {value}.")
    if seed >= 2**63:
        raise ValueError(f"`seed` must be below 2⁶³, but got {seed}.")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"`seconds` must be a number, but got {shown(seconds)}.")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"`seconds` must be at least 0 and finite, but got {seconds}.")
    taken = sorted(_OWN_OPTIONS & options.keys())
    if taken:
        raise TypeError(
            f"A comparison sets {', '.join(taken)} itself. Use `steps` for the number of steps, and "
            "`seed` for the noise."
        )
    embeds = options.get("prompt_embeds")
    if isinstance(embeds, torch.Tensor) and len(embeds) != 1:
        raise ValueError(f"A comparison draws one image, but `prompt_embeds` is a {shown(embeds)}: give one prompt's.")


def _plain_patches(reports: Mapping[str, PatchReport]) -> dict[str, Any]:
    patches = {name: each.config.to_dict() for name, each in reports.items()}
    return {"patch": patches[ONLY]} if list(patches) == [ONLY] else {"patches": patches}
