"""Finds the layers of a diffusion model that agentsd can patch, with their level and name."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from .other_packages import package_of_processor


# Where `torch.compile` and AnimateDiff's split inference keep the module that they wrap.
_WRAPPERS = re.compile(r"\.(?:_orig_mod|module)(?=\.)")
_STAGE = re.compile(r"^(?:(down_blocks|up_blocks)\.(\d+)|mid_block)\.")


@dataclass(frozen=True)
class AttentionLayer:
    """
    A self-attention layer that can be patched.

    Args:
        number (`int`): Its number among those of its model.
        name (`str`): Name of the attention module in its model.
        level (`int`): Down-samplings between the highest resolution that has attention and this layer.
        depth (`int`): Down-samplings between the model's input and this layer.
        transformer (`Transformer2DModel`): The module that knows the layer's height and width.
        block (`BasicTransformerBlock`): The block whose input is the metric of the matching.
        attn (`Attention`): The self-attention itself.
    """

    number: int
    name: str
    level: int
    depth: int
    transformer: Transformer2DModel
    block: BasicTransformerBlock
    attn: Attention

    @property
    def stage(self) -> str:
        """The down block, up block or middle block that holds the layer."""
        stage = _STAGE.match(self.name)
        assert stage is not None  # without one, nothing tells its depth
        return stage[0]


def unwrap(model: Any) -> Any:
    """The module under `torch.compile`."""
    return getattr(model, "_orig_mod", model)


def attended_models(pipe_or_unet: Any) -> list[tuple[str, torch.nn.Module]]:
    """The models that are patched together, with their names: the UNet and, of a pipeline, its ControlNets."""
    if isinstance(pipe_or_unet, (MultiControlNetModel, MultiControlNetUnionModel)):
        return _controlnets(pipe_or_unet)
    if isinstance(pipe_or_unet, torch.nn.Module):
        return [("unet", unwrap(pipe_or_unet))]
    unet = unwrap(getattr(pipe_or_unet, "unet", None))
    if not isinstance(unet, torch.nn.Module):
        kind = type(pipe_or_unet).__name__
        if isinstance(getattr(pipe_or_unet, "transformer", None), torch.nn.Module):
            raise TypeError(
                f"{kind} has a transformer instead of a UNet. agentsd does not support transformer models such as "
                "Stable Diffusion 3 and Flux yet."
            )
        raise TypeError(f"Expected a diffusers pipeline with a UNet, or a UNet, but got {kind}.")
    models = [("unet", unet)]
    controlnet = unwrap(getattr(pipe_or_unet, "controlnet", None))
    # ControlNet-XS has its layers in the UNet, and the adapter that they were made from does not run.
    if isinstance(controlnet, torch.nn.Module) and not isinstance(controlnet, ControlNetXSAdapter):
        models += _controlnets(controlnet)
    return models


def _controlnets(controlnet: Any) -> list[tuple[str, torch.nn.Module]]:
    """One model, or those that a MultiControlNetModel holds."""
    nets = [unwrap(net) for net in getattr(controlnet, "nets", [controlnet])]
    return [("controlnet" if len(nets) == 1 else f"controlnet.{i}", net) for i, net in enumerate(nets)]


def find_layers(model: torch.nn.Module) -> list[AttentionLayer]:
    """
    All self-attention layers of a model's `Transformer2DModel`s, in the order of its modules.

    Motion modules and GLIGEN's fusers are not among them.
    """
    found = []
    for transformer_name, transformer in model.named_modules():
        if not isinstance(transformer, Transformer2DModel) or not transformer.is_input_continuous:
            continue
        depth = _depth(model, transformer_name)
        if depth is None:
            continue
        for name, block in transformer.named_modules(prefix=transformer_name):
            if isinstance(block, BasicTransformerBlock) and not block.only_cross_attention:
                found.append((f"{name}.attn1", depth, transformer, block))
    top = min((depth for _, depth, _, _ in found), default=0)
    return [
        AttentionLayer(number, name, depth - top, depth, transformer, block, block.attn1)
        for number, (name, depth, transformer, block) in enumerate(found)
    ]


def block_layers(block: Any) -> int:
    """Layers of an up or down block."""
    return len(block.resnets)


def layer_modules(block: Any, number: int) -> list[torch.nn.Module]:
    """The modules of one layer of a block, in the order in which they run."""
    lists = [getattr(block, name, None) for name in ("resnets", "attentions", "motion_modules")]
    return [modules[number] for modules in lists if modules is not None]


def plain_name(name: str) -> str:
    """A layer's name as it was before `torch.compile` or split inference wrapped the modules that hold it."""
    return _WRAPPERS.sub("", name)


def _depth(model: Any, name: str) -> int | None:
    """Down-samplings above a module, read from the stage its name lies in."""
    stage = _STAGE.match(name)
    if stage is None:
        return None
    if stage[1] is None:
        return len(model.down_blocks) - 1
    return int(stage[2]) if stage[1] == "down_blocks" else len(model.up_blocks) - 1 - int(stage[2])


def inner_hooks(module: torch.nn.Module) -> list[Any]:
    """What diffusers has put into a module's forward: caches, guidance, offloading."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def unsupported_reason(attn: Attention, processor: Any) -> str | None:
    """Why a self-attention layer with this processor has to be left alone; `None` if it can be patched."""
    package = package_of_processor(processor)
    if package is not None:
        return package.does
    if type(processor).__name__ not in _STANDARD_PROCESSORS:
        return f"its processor {type(processor).__name__} does more than plain attention"
    if any(getattr(attn, part, None) is not None for part in ("group_norm", "spatial_norm", "norm_q", "norm_k")):
        return "it normalises its input or its queries and keys"
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "it adds its input to its output, or rescales its output"
    return None


# Processors that compute plain softmax attention, each in another way. By name, as some exist only in some versions.
_STANDARD_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
}
