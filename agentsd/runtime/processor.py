"""The attention processor that a patched self-attention layer runs."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from ..models.unet import inner_hooks
from ..ops.agent_attention import Attend
from ..ops.merging import merge_tokens, unmerge_tokens
from .fallbacks import MASK, OTHER_KEYS, PERTURBED
from .state import LayerState, Part, join


class AgentAttnProcessor:
    """
    Attention processor of a patched layer: attends over merged tokens, in the way of the phase.

    It holds no state, so it can be created again without arguments, as `load_ip_adapter` does: all it needs is kept on
    the attention module, where [`apply_patch`] puts it. On a module that is not patched, or where keys come from
    elsewhere or an attention mask is given, it is standard attention.

    Examples:

    ```python
    >>> import torch
    >>> from diffusers.models.attention_processor import Attention
    >>> from agentsd import AgentAttnProcessor
    >>> attn, x = Attention(query_dim=8), torch.randn(1, 16, 8)
    >>> before = attn(x)
    >>> attn.set_processor(AgentAttnProcessor())
    >>> torch.equal(attn(x), before)
    True
    ```
    """

    # Set by `ModelMixin.set_attention_backend` and `enable_parallelism` on processors that have them.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Compute the layer's output, as every attention processor does.

        Args:
            attn (`Attention`): The layer.
            hidden_states (`torch.Tensor` of shape `(batch, tokens, channels)`): Its input.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, keys, channels)`, *optional*):
                What keys and values come from; with it, this is standard attention.
            attention_mask (`torch.Tensor`, *optional*): With it, too.
            temb (`torch.Tensor`, *optional*): Time embedding, for the layer's original processor.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, channels)`: The output, in the input's dtype.
        """
        state: LayerState | None = getattr(attn, "agentsd_layer", None)
        original = AttnProcessor2_0() if state is None else state.original
        parts = None
        if state is not None:
            parts, state.fallbacks.attn1 = _parts(attn, state, hidden_states, encoder_hidden_states, attention_mask)
        if state is None or parts is None:
            # Sliced attention knows no `temb`, which no transformer block passes to its self-attention.
            more = () if temb is None else (temb,)
            return original(attn, hidden_states, encoder_hidden_states, attention_mask, *more)
        softmax = partial(self._softmax_attention, in_fp32=state.in_fp32)
        outputs = []
        for part in parts:
            x = part.take(hidden_states)
            outputs.append(original(attn, x) if part.is_plain else _attend(attn, x, part, softmax))
        return join(outputs, parts)

    def _softmax_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        in_fp32: bool,
        scale: float | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Softmax attention on `(batch, heads, tokens, head_dim)` by the attention backend chosen for this layer."""
        dtype, device = v.dtype, v.device.type
        if in_fp32:
            q, k, v = q.float(), k.float(), v.float()
        attn_mask = None if attn_mask is None else attn_mask.to(q.dtype)
        # Without this, an outer autocast, which not every kind of device has, would take them back to half precision.
        has_autocast = in_fp32 and torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            if self._attention_backend is None and self._parallel_config is None:
                # As in a UNet without a patch. What diffusers has for a default is the backend set last for any model;
                # some switch the kernels of the whole process and back, which threads get mixed up.
                return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale).to(dtype)
            operands = [x.transpose(1, 2) for x in (q, k, v)]
            out = dispatch_attention_fn(
                *operands,
                attn_mask=attn_mask,
                scale=scale,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
            return out.transpose(1, 2).to(dtype)


def _parts(
    attn: Attention,
    state: LayerState,
    x: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> tuple[list[Part] | None, str | None]:
    """What to merge in a layer's input; if nothing, the reason, unless that is as configured."""
    if not state.reduces_attention:
        return None, None
    if attention_mask is not None:
        return None, MASK
    if encoder_hidden_states is not None:
        return None, OTHER_KEYS
    if _is_perturbed(attn):
        return None, PERTURBED
    return state.parts_of(x)


def _attend(attn: Attention, x: torch.Tensor, part: Part, softmax: Attend) -> torch.Tensor:
    """Attention over fewer tokens than those of `x`, in the way of the part's phase."""
    keys, operator = part.keys, part.phase.operator
    merged = x if part.merging is None else merge_tokens(x, part.merging)
    source = merged if keys is None else keys.reduce(x, part.size, part.match)
    q = split_heads(attn.to_q(merged), attn.heads)
    k, v = (split_heads(to(source), attn.heads) for to in (attn.to_k, attn.to_v))
    sources = 0 if part.match is None else part.match.sources
    if operator is not None and part.match is not None and operator.pays(x.shape[1], sources, merged.shape[1]):
        out = operator.attend(attn, x, q, k, v, part.match, softmax)
    else:
        bias = None if keys is None else keys.bias(part.match)
        out = softmax(q, k, v) if bias is None else softmax(q, k, v, attn_mask=bias[:, None, None])
    out = out.transpose(1, 2).flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out if part.merging is None else unmerge_tokens(out, part.merging)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`(batch, tokens, channels)` as `(batch, heads, tokens, head_dim)`."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _is_perturbed(attn: Attention) -> bool:
    """Whether guidance works on this layer's attention just now, which it expects over all tokens of an image."""
    # Perturbed attention guidance replaces the scores by the identity, smoothed energy guidance blurs the queries.
    replaces_scores = any(getattr(hook, "skip_attention_scores", False) for hook in inner_hooks(attn))
    return replaces_scores or any(type(h).__name__ == "SmoothedEnergyGuidanceHook" for h in inner_hooks(attn.to_q))


# Layer skip looks up what to return for a processor that it leaves out: the same as for the standard one.
AttentionProcessorRegistry.register(AgentAttnProcessor, AttentionProcessorRegistry.get(AttnProcessor2_0))
