"""Checks of what a configuration is given, and how an error names a value."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch


# The longest value that an error or a file writes out.
_MOST_CHARACTERS = 200
# The longest list that a file writes out.
_MOST_ITEMS = 100


def shown(value: Any) -> str:
    """
    A value in an error or a file: as Python writes it, but tensors and images by their shape, and nothing at length.

    Args:
        value (`Any`): Anything.

    Returns:
        `str`: A short text.

    Examples:

    ```python
    >>> import torch
    >>> shown("fast"), shown(torch.zeros(1, 77, 768)), shown([torch.zeros(2)])
    ("'fast'", 'Tensor of shape (1, 77, 768), float32', '[Tensor of shape (2,), float32]')
    ```
    """
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, PIL.Image.Image):
        return f"{value.mode} image of {value.width}×{value.height} pixels"
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        text = f"{{{', '.join(f'{key!r}: {shown(item)}' for key, item in value.items())}}}"
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(shown, value))}]"
    else:
        text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}… ({type(value).__name__})"


def plain_value(value: Any) -> Any:
    """A value as JSON has it; what JSON has no word for, and what is long, as in [`shown`]."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= _MOST_ITEMS:
        return [plain_value(item) for item in value]
    if isinstance(value, Mapping) and len(value) <= _MOST_ITEMS:
        return {str(key): plain_value(item) for key, item in value.items()}
    return shown(value)


def keep_number(
    config: Any, name: str, low: float | None = None, high: float | None = None, high_open: bool = False
) -> None:
    """Make a field of a frozen configuration a plain float; NumPy's numbers, too, become ones that JSON knows."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, but got {shown(value)}.")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, but got {shown(value)}.")
    if low is not None and high is not None and (not low <= number <= high or (high_open and number == high)):
        raise ValueError(f"`{name}` must be in [{low}, {high}{')' if high_open else ']'}, but got {shown(value)}.")
    object.__setattr__(config, name, number)


def keep_integer(config: Any, name: str, low: int | None = None) -> None:
    """Make a field of a frozen configuration a plain integer."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, but got {shown(value)}.")
    if low is not None and value < low:
        raise ValueError(f"`{name}` must be at least {low}, but got {shown(value)}.")
    object.__setattr__(config, name, int(value))


def check_switch(config: Any, name: str) -> None:
    """Refuse a field that is neither `True` nor `False`."""
    if not isinstance(getattr(config, name), bool):
        raise TypeError(f"`{name}` must be True or False, but got {shown(getattr(config, name))}.")
