"""Patching a pipeline or model in place, and undoing it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from .config import AgentSDConfig
from .models.unet import (
    AttentionLayer,
    attended_models,
    current_patch,
    find_layers,
    patched_layers,
    plain_name,
    unsupported_reason,
)
from .runtime.processor import AgentAttnProcessor
from .runtime.state import ModelPatch, SitePatch


Patchable = TypeVar("Patchable")
FilterFn = Callable[[str, torch.nn.Module], bool]


def apply_patch(
    pipe_or_unet: Patchable,
    ratio: float | None = None,
    *,
    config: AgentSDConfig | None = None,
    filter_fn: FilterFn | None = None,
    **options: Any,
) -> Patchable:
    """
    Patch a pipeline or model in place, so that its self-attention merges tokens and attends through agents.

    A patch that is already there is replaced; an attention backend set on its layers stays. If the call fails, nothing
    has changed.

    Only one thread at a time may run a patched model, whichever pipelines share it: the state of a call is kept on the
    model, so two calls at once would merge by each other's tokens, without an error.

    Args:
        pipe_or_unet (`DiffusionPipeline` or `UNet2DConditionModel`):
            What to patch. In a pipeline, the UNet is patched, together with the ControlNets if there are any.
        ratio (`float`, *optional*, defaults to `0.4`): Share of tokens to merge, in `[0, 1)`.
        config (`AgentSDConfig`, *optional*): All options as one object, instead of `ratio` and keywords.
        filter_fn (`Callable[[str, torch.nn.Module], bool]`, *optional*):
            Asked once for every layer that `max_downsample` admits, with the name of the self-attention in its model
            and the module itself; layers for which it returns `False` are left alone.
        options: Any field of [`AgentSDConfig`] by name.

    Returns:
        The same object.

    Raises:
        TypeError: If the object cannot be patched, an option is unknown or has the wrong type.
        ValueError: If an option is out of range, or no layer is left to patch.

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
    config = _resolve_config(ratio, config, options)
    check_filter(filter_fn)
    models = attended_models(pipe_or_unet)
    timesteps = _num_train_timesteps(pipe_or_unet)
    planned: list[tuple[torch.nn.Module, ModelPatch, dict[int, AttentionLayer]]] = []
    for index, (_, model) in enumerate(models):
        patch = ModelPatch(config, timesteps, skipped={})
        sites = _choose_sites(patch, model, filter_fn)
        if index == 0 and not sites:
            raise ValueError(_no_site_message(model, patch, config))
        planned.append((model, patch, sites))
    _replace_patches(planned)
    return pipe_or_unet


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
    for _, model in attended_models(pipe_or_unet):
        _uninstall(model)
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
    return current_patch(attended_models(pipe_or_unet)[0][1]) is not None


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
    before = [_Snapshot(model) for _, model in attended_models(pipe_or_unet)]
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
    before = [_Snapshot(model) for _, model in attended_models(pipe_or_unet)]
    remove_patch(pipe_or_unet)
    try:
        yield pipe_or_unet
    finally:
        for snapshot in before:
            snapshot.restore()


def check_filter(filter_fn: Any) -> None:
    """
    Refuse what cannot choose layers.

    Args:
        filter_fn (`Callable[[str, torch.nn.Module], bool]`, *optional*): See [`apply_patch`].

    Raises:
        TypeError: If it is no function.

    Examples:

    ```python
    >>> check_filter(lambda name, module: name.startswith("up_blocks"))
    ```
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"`filter_fn` must be a function of a name and a module, but got {filter_fn!r}.")


def _resolve_config(ratio: float | None, config: AgentSDConfig | None, options: dict[str, Any]) -> AgentSDConfig:
    if ratio is not None:
        options = {"ratio": ratio, **options}
    if config is None:
        return AgentSDConfig.from_dict(options)
    if not isinstance(config, AgentSDConfig):
        raise TypeError(f"`config` must be an AgentSDConfig, but got {type(config).__name__}.")
    if options:
        raise ValueError(f"Give either `config` or {', '.join(options)}, not both.")
    return config


def _num_train_timesteps(pipe_or_unet: Any) -> int:
    scheduler = getattr(pipe_or_unet, "scheduler", None)
    return getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000


def _original_processor(site: AttentionLayer) -> Any:
    if isinstance(site.attn.processor, AgentAttnProcessor):
        patch = getattr(site.attn, "agentsd_site", None)
        # Without its patch, it is one that somebody kept and put back after the patch was removed.
        return AttnProcessor2_0() if patch is None else patch.original
    return site.attn.processor


def _choose_sites(patch: ModelPatch, model: torch.nn.Module, filter_fn: FilterFn | None) -> dict[int, AttentionLayer]:
    """The layers to patch, by their number in the model."""
    chosen = {}
    for layer, site in enumerate(find_layers(model)):
        if 2**site.level > patch.config.max_downsample:
            continue
        if filter_fn is not None and not filter_fn(site.name, site.attn):
            continue
        reason = unsupported_reason(site.attn, _original_processor(site))
        if reason is None:
            chosen[layer] = site
        else:
            patch.skipped[plain_name(site.name)] = reason
    return chosen


def _no_site_message(model: torch.nn.Module, patch: ModelPatch, config: AgentSDConfig) -> str:
    kind = type(model).__name__
    if patch.skipped:
        name, reason = next(iter(patch.skipped.items()))
        return f"No self-attention of {kind} can be patched: {name} is left out because {reason}."
    if not find_layers(model):
        if isinstance(model, torch.nn.DataParallel):
            return (
                "DataParallel runs copies of a model in several threads, whose calls a patch cannot tell apart. Use "
                "DistributedDataParallel, with one process per GPU, and patch the model inside."
            )
        inner = next((name for name, module in model.named_modules() if find_layers(module)), None)
        if inner is not None:
            return f"{kind} wraps the model that agentsd can patch: patch its `{inner}`, before or after wrapping."
        return (
            f"{kind} has no self-attention that agentsd can patch, which is in the transformer blocks of a Stable "
            "Diffusion UNet. Transformer models such as Stable Diffusion 3 and Flux are not supported yet."
        )
    return f"`filter_fn` and `max_downsample={config.max_downsample}` leave no self-attention of {kind} to patch."


class _Snapshot:
    """A model as it is, patched or not, for what a patch changes in it to be put back exactly."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.patch = current_patch(model)
        self.sites = [(site, site.attn.agentsd_site, site.attn.processor) for site in patched_layers(model)]
        self.kept = dict(_kept_processors(model))

    def restore(self) -> None:
        """Put it back. What has been replaced since by another processor than the patch's stays so."""
        _uninstall(self.model)
        if self.patch is None:
            return
        self.patch.install(self.model)
        kept = _kept_processors(self.model)
        for site, site_patch, processor in self.sites:
            name, original = f"{site.name}.processor", site_patch.original
            site_patch.install(site, processor if site.attn.processor is original else site.attn.processor)
            if kept.get(name) is original:
                kept[name] = self.kept.get(name, processor)


def _replace_patches(wanted: list[tuple[torch.nn.Module, ModelPatch, dict[int, AttentionLayer]]]) -> None:
    """Give every model the patch wanted; put all back as they were if that fails."""
    before = [_Snapshot(model) for model, _, _ in wanted]
    try:
        for (model, patch, sites), snapshot in zip(wanted, before, strict=True):
            _uninstall(model)
            _install(model, patch, sites, snapshot)
    except BaseException:
        for snapshot in before:
            snapshot.restore()
        raise


def _install(model: torch.nn.Module, patch: ModelPatch, sites: dict[int, AttentionLayer], before: _Snapshot) -> None:
    patch.install(model)
    # A copy of the processor that an older patch had here keeps the attention backend that was set on it.
    ours = {site.attn: p for site, _, p in before.sites if isinstance(p, AgentAttnProcessor)}
    for layer, site in sites.items():
        processor = copy(ours.get(site.attn, AgentAttnProcessor()))
        SitePatch(patch, layer, _original_processor(site)).install(site, processor)


def _kept_processors(model: torch.nn.Module) -> dict[str, Any]:
    """What `fuse_qkv_projections` will give back when undone."""
    return getattr(model, "original_attn_processors", None) or {}


def _uninstall(model: torch.nn.Module) -> None:
    kept = _kept_processors(model)
    for site in patched_layers(model):
        name, original = f"{site.name}.processor", site.attn.agentsd_site.original
        site.attn.agentsd_site.uninstall(site)
        if isinstance(kept.get(name), AgentAttnProcessor):
            kept[name] = original
    patch = current_patch(model)
    if patch is not None:
        patch.uninstall(model)
