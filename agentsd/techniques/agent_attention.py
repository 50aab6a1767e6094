"""
Agent attention in place of softmax attention: agents are formed by merging the layer's tokens further than it merges
them for itself (Han et al., ECCV 2024, arXiv:2312.08874, the section on Stable Diffusion).
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..ops.agent_attention import Attend, agent_attention
from ..ops.merging import Merging, merge_tokens
from ..runtime.checks import keep_number
from ..runtime.processor import split_heads
from ..runtime.steps import Match, Phase


@dataclass(frozen=True)
class AgentAttentionConfig:
    """
    Configuration of agent attention.

    Args:
        agent_ratio (`float`, defaults to `0.95`):
            Share of all tokens, in `[0, 1]`, that is merged away to leave the agent tokens.
        k_scale2 (`float`, defaults to `0.3`):
            Exponent on the softmax scale of the query–agent product (`s` becomes `s ** k_scale2`).
        k_shortcut (`float`, defaults to `0.075`): Weight of the value shortcut added to agent attention.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.

    Examples:

    ```python
    >>> from agentsd.techniques.agent_attention import AgentAttentionConfig
    >>> AgentAttentionConfig(agent_ratio=0.9).k_scale2
    0.3
    ```
    """

    agent_ratio: float = 0.95
    k_scale2: float = 0.3
    k_shortcut: float = 0.075

    def __post_init__(self) -> None:
        keep_number(self, "agent_ratio", low=0, high=1)
        keep_number(self, "k_scale2")
        keep_number(self, "k_shortcut")


@dataclass(frozen=True)
class AgentAttention:
    """What agent attention does in a layer: the operator of a phase."""

    config: AgentAttentionConfig

    def removed(self, tokens: int, sources: int) -> int:
        """How many tokens are merged away to leave the agents."""
        return min(int(tokens * self.config.agent_ratio), sources)

    def pays(self, tokens: int, sources: int, merged: int) -> bool:
        """Two products with the agents only pay where they are cheaper than one over the merged tokens."""
        return (tokens - self.removed(tokens, sources)) * 2 < merged

    def agents(self, match: Match) -> Merging:
        """The merging that leaves the agents."""
        return match.merging("operator", self.removed(match.tokens, match.sources))

    def attend(
        self,
        attn: Any,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        match: Match,
        softmax: Attend,
    ) -> torch.Tensor:
        """
        Attend through the agents.

        Args:
            attn (`Attention`): The layer.
            x (`torch.Tensor` of shape `(batch, tokens, channels)`): Its input, before merging.
            q (`torch.Tensor` of shape `(batch, heads, merged, head_dim)`): Queries.
            k (`torch.Tensor` of shape `(batch, heads, merged, head_dim)`): Keys.
            v (`torch.Tensor` of shape `(batch, heads, merged, head_dim)`): Values.
            match (`Match`): The matching of the block's tokens.
            softmax (`Callable`): Softmax attention, with the layer's backend and precision.

        Returns:
            `torch.Tensor` of shape `(batch, heads, merged, head_dim)`: The output, before the output projection.
        """
        agents = split_heads(attn.to_q(merge_tokens(x, self.agents(match))), attn.heads)
        config = self.config
        return agent_attention(q, k, v, agents, k_scale2=config.k_scale2, k_shortcut=config.k_shortcut, attend=softmax)


def apply_agent_attention(phase: Phase, config: AgentAttentionConfig) -> Phase:
    """Let layers attend through agents during a phase."""
    return phase.with_role("operator", AgentAttention(config))
