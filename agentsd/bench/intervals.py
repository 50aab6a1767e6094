"""Intervals for measured values, by drawing the same measurements again with replacement (bootstrap)."""

from collections.abc import Callable, Sequence

import numpy as np


_RESAMPLES = 1000
_SET_RESAMPLES = 50  # a distance between sets costs far more than a mean
_ENDS = (2.5, 97.5)


def bootstrap_mean(values: Sequence[float]) -> list[float]:
    """
    The mean of some values with its 95 % interval.

    Args:
        values (`Sequence[float]`): At least one value.

    Returns:
        `list[float]`: The mean and the ends of its interval.

    Examples:

    ```python
    >>> bootstrap_mean([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    ```
    """
    array = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(0).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.percentile(array[rows].mean(axis=1), _ENDS)
    return [float(array.mean()), float(low), float(high)]


def bootstrap_sets(
    distance: Callable[[np.ndarray, np.ndarray], float], first: np.ndarray, second: np.ndarray
) -> list[float]:
    """
    A distance between two sets with its 95 % interval.

    A resampled set holds rows twice, which such distances take for a difference between the sets. So only the spread
    of the resamples counts, around their own mean; it is laid around the measured value.

    Args:
        distance (`Callable`): Of two sets.
        first (`np.ndarray` of shape `(n, features)`): A set.
        second (`np.ndarray` of shape `(m, features)`): Another one.

    Returns:
        `list[float]`: The distance and the ends of its interval.

    Examples:

    ```python
    >>> import numpy as np
    >>> same = np.ones((4, 2))
    >>> bootstrap_sets(lambda a, b: float(abs(a.mean() - b.mean())), same, same)
    [0.0, 0.0, 0.0]
    ```
    """
    rng = np.random.default_rng(0)
    value = distance(first, second)
    resampled = [
        distance(first[rng.integers(len(first), size=len(first))], second[rng.integers(len(second), size=len(second))])
        for _ in range(_SET_RESAMPLES)
    ]
    low, high = np.percentile(resampled, _ENDS) - np.mean(resampled)
    return [value, float(value - high), float(value - low)]
