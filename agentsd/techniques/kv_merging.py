"""
Key and value merging: keys and values come from merged tokens, while every token keeps its own query, and so its own
output. The matching is that of token merging (Bolya & Hoffman, arXiv:2303.17604). A key counts as often as it stands
for a token, as in the proportional attention of ToMe for vision Transformers (Bolya et al., arXiv:2210.09461).
"""

from dataclasses import dataclass

import torch

from ..ops.merging import Merging, merge_tokens, merged_sizes
from ..runtime.checks import keep_number
from ..runtime.steps import Match, Phase


@dataclass(frozen=True)
class KVMergingConfig:
    """
    Configuration of key and value merging.

    Args:
        ratio (`float`, defaults to `0.75`):
            Share of all tokens that is merged away for keys and values, in `[0, 1)`; all but the cells' destinations
            at most.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.

    Examples:

    ```python
    >>> from agentsd.techniques.kv_merging import KVMergingConfig
    >>> KVMergingConfig().ratio
    0.75
    ```
    """

    ratio: float = 0.75

    def __post_init__(self) -> None:
        keep_number(self, "ratio", low=0, high=1, high_open=True)


@dataclass(frozen=True)
class KVMerging:
    """What merging of keys and values does in a layer: the keys of a phase."""

    config: KVMergingConfig

    def removed(self, tokens: int, sources: int) -> int:
        """How many tokens are merged away for keys and values."""
        return min(int(tokens * self.config.ratio), sources)

    def count(self, size: tuple[int, int], sources: int) -> int:
        """How many keys are left."""
        tokens = size[0] * size[1]
        return tokens - self.removed(tokens, sources)

    def reduce(self, x: torch.Tensor, size: tuple[int, int], match: Match | None) -> torch.Tensor:
        """What keys and values come from: `(batch, tokens, channels)` to `(batch, keys, channels)`."""
        return merge_tokens(x, self.merging(match))

    def bias(self, match: Match | None) -> torch.Tensor:
        """The logarithm of how many tokens each key stands for, float32: with it, equal tokens lose nothing."""
        return merged_sizes(self.merging(match)).log()

    def merging(self, match: Match | None) -> Merging:
        """How tokens are merged for keys and values."""
        assert match is not None
        return match.merging("keys", self.removed(match.tokens, match.sources))


def apply_kv_merging(phase: Phase, config: KVMergingConfig) -> Phase:
    """Let layers attend to merged keys and values during a phase."""
    return phase.with_role("keys", KVMerging(config))
