"""Down-sampling of a grid of tokens."""

from typing import Literal

import torch
import torch.nn.functional as F


SamplingMode = Literal["mean", "nearest"]


def downsample_tokens(x: torch.Tensor, size: tuple[int, int], factor: int, mode: SamplingMode) -> torch.Tensor:
    """
    One token for each cell of `factor` by `factor` tokens; at the right and bottom edge, cells may be smaller.

    Args:
        x (`torch.Tensor` of shape `(batch, height * width, channels)`): The tokens, row by row.
        size (`tuple[int, int]`): Height and width of the grid.
        factor (`int`): Side of a cell in tokens.
        mode (`str`): `"mean"` for the mean of a cell, `"nearest"` for its top-left token.

    Returns:
        `torch.Tensor` of shape `(batch, ceil(height / factor) * ceil(width / factor), channels)`: In the dtype of `x`.

    Examples:

    ```python
    >>> import torch
    >>> x = torch.arange(6.0).reshape(1, 6, 1)
    >>> downsample_tokens(x, (2, 3), 2, "mean").flatten().tolist()
    [2.0, 3.5]
    >>> downsample_tokens(x, (2, 3), 2, "nearest").flatten().tolist()
    [0.0, 2.0]
    ```
    """
    if mode == "nearest":
        return x.unflatten(1, size)[:, ::factor, ::factor].flatten(1, 2)
    grid = x.unflatten(1, size).movedim(3, 1)
    return F.avg_pool2d(grid, factor, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
