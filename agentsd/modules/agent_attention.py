"""
The agent attention module of vision Transformers, after Han et al., *Agent Attention: On the Integration of Softmax
and Linear Attention* (ECCV 2024, arXiv:2312.08874, sections 4.1 and 4.2).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.agent_attention import agent_attention


# The grid that the block part of both biases is learnt on, whatever the grid of the tokens.
BLOCK_GRID = (7, 7)


class AgentAttention(nn.Module):
    r"""
    Self-attention of a vision Transformer through agents, as a layer to train with (arXiv:2312.08874, section 4.2).

    The agents `A` are the queries, averaged over the cells of a coarse grid. They gather the values and hand them to
    the queries: `O = softmax(Q Aᵀ · s + B₂) · softmax(A Kᵀ · s + B₁) · V + DWC(V)`, with `s = head_dim ** -0.5`. Each
    bias `B` is the sum of a block part, learnt on a grid of 7×7, and of a part for rows and one for columns, all
    interpolated to the grid of the tokens. `DWC`, a depth-wise 3×3 convolution, gives neighbours back the differences
    that few agents cannot carry. The cost grows linearly with the tokens.

    Parameters are named and shaped as in the authors' DeiT models, and `qkv` and `proj` as in those of `timm`, whose
    `block.attn` this replaces.

    Args:
        dim (`int`): Channels of the tokens, a multiple of `num_heads`.
        num_heads (`int`, defaults to `8`): Heads.
        agent_size (`tuple[int, int]`, defaults to `(7, 7)`): Rows and columns of agents.
        grid_size (`tuple[int, int]`, defaults to `(14, 14)`):
            Rows and columns of tokens that the row and column parts of the biases are learnt for. Any other grid gets
            them interpolated.
        class_token (`bool`, defaults to `False`):
            Whether the first token is a class token, which is on no grid. It has biases of its own; agents and the
            convolution leave it out.
        qkv_bias (`bool`, defaults to `False`): Whether queries, keys and values have an additive bias.
        attn_drop (`float`, defaults to `0.0`): Dropout of both softmaxes.
        proj_drop (`float`, defaults to `0.0`): Dropout of the output.

    Raises:
        ValueError: If `dim` is no multiple of `num_heads`, or a size is not two positive integers.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd import AgentAttention
    >>> attn = AgentAttention(dim=192, num_heads=3)
    >>> attn(torch.randn(2, 14 * 14, 192)).shape
    torch.Size([2, 196, 192])
    >>> attn(torch.randn(2, 20 * 30, 192), size=(20, 30)).shape
    torch.Size([2, 600, 192])
    ```
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        agent_size: tuple[int, int] = (7, 7),
        grid_size: tuple[int, int] = (14, 14),
        class_token: bool = False,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"`dim` must be a multiple of `num_heads`, but got {dim!r} and {num_heads!r}.")
        self.dim, self.num_heads, self.class_token = dim, num_heads, class_token
        self.agent_size = _pair("agent_size", agent_size)
        self.grid_size = rows, columns = _pair("grid_size", grid_size)
        agents = self.agent_size[0] * self.agent_size[1]

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        # B₁, of the agents over the tokens (n), and B₂, of the tokens over the agents: block, rows (h), columns (w).
        self.an_bias = _bias(num_heads, agents, *BLOCK_GRID)
        self.ah_bias = _bias(1, num_heads, agents, rows, 1)
        self.aw_bias = _bias(1, num_heads, agents, 1, columns)
        self.na_bias = _bias(num_heads, agents, *BLOCK_GRID)
        self.ha_bias = _bias(1, num_heads, rows, 1, agents)
        self.wa_bias = _bias(1, num_heads, 1, columns, agents)
        if class_token:
            self.ac_bias = _bias(1, num_heads, agents, 1)
            self.ca_bias = _bias(1, num_heads, 1, agents)

    def forward(
        self,
        x: torch.Tensor,
        size: tuple[int, int] | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """
        Attend.

        Args:
            x (`torch.Tensor` of shape `(batch, tokens, dim)`):
                Tokens, the rows of their grid one after the other, behind the class token if there is one.
            size (`tuple[int, int]`, *optional*): Rows and columns of the grid. It is a square by default.
            attn_mask (`torch.Tensor`, *optional*): Must be `None`, which is what blocks of `timm` pass.
            is_causal (`bool`, defaults to `False`): Must be `False`, likewise.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, dim)`: The output.

        Raises:
            ValueError: If `x` has another shape, its tokens do not fill the grid, or a mask is given.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("Agent attention takes no mask: every agent is an average over tokens.")
        size = self._grid_of(x, size)
        q, k, v = self.qkv(x).chunk(3, dim=2)
        agents = F.adaptive_avg_pool2d(self._on_grid(q, size), self.agent_size).flatten(2).transpose(1, 2)
        # Fast kernels read the channels of a head side by side. Pooling may lay them out otherwise than a compiler is
        # told, which would then leave out a mere `contiguous`.
        agents = agents.clone(memory_format=torch.contiguous_format)
        out = agent_attention(
            *(tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for tokens in (q, k, v, agents)),
            k_scale2=1.0,
            k_shortcut=0.0,
            agent_bias=self._agent_bias(size).to(q.dtype),
            query_bias=self._query_bias(size).to(q.dtype),
            attend=partial(F.scaled_dot_product_attention, dropout_p=self.attn_drop.p if self.training else 0.0),
        )
        restored = self.dwc(self._on_grid(v, size)).flatten(2).transpose(1, 2)
        if self.class_token:
            restored = F.pad(restored, (0, 0, 1, 0))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2) + restored))

    def _grid_of(self, x: torch.Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
        """The rows and columns of the tokens' grid, which they fill."""
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"`x` must have the shape (batch, tokens, {self.dim}), but got {tuple(x.shape)}.")
        tokens = x.shape[1] - int(self.class_token)
        behind = " behind the class token" if self.class_token else ""
        if size is None:
            side = int(tokens**0.5)
            if tokens < 1 or side * side != tokens:
                raise ValueError(f"{tokens} tokens{behind} make no square: pass `size=(height, width)`.")
            return side, side
        if len(size) != 2 or size[0] * size[1] != tokens:
            raise ValueError(f"`size` must be (height, width) of a grid of {tokens} tokens{behind}, but got {size!r}.")
        return size

    def _on_grid(self, tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """`(batch, tokens, dim)` as `(batch, dim, height, width)`, without the class token."""
        return tokens[:, int(self.class_token) :].transpose(1, 2).unflatten(2, size)

    def _agent_bias(self, size: tuple[int, int]) -> torch.Tensor:
        """B₁: `(1, heads, agents, tokens)`."""
        bias = _on_tokens(self.an_bias, self.ah_bias[0], self.aw_bias[0], size)[None]
        return torch.cat([self.ac_bias, bias], dim=3) if self.class_token else bias

    def _query_bias(self, size: tuple[int, int]) -> torch.Tensor:
        """B₂: `(1, heads, tokens, agents)`."""
        rows, columns = (part[0].permute(0, 3, 1, 2) for part in (self.ha_bias, self.wa_bias))
        bias = _on_tokens(self.na_bias, rows, columns, size)[None].transpose(2, 3)
        return torch.cat([self.ca_bias, bias], dim=2) if self.class_token else bias


def _pair(name: str, value: tuple[int, int]) -> tuple[int, int]:
    """The size given under this name, checked."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in value):
        raise ValueError(f"`{name}` must be two positive integers, rows and columns, but got {value!r}.")
    return value[0], value[1]


def _bias(*shape: int) -> nn.Parameter:
    """A part of a bias, as it is before training."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def _on_tokens(block: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A bias for a grid: parts of `(heads, agents, height or 1, width or 1)` to `(heads, agents, tokens)`."""
    targets = size, (size[0], 1), (1, size[1])
    parts = zip((block, rows, columns), targets, strict=True)
    block, rows, columns = (F.interpolate(part, to, mode="bilinear", align_corners=False) for part, to in parts)
    return (block + rows + columns).flatten(2)
