"""Checks of what a configuration is given."""

import math
from numbers import Integral, Real
from typing import Any


def keep_number(
    config: Any, name: str, low: float | None = None, high: float | None = None, high_open: bool = False
) -> None:
    """Make a field of a frozen configuration a plain float; NumPy's numbers, too, become ones that JSON knows."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, but got {value!r}.")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, but got {value!r}.")
    if low is not None and high is not None and (not low <= number <= high or (high_open and number == high)):
        raise ValueError(f"`{name}` must be in [{low}, {high}{')' if high_open else ']'}, but got {value!r}.")
    object.__setattr__(config, name, number)


def keep_integer(config: Any, name: str, low: int | None = None) -> None:
    """Make a field of a frozen configuration a plain integer."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, but got {value!r}.")
    if low is not None and value < low:
        raise ValueError(f"`{name}` must be at least {low}, but got {value!r}.")
    object.__setattr__(config, name, int(value))


def check_switch(config: Any, name: str) -> None:
    """Refuse a field that is neither `True` nor `False`."""
    if not isinstance(getattr(config, name), bool):
        raise TypeError(f"`{name}` must be True or False, but got {getattr(config, name)!r}.")
