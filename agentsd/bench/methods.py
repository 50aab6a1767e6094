"""The ways of running a model that are compared: small adapters that switch a method on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import AttnProcessor

from ..config import AgentSDConfig, PresetName
from ..models.unet import AttentionLayer, attended_models, find_layers, unsupported_reason
from ..patch import apply_patch
from ..runtime.processor import AgentAttnProcessor
from ..utils.libraries import how_to_install
from .attention_free import AttentionFreeProcessor
from .todo import DownsampledProcessor


BASELINE = "baseline"
# DeepCache's own choice in its examples: the whole UNet every third step, its outermost blocks in between.
_CACHE_INTERVAL = 3
# Options of this library that mean the same to tomesd.
_SHARED_WITH_TOMESD = ("sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")


class MethodUnavailable(RuntimeError):
    """A method cannot run here; the message says why."""


class Method(Protocol):
    """
    One way of running a model.

    Examples:

    ```python
    >>> from agentsd.bench import METHODS
    >>> [name for name, method in METHODS.items() if method.needs_generation]
    ['agentsd', 'deepcache', 'agentsd+deepcache', 'hidiffusion', 'fewer-steps']
    ```
    """

    @property
    def name(self) -> str:
        """What it is called in tables and on the command line."""

    @property
    def has_ratio(self) -> bool:
        """Whether it depends on the share of tokens to merge."""

    @property
    def needs_generation(self) -> bool:
        """Whether it shows only over the steps of a generation, not in a single call of a UNet."""

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """
        Switch the method on, for good: it is given a copy that nothing else uses.

        Args:
            model (`DiffusionPipeline` or `UNet2DConditionModel`): What to run.
            ratio (`float`, *optional*): Share of tokens to merge; `None` for a method without one.
            options (`Mapping[str, Any]`):
                Fields of [`AgentSDConfig`], for the methods of this library and what others share with them.

        Raises:
            MethodUnavailable: If the method cannot run, or would silently change nothing.
        """


@dataclass(frozen=True)
class Baseline:
    """
    The model as it is.

    Args:
        name (`str`): Its name.
    """

    name: str = BASELINE
    has_ratio: bool = field(default=False, init=False)
    needs_generation: bool = field(default=False, init=False)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""


@dataclass(frozen=True)
class FewerSteps(Baseline):
    """
    The model as it is, with as many steps as fit in the time that another method takes for all of its own.

    Args:
        name (`str`): Its name.
        reference (`str`): The name of the other method.
    """

    name: str = "fewer-steps"
    reference: str = "agentsd"
    has_ratio: bool = field(default=True, init=False)
    needs_generation: bool = field(default=True, init=False)


@dataclass(frozen=True)
class AgentSD:
    """
    This library.

    Args:
        name (`str`): Its name.
        preset (`str`): The preset of [`AgentSDConfig`] that it runs.
    """

    name: str
    preset: PresetName
    has_ratio: bool = field(default=True, init=False)

    @property
    def needs_generation(self) -> bool:
        """See [`Method.needs_generation`]."""
        return self.preset == "paper"

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        apply_patch(model, config=AgentSDConfig.preset(self.preset, ratio=ratio, **options))


@dataclass(frozen=True)
class ToMeSD:
    """
    Token merging by its authors' own package.

    Args:
        name (`str`): Its name.
    """

    name: str = "tomesd"
    has_ratio: bool = field(default=True, init=False)
    needs_generation: bool = field(default=False, init=False)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        try:
            import tomesd
        except ImportError as error:
            raise _not_installed("tomesd") from error
        unet = attended_models(model)[0][1]
        sites = find_layers(unet)
        if not sites:
            raise MethodUnavailable("tomesd found no transformer block in this model")
        shared = {name: options[name] for name in _SHARED_WITH_TOMESD if name in options}
        # tomesd counts from the model's input: the layers that agentsd patches by default lie deeper in SDXL, where it
        # would merge nothing, in silence.
        first = 2 ** min(site.depth for site in sites)
        tomesd.apply_patch(unet, ratio=ratio, max_downsample=first * _max_downsample(options), **shared)


@dataclass(frozen=True)
class DeepCache:
    """
    Features of the inner blocks kept for some steps (X. Ma, G. Fang, X. Wang, CVPR 2024), by its authors' own package.

    Args:
        name (`str`): Its name.
    """

    name: str = "deepcache"
    has_ratio: bool = field(default=False, init=False)
    needs_generation: bool = field(default=True, init=False)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        try:
            from DeepCache import DeepCacheSDHelper
        except ImportError as error:
            raise _not_installed("DeepCache") from error
        helper = DeepCacheSDHelper(pipe=model)
        helper.set_params(cache_interval=_CACHE_INTERVAL, cache_branch_id=0)
        helper.enable()


@dataclass(frozen=True)
class HiDiffusion:
    """
    Resolution-aware UNet and windowed attention (S. Zhang et al., ECCV 2024), by its authors' own package.

    Args:
        name (`str`): Its name.
    """

    name: str = "hidiffusion"
    has_ratio: bool = field(default=False, init=False)
    needs_generation: bool = field(default=True, init=False)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        try:
            from hidiffusion import apply_hidiffusion
        except ModuleNotFoundError as error:
            if error.name == "hidiffusion":
                raise _not_installed("hidiffusion") from error
            raise MethodUnavailable(f"hidiffusion does not run with this diffusers: {error}") from error
        try:
            apply_hidiffusion(model)
        except Exception as error:  # the package raises plain `Exception` for a model that it does not know
            raise MethodUnavailable(f"hidiffusion does not take this model: {error}") from error


@dataclass(frozen=True)
class Combined:
    """
    Several methods at once.

    Args:
        name (`str`): Its name.
        parts (`tuple[Method, ...]`): The methods, in the order in which they are switched on.
    """

    name: str
    parts: tuple[Method, ...]

    @property
    def has_ratio(self) -> bool:
        """See [`Method.has_ratio`]."""
        return any(part.has_ratio for part in self.parts)

    @property
    def needs_generation(self) -> bool:
        """See [`Method.needs_generation`]."""
        return any(part.needs_generation for part in self.parts)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        for part in self.parts:
            part.apply(model, ratio, options)


@dataclass(frozen=True)
class OtherProcessor:
    """
    Another attention processor in the layers that agentsd patches.

    Args:
        name (`str`): Its name.
        processor (`type`): Class of the processor; each layer gets its own.
    """

    name: str
    processor: type
    has_ratio: bool = field(default=False, init=False)
    needs_generation: bool = field(default=False, init=False)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        sites = patchable_layers(model, options)
        if not sites:
            raise MethodUnavailable("this model has no self-attention that agentsd would patch")
        for site in sites:
            processor = self.processor()
            if hasattr(processor, "note_size"):
                site.transformer.register_forward_pre_hook(processor.note_size, with_kwargs=True)
            site.attn.set_processor(processor)


@dataclass(frozen=True)
class NaiveAttention:
    """
    Attention that writes its whole matrix to memory, in all layers: what the papers on token merging measured against.

    Args:
        name (`str`): Its name.
    """

    name: str = "baseline-naive"
    has_ratio: bool = field(default=False, init=False)
    needs_generation: bool = field(default=False, init=False)

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        unet: Any = attended_models(model)[0][1]
        unet.set_attn_processor(AttnProcessor())


def reseed(model: Any, seed: int) -> None:
    """
    Restart the random numbers of a method, so that an image does not depend on those drawn before it.

    tomesd uses one generator from image to image; no other method has random state.

    Args:
        model (`DiffusionPipeline` or `UNet2DConditionModel`): A model with a method on.
        seed (`int`): The image's seed.
    """
    unet = attended_models(model)[0][1]
    info = getattr(unet, "_tome_info", None)
    if info is not None:
        info["args"]["generator"] = torch.Generator(next(unet.parameters()).device).manual_seed(seed)


def patchable_layers(model: Any, options: Mapping[str, Any]) -> list[AttentionLayer]:
    """
    The layers that agentsd patches.

    Args:
        model (`DiffusionPipeline` or `UNet2DConditionModel`): A pipeline or model, patched or not.
        options (`Mapping[str, Any]`): Fields of [`AgentSDConfig`], of which `max_downsample` matters.

    Returns:
        `list[AttentionLayer]`: Layers of the UNet and of ControlNets.
    """
    return [
        site
        for _, attended in attended_models(model)
        for site in find_layers(attended)
        if 2**site.level <= _max_downsample(options)
        and (
            isinstance(site.attn.processor, AgentAttnProcessor)
            or unsupported_reason(site.attn, site.attn.processor) is None
        )
    ]


def _max_downsample(options: Mapping[str, Any]) -> int:
    return options.get("max_downsample", AgentSDConfig().max_downsample)


def _not_installed(package: str) -> MethodUnavailable:
    return MethodUnavailable(f"{package} is not installed: {how_to_install('bench')}")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Baseline(),
        NaiveAttention(),
        AgentSD("agentsd", "paper"),
        AgentSD("agentsd-agent", "agent"),
        AgentSD("agentsd-tome", "tome"),
        ToMeSD(),
        OtherProcessor("todo", DownsampledProcessor),
        DeepCache(),
        Combined("agentsd+deepcache", (AgentSD("agentsd", "paper"), DeepCache())),
        HiDiffusion(),
        FewerSteps(),
        OtherProcessor("attention-free", AttentionFreeProcessor),
    )
}
