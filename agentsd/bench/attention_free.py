"""The attention-free reference: what a model costs when attention in the patched layers costs nothing."""

import torch
from diffusers.models.attention_processor import Attention


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
