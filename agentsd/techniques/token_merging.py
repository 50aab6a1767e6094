"""
Token merging: a block's layers run on fewer tokens (Bolya & Hoffman, *Token Merging for Fast Stable Diffusion*,
arXiv:2303.17604).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..models.unet import AttentionLayer, inner_hooks
from ..ops.merging import merge_tokens, unmerge_tokens
from ..runtime.checks import check_switch, keep_number
from ..runtime.fallbacks import CACHED, MIXED
from ..runtime.state import LayerState, Part, join
from ..runtime.steps import Phase


@dataclass(frozen=True)
class TokenMergingConfig:
    """
    Configuration of token merging.

    Args:
        ratio (`float`, defaults to `0.4`): Share of all tokens that is merged away, in `[0, 1)`.
        merge_attn (`bool`, defaults to `True`): Merge tokens in self-attention.
        merge_crossattn (`bool`, defaults to `False`): Merge the queries of cross-attention as well.
        merge_mlp (`bool`, defaults to `False`): Merge tokens in the feed-forward layer as well.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.

    Examples:

    ```python
    >>> from agentsd.techniques.token_merging import TokenMergingConfig
    >>> TokenMergingConfig(ratio=0.5).merge_mlp
    False
    ```
    """

    ratio: float = 0.4
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False

    def __post_init__(self) -> None:
        keep_number(self, "ratio", low=0, high=1, high_open=True)
        for name in ("merge_attn", "merge_crossattn", "merge_mlp"):
            check_switch(self, name)


@dataclass(frozen=True)
class TokenMerging:
    """What token merging does in a block. Self-attention merges in its processor, the other layers by hooks."""

    config: TokenMergingConfig
    where: tuple[bool, bool, bool] = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        object.__setattr__(self, "where", (config.merge_attn, config.merge_crossattn, config.merge_mlp))

    @property
    def merge_attn(self) -> bool:
        """Whether tokens are merged in self-attention."""
        return self.config.merge_attn

    @property
    def merges(self) -> bool:
        """Whether tokens are merged anywhere."""
        # All three together: compiled code does not notice that hooks were put in or taken out, but it does notice
        # another value here.
        return self.where != (False, False, False) and self.config.ratio > 0

    def removed(self, tokens: int, sources: int) -> int:
        """How many tokens are merged away."""
        return min(int(tokens * self.config.ratio), sources) if self.merges else 0

    def hook(self, layer: AttentionLayer, state: LayerState) -> list[RemovableHandle]:
        """Merge and unmerge around cross-attention and feed-forward, where that is asked for."""
        parts = {"attn2": self.config.merge_crossattn and layer.block.attn2 is not None, "ff": self.config.merge_mlp}
        handles = []
        for part in [name for name, is_merged in parts.items() if is_merged]:
            module, hook = getattr(layer.block, part), MergedLayerHook(state, self, part)
            handles.append(module.register_forward_pre_hook(hook.before_layer, with_kwargs=True))
            handles.append(module.register_forward_hook(hook.after_layer, always_call=True))
        return handles


class MergedLayerHook:
    """
    Merges the tokens that enter a layer and unmerges those that leave it.

    Args:
        state (`LayerState`): The state of the block's patched layer.
        merging (`TokenMerging`): What merges.
        part (`str`): The layer's name in the block, `"attn2"` or `"ff"`.
    """

    def __init__(self, state: LayerState, merging: TokenMerging, part: str):
        self.state = state
        self.merging = merging
        self.part = part

    def before_layer(self, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Merge the layer's input."""
        call = self.state.call
        call.entered = None
        if not self.merging.merges:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        parts, reason = self._parts(layer, x)
        setattr(self.state.fallbacks, self.part, reason)
        if parts is None:
            return None
        if kwargs.get("ip_adapter_masks") is not None:
            raise ValueError(
                "`merge_crossattn` cannot be combined with IP-Adapter masks, which apply to unmerged tokens. "
                "Call `agentsd.apply_patch` with `merge_crossattn=False`."
            )
        # What comes out must be unmerged as what goes in is merged.
        call.entered = parts
        merged = join([merge_tokens(part.take(x), part.merging) for part in parts if part.merging], parts)
        return ((merged, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": merged})

    def _parts(self, layer: torch.nn.Module, x: torch.Tensor) -> tuple[list[Part] | None, str | None]:
        """What to merge in the layer's input, or why nothing is."""
        parts, reason = self.state.parts_of(x)
        if parts is None:
            return None, reason
        # A layer takes one tensor: samples in different phases only fit into it if as many tokens are left of each.
        sizes = {part.merging and part.merging.members.shape[1] for part in parts}
        if len(sizes) > 1:
            return None, MIXED
        if None in sizes:  # the phase has fewer keys instead
            return None, None
        # A cache inside the layer gives back what an older step computed, in that step's order of tokens.
        if any(hook._is_stateful for hook in inner_hooks(layer)):
            return None, CACHED
        return parts, None

    def after_layer(self, layer: torch.nn.Module, args: tuple, output: torch.Tensor | None) -> torch.Tensor | None:
        """Unmerge the layer's output."""
        call = self.state.call
        parts, call.entered = call.entered, None
        # There is no output after an exception.
        if parts is None or output is None:
            return None
        return join([unmerge_tokens(part.take(output), part.merging) for part in parts if part.merging], parts)


def apply_token_merging(phase: Phase, config: TokenMergingConfig) -> Phase:
    """Let blocks run on merged tokens during a phase."""
    return phase.with_role("tokens", TokenMerging(config))
