"""The packages of others that are compared: small adapters that switch one on in a copy of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from ..config import AgentSDConfig
from ..models.unet import attended_models, find_layers
from ..utils.libraries import how_to_install
from .schedule import call_timesteps


# Options of this library that mean the same to tomesd.
_SHARED_WITH_TOMESD = ("sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")


class MethodUnavailable(RuntimeError):
    """A method cannot run here; the message says why."""


@dataclass(frozen=True)
class ToMeSD:
    """Token merging by its authors' own package."""

    name: str = "tomesd"
    has_ratio: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = False
    needs_generation: ClassVar[bool] = False

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        try:
            import tomesd
        except ImportError as error:
            raise _not_installed("tomesd") from error
        unet = attended_models(model)[0][1]
        layers = find_layers(unet)
        if not layers:
            raise MethodUnavailable("tomesd found no transformer block in this model")
        shared = {name: options[name] for name in _SHARED_WITH_TOMESD if name in options}
        # tomesd counts from the model's input: the layers that agentsd patches by default lie deeper in SDXL, where it
        # would merge nothing, in silence.
        first = 2 ** min(layer.depth for layer in layers)
        lowest = first * options.get("max_downsample", AgentSDConfig.max_downsample)
        tomesd.apply_patch(unet, ratio=ratio, max_downsample=lowest, **shared)


@dataclass(frozen=True)
class DeepCache:
    """
    Features of the inner blocks kept for some steps (X. Ma et al., CVPR 2024), by its authors' own package.

    The whole UNet runs in one step of `interval`, in their examples three, and its outermost blocks in between.
    """

    name: str = "deepcache"
    interval: int = 3
    has_ratio: ClassVar[bool] = False
    needs_steps: ClassVar[bool] = True
    needs_generation: ClassVar[bool] = False

    def apply(self, model: Any, ratio: float | None, options: Mapping[str, Any]) -> None:
        """See [`Method.apply`]."""
        try:
            from DeepCache import DeepCacheSDHelper
        except ImportError as error:
            raise _not_installed("DeepCache") from error
        pipe = model
        if isinstance(model, torch.nn.Module):
            # It reads nothing else of a pipeline.
            scheduler = SimpleNamespace(timesteps=call_timesteps(next(model.parameters()).device))
            pipe = SimpleNamespace(unet=model, scheduler=scheduler)
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=self.interval, cache_branch_id=0)
        helper.enable()


@dataclass(frozen=True)
class HiDiffusion:
    """Resolution-aware UNet and windowed attention (S. Zhang et al., ECCV 2024), by its authors' own package."""

    name: str = "hidiffusion"
    has_ratio: ClassVar[bool] = False
    needs_steps: ClassVar[bool] = False
    needs_generation: ClassVar[bool] = True

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


def reseed(model: Any, seed: int) -> None:
    """Restart the random numbers of tomesd, the only method with any, so that no image depends on those before it."""
    unet = attended_models(model)[0][1]
    info = getattr(unet, "_tome_info", None)
    if info is not None:
        info["args"]["generator"] = torch.Generator(next(unet.parameters()).device).manual_seed(seed)


def _not_installed(package: str) -> MethodUnavailable:
    return MethodUnavailable(f"{package} is not installed: {how_to_install('bench')}")
