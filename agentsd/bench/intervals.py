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


def bootstrap_sets(distance: Callable[..., float], *sets: np.ndarray) -> list[float]:
    """
    A distance of sets with its 95 % interval, over which of their rows were measured.

    Row `i` of one set belongs with row `i` of the others (pictures of the same seed, say), so the same rows of all are
    drawn again. A resampled set holds rows twice, which such distances take for a difference between the sets. So
    only the spread of the resamples counts, around their own mean; it is laid around the measured value.

    Args:
        distance (`Callable`): Of the sets; or of the only one, to something else.
        sets (`np.ndarray` of shape `(n, features)`): The sets, as long as each other.

    Returns:
        `list[float]`: The distance and the ends of its interval.

    Examples:

    ```python
    >>> import numpy as np
    >>> points = np.random.default_rng(0).normal(size=(50, 2))
    >>> bootstrap_sets(lambda a, b: float(abs(a - b).mean()), points, points + 1)
    [1.0, 1.0, 1.0]
    ```
    """
    rng = np.random.default_rng(0)
    count = len(sets[0])
    resampled = []
    for _ in range(_SET_RESAMPLES):
        rows = rng.integers(count, size=count)
        resampled.append(distance(*(features[rows] for features in sets)))
    value = distance(*sets)
    low, high = np.percentile(resampled, _ENDS) - np.mean(resampled)
    return [value, float(value - high), float(value - low)]
