"""Distances between sets of pictures, from their features: FID, KID, and how well pictures fit their prompts."""

import numpy as np


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """
    Fréchet distance between two sets, as if each were normally distributed: with Inception features, the FID.

    Small sets look further apart than they are; compare only values of sets of one size.

    Source: M. Heusel et al.: *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium*,
    NeurIPS 2017.

    Args:
        first (`np.ndarray` of shape `(n, features)`): Features of at least two pictures.
        second (`np.ndarray` of shape `(m, features)`): Features of at least two others.

    Returns:
        `float`: `|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)`, at least 0.

    Examples:

    ```python
    >>> import numpy as np
    >>> points = np.random.default_rng(0).normal(size=(100, 3))
    >>> round(frechet_distance(points, points + [2, 0, 0]), 6)
    4.0
    ```
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    shift = first.mean(axis=0) - second.mean(axis=0)
    one, two = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    # The trace of the root of a matrix is the sum of the roots of its eigenvalues, real and not negative here.
    roots = np.sqrt(np.clip(np.linalg.eigvals(one @ two).real, 0, None))
    return max(0.0, float(shift @ shift + np.trace(one) + np.trace(two) - 2 * roots.sum()))


def kernel_distance(first: np.ndarray, second: np.ndarray) -> float:
    """
    Squared maximum mean discrepancy with the kernel `(x·y / d + 1)³`: with Inception features, the KID. Unbiased.

    Source: M. Bińkowski et al.: *Demystifying MMD GANs*, ICLR 2018.

    Args:
        first (`np.ndarray` of shape `(n, features)`): Features of at least two pictures.
        second (`np.ndarray` of shape `(m, features)`): Features of at least two others.

    Returns:
        `float`: About 0 for sets of the same distribution, and by chance below.

    Examples:

    ```python
    >>> import numpy as np
    >>> round(kernel_distance(np.zeros((4, 2)), np.ones((4, 2))), 3)
    7.0
    ```
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(features: np.ndarray) -> float:
        count, matrix = len(features), kernel(features, features)
        return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def clip_scores(pictures: np.ndarray, texts: np.ndarray) -> list[float]:
    """
    How well pictures fit their prompts: 100 times the cosine of their features, at least 0.

    Source: J. Hessel et al.: *CLIPScore*, EMNLP 2021, without its factor of 2.5, as torchmetrics computes it.

    Args:
        pictures (`np.ndarray` of shape `(n, features)`): Features of pictures.
        texts (`np.ndarray` of shape `(n, features)`): Features of their prompts.

    Returns:
        `list[float]`: A score a picture.

    Examples:

    ```python
    >>> import numpy as np
    >>> clip_scores(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    [100.0, 0.0]
    ```
    """
    norms = np.linalg.norm(pictures, axis=1) * np.linalg.norm(texts, axis=1)
    return [float(value) for value in np.clip(100 * (pictures * texts).sum(axis=1) / norms, 0, None)]
