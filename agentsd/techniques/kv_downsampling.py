"""
Key and value down-sampling: every token attends to one token of each cell (E. Smith, N. Saxena, A. Saha, *ToDo: Token
Downsampling for Efficient Generation of High-Resolution Images*, arXiv:2402.13573).
"""

from dataclasses import dataclass
from typing import get_args

import torch

from ..ops.downsampling import SamplingMode, downsample_tokens
from ..runtime.checks import keep_integer
from ..runtime.steps import Match, Phase


@dataclass(frozen=True)
class KVDownsamplingConfig:
    """
    Configuration of key and value down-sampling.

    Args:
        mode (`str`, defaults to `"mean"`):
            `"mean"` for the mean of a cell's tokens, `"nearest"`, as in ToDo, for its top-left one.
        factor (`int`, defaults to `2`): Side of a cell in tokens.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.

    Examples:

    ```python
    >>> from agentsd.techniques.kv_downsampling import KVDownsamplingConfig
    >>> KVDownsamplingConfig("nearest").factor
    2
    ```
    """

    mode: SamplingMode = "mean"
    factor: int = 2

    def __post_init__(self) -> None:
        keep_integer(self, "factor", low=1)
        if self.mode not in get_args(SamplingMode):
            raise ValueError(
                f"`mode` must be {' or '.join(map(repr, get_args(SamplingMode)))}, but got {self.mode!r}."
            )


@dataclass(frozen=True)
class KVDownsampling:
    """What down-sampling does in a layer: the keys of a phase."""

    config: KVDownsamplingConfig

    def removed(self, tokens: int, sources: int) -> int:
        """No token is merged."""
        return 0

    def count(self, size: tuple[int, int], sources: int) -> int:
        """How many keys are left: one a cell, where the last ones may be smaller."""
        height, width = (-(-side // self.config.factor) for side in size)
        return height * width

    def reduce(self, x: torch.Tensor, size: tuple[int, int], match: Match | None) -> torch.Tensor:
        """What keys and values come from: `(batch, tokens, channels)` to `(batch, keys, channels)`."""
        return downsample_tokens(x, size, self.config.factor, self.config.mode)

    def bias(self, match: Match | None) -> None:
        """Every key stands for as many tokens."""


def apply_kv_downsampling(phase: Phase, config: KVDownsamplingConfig) -> Phase:
    """Let layers attend to down-sampled keys and values during a phase."""
    return phase.with_role("keys", KVDownsampling(config))
