"""Distances between sets of images, from their features: FID, KID, and how well images fit their prompts."""

import numpy as np


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """
    Fréchet distance between two sets, as if each were normally distributed: with Inception features, the FID.

    Small sets look further apart than they are; compare only values of sets of one size.

    Source: M. Heusel et al.: *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium*,
    NeurIPS 2017.

    Args:
        first (`np.ndarray` of shape `(n, features)`): Features of at least two images.
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
    one, two = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    return frechet_distance_of_moments(first.mean(axis=0), one, second.mean(axis=0), two)


def frechet_distance_of_moments(
    first_mean: np.ndarray, first_covariance: np.ndarray, second_mean: np.ndarray, second_covariance: np.ndarray
) -> float:
    """
    Fréchet distance between two normal distributions; see [`frechet_distance`].

    Args:
        first_mean (`np.ndarray` of shape `(features,)`): Mean of the one.
        first_covariance (`np.ndarray` of shape `(features, features)`): Covariance of the one.
        second_mean (`np.ndarray` of shape `(features,)`): Mean of the other.
        second_covariance (`np.ndarray` of shape `(features, features)`): Covariance of the other.

    Returns:
        `float`: At least 0.

    Examples:

    ```python
    >>> import numpy as np
    >>> frechet_distance_of_moments(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2))
    4.0
    ```
    """
    shift = first_mean - second_mean
    # The trace of the root of a matrix is the sum of the roots of its eigenvalues, real and not negative here.
    roots = np.sqrt(np.clip(np.linalg.eigvals(first_covariance @ second_covariance).real, 0, None))
    return max(0.0, float(shift @ shift + np.trace(first_covariance) + np.trace(second_covariance) - 2 * roots.sum()))


def kernel_distance(first: np.ndarray, second: np.ndarray, *, paired: bool = False) -> float:
    """
    Squared maximum mean discrepancy with the kernel `(x·y / d + 1)³`: with Inception features, the KID. Unbiased.

    Sources: M. Bińkowski et al.: *Demystifying MMD GANs*, ICLR 2018; for pairs A. Gretton et al.: *A Kernel Two-Sample
    Test*, JMLR 2012, Lemma 6.

    Args:
        first (`np.ndarray` of shape `(n, features)`): Features of at least two images.
        second (`np.ndarray` of shape `(m, features)`): Features of at least two others.
        paired (`bool`, defaults to `False`):
            Whether rows `i` of both belong together, as images of one seed do. They are then not compared with each
            other: their likeness says nothing about the sets, and would make sets look closer than two draws of one.

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

    across = kernel(first, second)
    if paired:
        between = float((across.sum() - np.trace(across)) / (len(first) * (len(first) - 1)))
    else:
        between = float(across.mean())
    return within(first) + within(second) - 2 * between


def clip_scores(images: np.ndarray, texts: np.ndarray) -> list[float]:
    """
    How well images fit their prompts: 100 times the cosine of their features, at least 0.

    Source: J. Hessel et al.: *CLIPScore*, EMNLP 2021, without its factor of 2.5, as torchmetrics computes it.

    Args:
        images (`np.ndarray` of shape `(n, features)`): Features of images.
        texts (`np.ndarray` of shape `(n, features)`): Features of their prompts.

    Returns:
        `list[float]`: A score an image.

    Examples:

    ```python
    >>> import numpy as np
    >>> clip_scores(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    [100.0, 0.0]
    ```
    """
    norms = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return [float(value) for value in np.clip(100 * (images * texts).sum(axis=1) / norms, 0, None)]
