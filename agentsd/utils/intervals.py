"""
95% intervals for measured values: by the bootstrap for averages, by the jackknife for distances between sets, by
Student's t for the mean of few values.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np


_RESAMPLES = 1000
_ENDS = (2.5, 97.5)
_GROUPS = 32  # a distance between sets is dear, and as many of them tell its spread well enough
_NORMAL = 1.96  # standard deviations on either side
# From fewer values, intervals are much too narrow: those of a median of five hold it 94 times in 100, those of a mean
# of ten 91 times.
_FEWEST_FOR_MEDIAN, _FEWEST_FOR_MEAN = 5, 10


def bootstrap_mean(values: Sequence[float]) -> list[float]:
    """The mean and, from ten values on, the ends of its 95% interval."""
    return _bootstrap(values, np.mean, _FEWEST_FOR_MEAN)


def bootstrap_median(values: Sequence[float]) -> list[float]:
    """The median and, from five values on, the ends of its 95% interval."""
    return _bootstrap(values, np.median, _FEWEST_FOR_MEDIAN)


def _bootstrap(values: Sequence[float], statistic: Callable[..., np.ndarray], fewest: int) -> list[float]:
    array = np.asarray(values, dtype=np.float64)
    if len(array) < fewest:
        return [float(statistic(array))]
    rows = np.random.default_rng(0).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.percentile(statistic(array[rows], axis=1), _ENDS)
    return [float(statistic(array)), float(low), float(high)]


def jackknife(statistic: Callable[..., float], *sets: np.ndarray) -> list[float]:
    """A number computed from sets of shape `(n, features)` and, from ten rows on, the ends of its 95% interval."""
    # Source: B. Efron, C. Stein, The Jackknife Estimate of Variance, Annals of Statistics 1981.
    # Row `i` of one set belongs with row `i` of the others (images of the same seed, say): the same rows of all are
    # left out together. Nothing is drawn twice, which distances between sets would take for a difference. The interval
    # is on the average no narrower than it should be.
    value, count = statistic(*sets), len(sets[0])
    if count < _FEWEST_FOR_MEAN:
        return [value]
    order = np.random.default_rng(0).permutation(count)
    groups = np.array_split(order, min(count, _GROUPS))
    without = np.array([statistic(*(np.delete(rows, group, axis=0) for rows in sets)) for group in groups])
    spread = np.sqrt((len(groups) - 1) * without.var())
    return [value, float(value - _NORMAL * spread), float(value + _NORMAL * spread)]


def student_mean(values: Sequence[float], looks: int = 0) -> list[float]:
    """The mean of two or more values and the ends of its 95% interval, wider after `looks` at what decides the end."""
    # Source: Student, The Probable Error of a Mean, Biometrika 1908. From two values on it holds what it should if
    # they are independent and normal; with heavier tails it is rather too wide, and where each value depends on the
    # one before, too narrow. Whoever measures until the interval leaves out some value gets there by chance: of two
    # equal variants, looked at after 3, 6, 12, … 96 rounds, one pair in five would end up "different". So each look
    # spends half of what is left of the 5% that may go wrong, and all together stay below them (Bonferroni).
    array = np.asarray(values, dtype=np.float64)
    mean, count = float(array.mean()), len(array)
    half = _student_quantile(1 - 0.05 / 2**looks, count - 1) * float(array.std(ddof=1)) / math.sqrt(count)
    return [mean, mean - half, mean + half]


def _student_quantile(level: float, freedom: int) -> float:
    """What |t| stays below with this probability."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_within(angle: float, freedom: int) -> float:
    """The probability that |t| is below √freedom · tan(angle)."""
    # Source: M. Abramowitz, I. Stegun, Handbook of Mathematical Functions, 1964, 26.7.3 and 26.7.4.
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2 == 1
    term = total = (cosine if freedom > 1 else 0.0) if is_odd else 1.0
    for number in range(3 if is_odd else 2, freedom, 2):
        term *= (number - 1) / number * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
