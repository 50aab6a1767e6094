"""ToDo: attention to down-sampled tokens."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0


class DownsampledProcessor:
    """
    Every token attends to one token of each 2×2 cell: keys and values are down-sampled, queries are not.

    Source: E. Smith, N. Saxena, A. Saha: *ToDo: Token Downsampling for Efficient Generation of High-Resolution
    Images* (2024), [arXiv:2402.13573](https://arxiv.org/abs/2402.13573), with nearest-neighbour down-sampling.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self._standard = AttnProcessor2_0()

    def note_size(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember height and width of what the layer's `Transformer2DModel` was given; a forward pre-hook for it."""
        grid = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.size = (grid.shape[-2], grid.shape[-1])

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
            `torch.Tensor` of shape `(batch, tokens, channels)`: The layer's output.
        """
        assert self.size is not None
        kept = hidden_states.unflatten(1, self.size)[:, ::2, ::2].flatten(1, 2)
        return self._standard(attn, hidden_states, encoder_hidden_states=kept)
