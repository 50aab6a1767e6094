"""The ways of running a model that are compared, each switched on and off around a call."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention

from ..config import AgentSDConfig, PresetName
from ..patch import patched
from ..processor import AgentAttnProcessor
from ..sites import Site, attended_models, find_sites, unsupported_reason


class MethodUnavailable(RuntimeError):
    """A method cannot run here; the message says why."""


class Method(Protocol):
    """One way of running a model."""

    @property
    def name(self) -> str:
        """What it is called in tables and on the command line."""

    @property
    def has_ratio(self) -> bool:
        """Whether it merges a share of the tokens that one can set."""

    def enter(self, model: Any, ratio: float | None) -> AbstractContextManager[object]:
        """
        Switch the method on for the length of a `with` block.

        Args:
            model (`DiffusionPipeline` or `UNet2DConditionModel`): What to run.
            ratio (`float`, *optional*): Share of tokens to merge; `None` for a method without one.

        Returns:
            A context manager. Entering it raises [`MethodUnavailable`] where the method cannot run, or would silently
            change nothing.
        """


@dataclass(frozen=True)
class Vanilla:
    """
    The model as it is.

    Args:
        name (`str`): Its name.
    """

    name: str = "vanilla"
    has_ratio: bool = False

    def enter(self, model: Any, ratio: float | None) -> AbstractContextManager[object]:
        """See [`Method.enter`]."""
        return nullcontext()


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
    has_ratio: bool = True

    @contextmanager
    def enter(self, model: Any, ratio: float | None) -> Iterator[None]:
        """See [`Method.enter`]."""
        with patched(model, config=AgentSDConfig.preset(self.preset, ratio=ratio)):
            # apply_patch refuses a model without sites; this is about processors that something else took away again.
            if not any(isinstance(site.attn.processor, AgentAttnProcessor) for site in patchable_sites(model)):
                raise MethodUnavailable("agentsd patched no self-attention of this model")
            yield


@dataclass(frozen=True)
class ToMeSD:
    """
    Token merging by its authors' own package.

    Args:
        name (`str`): Its name.
    """

    name: str = "tomesd"
    has_ratio: bool = True

    @contextmanager
    def enter(self, model: Any, ratio: float | None) -> Iterator[None]:
        """See [`Method.enter`]."""
        try:
            import tomesd
        except ImportError as error:
            raise MethodUnavailable("tomesd is not installed: pip install 'agentsd[bench]'") from error
        unet = attended_models(model)[0][1]
        tomesd.apply_patch(unet, ratio=ratio)
        try:
            if not _tomesd_blocks(unet):
                raise MethodUnavailable("tomesd found no transformer block in this model")
            yield
        finally:
            tomesd.remove_patch(unet)
            for module in unet.modules():
                module.__dict__.pop("_tome_info", None)  # tomesd leaves it behind
            if _tomesd_blocks(unet):
                raise RuntimeError("tomesd did not remove its patch: later timings of this model would be wrong.")


def _tomesd_blocks(unet: torch.nn.Module) -> list[torch.nn.Module]:
    # tomesd makes a class of its own for every block, and they have no common base.
    return [module for module in unet.modules() if type(module).__name__ == "ToMeBlock"]


class AttentionFreeProcessor:
    """Answers self-attention with each token's own value: what happens between tokens is left out."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Run the layer.

        Args:
            attn (`Attention`): The layer.
            hidden_states (`torch.Tensor` of shape `(batch, tokens, channels)`): Its input.
            encoder_hidden_states (`torch.Tensor`, *optional*): Not used.
            attention_mask (`torch.Tensor`, *optional*): Not used.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, channels)`: `to_out(to_v(x))`.
        """
        out = attn.to_v(hidden_states)
        for layer in attn.to_out:
            out = layer(out)
        return out


@dataclass(frozen=True)
class AttentionFree:
    """
    No attention at all in the layers that agentsd patches: what savings in attention alone can hardly beat. Its
    pictures are worthless.

    Args:
        name (`str`): Its name.
    """

    name: str = "attention-free"
    has_ratio: bool = False

    @contextmanager
    def enter(self, model: Any, ratio: float | None) -> Iterator[None]:
        """See [`Method.enter`]."""
        sites = patchable_sites(model)
        if not sites:
            raise MethodUnavailable("this model has no self-attention that agentsd would patch")
        with ExitStack() as restore:
            for site in sites:
                restore.callback(site.attn.set_processor, site.attn.processor)
                site.attn.set_processor(AttentionFreeProcessor())
            yield


def patchable_sites(model: Any) -> list[Site]:
    """
    The layers that agentsd patches by default.

    Args:
        model (`DiffusionPipeline` or `UNet2DConditionModel`): A pipeline or model, patched or not.

    Returns:
        `list[Site]`: Layers of the UNet and of ControlNets.
    """
    return [
        site
        for _, attended in attended_models(model)
        for site in find_sites(attended)
        if 2**site.level <= AgentSDConfig().max_downsample
        and (
            isinstance(site.attn.processor, AgentAttnProcessor)
            or unsupported_reason(site.attn, site.attn.processor) is None
        )
    ]


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Vanilla(),
        AgentSD("agentsd", "paper"),
        AgentSD("agentsd-agent", "agent"),
        AgentSD("agentsd-tome", "tome"),
        ToMeSD(),
        AttentionFree(),
    )
}
