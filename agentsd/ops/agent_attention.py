"""
Agent attention: softmax attention through a few agent tokens, after Han et al., *Agent Attention: On the Integration
of Softmax and Linear Attention* (ECCV 2024, arXiv:2312.08874).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


Attend = Callable[..., torch.Tensor]


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    *,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
    agent_bias: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    attend: Attend = F.scaled_dot_product_attention,
) -> torch.Tensor:
    r"""
    Agent attention (arXiv:2312.08874, section 4 and the section on Stable Diffusion).

    The agents gather the values as queries do in softmax attention, then hand them to the queries:
    `O = softmax(Q Aᵀ · s ** k_scale2) · softmax(A Kᵀ · s) · V + k_shortcut · V`, with `s = head_dim ** -0.5`. With
    `A` agents the cost is `8 · N · A · C` operations instead of `4 · N² · C`. Read as feature maps, the two softmaxes
    make it linear attention `φ_q(Q) (φ_k(K)ᵀ V)`.

    Args:
        q (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): Queries.
        k (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): Keys.
        v (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): Values.
        agents (`torch.Tensor` of shape `(batch, heads, agents, head_dim)`):
            Agent tokens, projected like the queries. All four tensors share one floating-point dtype and device.
        k_scale2 (`float`, defaults to `0.3`): Exponent on the softmax scale where the queries read the agents.
        k_shortcut (`float`, defaults to `0.075`): Weight of the value shortcut.
        agent_bias (`torch.Tensor`, *optional*):
            Added to the logits of the agents over the tokens: broadcasts to `(batch, heads, agents, tokens)`.
        query_bias (`torch.Tensor`, *optional*):
            Added to the logits of the queries over the agents: broadcasts to `(batch, heads, tokens, agents)`.
        attend (`Callable`, defaults to `torch.nn.functional.scaled_dot_product_attention`):
            Softmax attention `attend(q, k, v, scale=...)`, used for both products. It gets a bias, where there is one,
            as `attn_mask=`.

    Returns:
        `torch.Tensor` of shape `(batch, heads, tokens, head_dim)`: In the dtype of the inputs.

    Raises:
        ValueError: If the shapes do not match. The value shortcut needs one value per query.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd import agent_attention
    >>> q, k, v = torch.randn(3, 2, 8, 4096, 40).unbind()
    >>> agent_attention(q, k, v, agents=torch.randn(2, 8, 256, 40)).shape
    torch.Size([2, 8, 4096, 40])
    ```
    """
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            "`q`, `k` and `v` must have the same shape, since each token's value is added to its own output, but got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if (*agents.shape[:-2], agents.shape[-1]) != (*q.shape[:-2], q.shape[-1]):
        raise ValueError(
            "`agents` must have the batch, heads and head dimension of `q`, but got shapes "
            f"{tuple(agents.shape)} and {tuple(q.shape)}."
        )
    scale = q.shape[-1] ** -0.5
    gathered = attend(agents, k, v, scale=scale, **_mask(agent_bias))
    out = attend(q, agents, gathered, scale=scale**k_scale2, **_mask(query_bias))
    return torch.add(out, v, alpha=k_shortcut) if k_shortcut else out


def _mask(bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A bias as an argument of `attend`, which need not know masks where there is none."""
    return {} if bias is None else {"attn_mask": bias}
