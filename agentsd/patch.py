"""Patching a pipeline or model in place, and undoing it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .config import AgentSDConfig
from .models.other_packages import HIDIFFUSION, PACKAGES, TOMESD, package_in_block
from .models.unet import AttentionLayer, attended_models, find_layers, plain_name, unsupported_reason
from .presets import PresetName
from .runtime.checks import shown
from .runtime.fallbacks import message, remedy
from .runtime.install import ModelPatch, Snapshot, original_processor, patch_of, replace_patches, uninstall
from .runtime.matching import Matching
from .runtime.state import LayerState
from .runtime.steps import Clock, running_phases
from .techniques.feature_reuse import FeatureReuseConfig, apply_feature_reuse


Patchable = TypeVar("Patchable")
FilterFn = Callable[[str, torch.nn.Module], bool]


def apply_patch(
    pipe_or_unet: Patchable,
    ratio: float | None = None,
    *,
    preset: PresetName | None = None,
    config: AgentSDConfig | None = None,
    filter_fn: FilterFn | None = None,
    **options: Any,
) -> Patchable:
    """
    Patch a pipeline or model in place, so that its self-attention merges tokens and attends through agents.

    A patch that is already there is replaced; an attention backend set on its layers stays. If the call fails, nothing
    has changed.

    Pipelines that share a patched model may run in several threads. Only if it is compiled, calls at the same time are
    an error.

    Args:
        pipe_or_unet (`DiffusionPipeline` or `UNet2DConditionModel`):
            What to patch. In a pipeline, the UNet is patched, together with the ControlNets if there are any.
        ratio (`float`, *optional*, defaults to `0.4`): Share of tokens to merge, in `[0, 1)`.
        preset (`str`, *optional*, defaults to `"paper"`):
            `"paper"`, `"agent"`, `"tome"`, `"balanced"` or `"fast"`; see [`AgentSDConfig.preset`]. `ratio` and
            keywords override what it sets: `preset="balanced", reuse=None` is its attention part alone.
        config (`AgentSDConfig`, *optional*): All options as one object, instead of `ratio`, `preset` and keywords.
        filter_fn (`Callable[[str, torch.nn.Module], bool]`, *optional*):
            Asked once for every layer that `max_downsample` admits, with the name of the self-attention in its model
            and the module itself; layers for which it returns `False` are left alone.
        options: Any field of [`AgentSDConfig`] by name.

    Returns:
        The same object.

    Raises:
        TypeError: If the object cannot be patched, an option is unknown or has the wrong type.
        ValueError: If an option is out of range, no layer is left to patch, or another package does the same there.

    Examples:

    ```python
    >>> import agentsd
    >>> from diffusers import StableDiffusionPipeline
    >>> from agentsd.utils.loading import resolve_model
    >>> pipe = StableDiffusionPipeline.from_pretrained(resolve_model("emoji"))
    >>> pipe = agentsd.apply_patch(pipe, ratio=0.4)
    >>> agentsd.is_patched(pipe)
    True
    ```
    """
    options |= {"preset": preset, "config": config, "filter_fn": filter_fn}
    planned = plan_patch(pipe_or_unet, ratio, **options)
    _warn_of_unused_ratio(planned[0][1].config)
    for _, patch in planned:
        _warn_of_other_packages(patch)
    replace_patches(planned)
    return pipe_or_unet


def plan_patch(
    pipe_or_unet: Any,
    ratio: float | None = None,
    *,
    preset: PresetName | None = None,
    config: AgentSDConfig | None = None,
    filter_fn: FilterFn | None = None,
    **options: Any,
) -> list[tuple[torch.nn.Module, ModelPatch]]:
    """What [`apply_patch`] would do with the same arguments, raising what it would raise; nothing is changed."""
    config = _resolve_config(ratio, preset, config, options)
    check_filter(filter_fn)
    models = patchable_models(pipe_or_unet)
    timesteps = _num_train_timesteps(pipe_or_unet)
    planned = [(model, _plan_model(model, config, timesteps, filter_fn)) for _, model in models]
    model, patch = planned[0]
    if not patch.layers and (config.reuse is None or config.ratio > 0):
        raise ValueError(_no_layer_message(model, patch))
    if isinstance(config.reuse, FeatureReuseConfig):
        reuses = apply_feature_reuse(model, [other for other, _ in planned[1:]], config.reuse)
        for (_, patch), reuse in zip(planned, reuses, strict=True):
            patch.reuse = reuse
    return planned


def remove_patch(pipe_or_unet: Patchable) -> Patchable:
    """
    Undo [`apply_patch`]. A model that is not patched is left as it is.

    Args:
        pipe_or_unet (`DiffusionPipeline` or `UNet2DConditionModel`):
            A pipeline or model. A ControlNet that was patched through another pipeline, and is not part of this one,
            stays patched: pass that pipeline, or the ControlNet itself.

    Returns:
        The same object.

    Raises:
        TypeError: If it is neither a pipeline with a UNet nor a model.
        ValueError: If it wraps a patched model, as `DistributedDataParallel` does.

    Examples:

    ```python
    >>> import agentsd
    >>> pipe = agentsd.AgentSDPipeline.from_pretrained("emoji").pipe
    >>> agentsd.is_patched(agentsd.remove_patch(pipe))
    False
    ```
    """
    for _, model in patchable_models(pipe_or_unet):
        uninstall(model)
    return pipe_or_unet


def is_patched(pipe_or_unet: Any) -> bool:
    """
    Whether a pipeline's UNet, or a model, is patched.

    Args:
        pipe_or_unet (`DiffusionPipeline` or `UNet2DConditionModel`): A pipeline or model.

    Returns:
        `bool`: `True` between [`apply_patch`] and [`remove_patch`].

    Raises:
        TypeError: If it is neither a pipeline with a UNet nor a model.
        ValueError: If it wraps a patched model, as `DistributedDataParallel` does.

    Examples:

    ```python
    >>> import agentsd
    >>> agentsd.is_patched(agentsd.AgentSDPipeline.from_pretrained("emoji").pipe)
    True
    ```
    """
    return patch_of(patchable_models(pipe_or_unet)[0][1]) is not None


@contextmanager
def patched(pipe_or_unet: Patchable, ratio: float | None = None, **options: Any) -> Iterator[Patchable]:
    """
    Patch for the duration of a `with` block; afterwards everything is as it was before, patched or not.

    Args:
        pipe_or_unet (`DiffusionPipeline` or `UNet2DConditionModel`): What to patch.
        ratio (`float`, *optional*, defaults to `0.4`): Share of tokens to merge, in `[0, 1)`.
        options: All other arguments of [`apply_patch`].

    Yields:
        The same object, patched.

    Raises:
        TypeError: If the object cannot be patched, an option is unknown or has the wrong type.
        ValueError: If an option is out of range, or no layer is left to patch.

    Examples:

    ```python
    >>> import agentsd
    >>> pipe = agentsd.AgentSDPipeline.from_pretrained("emoji", ratio=0.2).pipe
    >>> with agentsd.patched(pipe, ratio=0.5):
    ...     print(agentsd.report(pipe).config.ratio)
    0.5
    >>> agentsd.report(pipe).config.ratio
    0.2
    ```
    """
    before = [Snapshot(model) for _, model in patchable_models(pipe_or_unet)]
    apply_patch(pipe_or_unet, ratio, **options)
    try:
        yield pipe_or_unet
    finally:
        for snapshot in before:
            snapshot.restore()


@contextmanager
def unpatched(pipe_or_unet: Patchable) -> Iterator[Patchable]:
    """
    Remove all patches, also of ControlNets, for the duration of a `with` block, and put them back as they were.

    Args:
        pipe_or_unet (`DiffusionPipeline` or `UNet2DConditionModel`): A pipeline or model, patched or not.

    Yields:
        The same object.

    Raises:
        TypeError: If it is neither a pipeline with a UNet nor a model.
        ValueError: If it wraps a patched model, as `DistributedDataParallel` does.

    Examples:

    ```python
    >>> import agentsd
    >>> from agentsd.patch import unpatched
    >>> pipe = agentsd.AgentSDPipeline.from_pretrained("emoji").pipe
    >>> with unpatched(pipe):
    ...     agentsd.is_patched(pipe)
    False
    >>> agentsd.is_patched(pipe)
    True
    ```
    """
    before = [Snapshot(model) for _, model in patchable_models(pipe_or_unet)]
    remove_patch(pipe_or_unet)
    try:
        yield pipe_or_unet
    finally:
        for snapshot in before:
            snapshot.restore()


def patchable_models(pipe_or_unet: Any) -> list[tuple[str, torch.nn.Module]]:
    """The models that are patched together, with their names; refuses what wraps a patched model."""
    models = attended_models(pipe_or_unet)
    for _, model in models:
        if patch_of(model) is not None:
            continue
        for name, inner in model.named_modules():
            # Patches are not looked for that deep.
            if patch_of(inner) is not None:
                raise ValueError(f"{type(model).__name__} wraps a patched model: pass its `{name}` instead.")
    return models


def check_filter(filter_fn: Any) -> None:
    """Refuse a `filter_fn` that cannot choose layers."""
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"`filter_fn` must be a function of a name and a module, but got {shown(filter_fn)}.")


def _resolve_config(
    ratio: float | None, preset: PresetName | None, config: AgentSDConfig | None, options: dict[str, Any]
) -> AgentSDConfig:
    if ratio is not None:
        options = {"ratio": ratio, **options}
    if config is None:
        return AgentSDConfig.preset("paper" if preset is None else preset, **options)
    if not isinstance(config, AgentSDConfig):
        raise TypeError(f"`config` must be an AgentSDConfig, but got {type(config).__name__}.")
    given = [*(["preset"] if preset is not None else []), *options]
    if given:
        raise ValueError(f"Give either `config` or {', '.join(given)}, not both.")
    return config


def _num_train_timesteps(pipe_or_unet: Any) -> int:
    scheduler = getattr(pipe_or_unet, "scheduler", None)
    return getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000


def _plan_model(
    model: torch.nn.Module, config: AgentSDConfig, num_train_timesteps: int, filter_fn: FilterFn | None
) -> ModelPatch:
    # Where nothing is merged, phases would only be compiled one by one.
    clock = Clock(config.phases if config.ratio > 0 else config.phases[-1:], num_train_timesteps)
    patch = ModelPatch(config, clock)
    for layer in find_layers(model):
        if 2**layer.level > config.max_downsample:
            continue
        if filter_fn is not None and not filter_fn(layer.name, layer.attn):
            continue
        package = package_in_block(layer.block)
        if package is TOMESD and clock.merges:
            raise ValueError(f"{package.does} ({plain_name(layer.name)}). {package.remedy}")
        reason = unsupported_reason(layer.attn, original_processor(layer.attn))
        if package is HIDIFFUSION:
            reason = package.does
        if reason is not None:
            patch.skipped.append((layer, reason))
            continue
        # Every layer makes random choices of its own.
        seed = (config.seed * 0x9E3779B1 + layer.number) & 0xFFFFFFFF
        patch.layers.append(
            (layer, LayerState(clock, seed, config.min_tokens, in_fp32=config.attn_precision == "fp32"))
        )
    if config.match_interval is not None or config.share_matches is not None:
        patch.matching = Matching(config.match_interval, [_match_group(layer, config) for layer, _ in patch.layers])
    return patch


def _match_group(layer: AttentionLayer, config: AgentSDConfig) -> str:
    """What a layer has in common with those that merge as it matches."""
    match config.share_matches:
        case "block":
            return layer.stage
        case "level":
            return str(layer.level)
    return layer.name


def _warn_of_unused_ratio(config: AgentSDConfig) -> None:
    """Where only keys and values are merged, `ratio` says no more than whether they are."""
    phases = [phase for _, phase in running_phases(config.phases)]
    is_used = any(phase.keys is None for phase in phases)
    if config.ratio not in (0, AgentSDConfig.ratio) and not is_used:
        instead = "`kv_ratio` says how many are" if config.late_phase == "kv-merged" else "of four, one is left"
        warnings.warn(
            f"`ratio={config.ratio:g}` changes nothing here: in every step, only keys and values are merged, and "
            f"{instead}. `ratio=0` leaves them alone.",
            stacklevel=3,
        )


def _warn_of_other_packages(patch: ModelPatch) -> None:
    for package in PACKAGES:
        names = [plain_name(layer.name) for layer, reason in patch.skipped if reason == package.does]
        if names and patch.clock.merges:
            warnings.warn(message(names, package.does), stacklevel=3)


def _no_layer_message(model: torch.nn.Module, patch: ModelPatch) -> str:
    kind = type(model).__name__
    if patch.skipped:
        layer, reason = patch.skipped[0]
        return (
            f"No self-attention of {kind} can be patched: {plain_name(layer.name)} is left out because {reason}. "
            f"{remedy(reason)}"
        ).rstrip()
    if not find_layers(model):
        inner = next((name for name, module in model.named_modules() if find_layers(module)), None)
        if inner is not None:
            return f"{kind} wraps the model that agentsd can patch: patch its `{inner}`, before or after wrapping."
        return (
            f"{kind} has no self-attention that agentsd can patch, which is in the transformer blocks of a Stable "
            "Diffusion UNet. Transformer models such as Stable Diffusion 3 and Flux are not supported yet."
        )
    return (
        f"`filter_fn` and `max_downsample={patch.config.max_downsample}` leave no self-attention of {kind} to patch."
    )
