"""Forecasts of a tensor that changes from step to step."""

import torch


def forecast(older: torch.Tensor, newer: torch.Tensor, distance: float) -> torch.Tensor:
    """
    Go on in a straight line from two earlier values.

    Args:
        older (`torch.Tensor`): The earlier value.
        newer (`torch.Tensor`): The later value, of the same shape and dtype.
        distance (`float`): How far beyond the later one, in units of the distance between the two.

    Returns:
        `torch.Tensor`: A new tensor, `newer + distance * (newer - older)`.

    Examples:

    ```python
    >>> import torch
    >>> forecast(torch.tensor([1.0]), torch.tensor([3.0]), distance=0.5)
    tensor([4.])
    ```
    """
    return torch.lerp(older, newer, 1 + distance)
