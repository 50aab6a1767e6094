"""Sets of images: FID, KID and CLIP score from their features, and reference sets to compare them with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..utils.loading import resolve_model
from .features import Extractor, image_files
from .store import BenchError


_FLOOR_SETS = 50


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
    return ReferenceSet.of(second).frechet_distance(first)


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


@dataclass(frozen=True)
class ReferenceSet:
    """
    The features of a set of images, or what of them FID and KID need.

    Args:
        count (`int`): How many images there are.
        mean (`np.ndarray` of shape `(features,)`): Of all images.
        covariance (`np.ndarray` of shape `(features, features)`): Of all images.
        rows (`np.ndarray` of shape `(n, features)`): The features of some of them, or of all.
    """

    count: int
    mean: np.ndarray
    covariance: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, rows: int | None = None) -> "ReferenceSet":
        """
        The reference set of these images.

        Args:
            features (`np.ndarray` of shape `(n, features)`): Of at least two images.
            rows (`int`, *optional*): How many of them to keep for KID; all by default.

        Returns:
            `ReferenceSet`: The set.
        """
        features = np.asarray(features, dtype=np.float64)
        covariance = np.atleast_2d(np.cov(features, rowvar=False))
        return cls(len(features), features.mean(axis=0), covariance, features[:rows])

    @classmethod
    def load(cls, file: str | Path) -> "ReferenceSet":
        """Read what [`ReferenceSet.save`] wrote."""
        try:
            arrays = load_file(str(file))
        except (OSError, SafetensorError) as error:
            raise BenchError(f"Cannot read the reference set {file}: {error}.") from error
        if set(arrays) != {"count", "mean", "covariance", "rows"}:
            raise BenchError(f"{file} is not a reference set: it holds {', '.join(sorted(arrays)) or 'nothing'}.")
        count = arrays.pop("count").item()
        return cls(count, **{name: array.astype(np.float64) for name, array in arrays.items()})

    def save(self, file: str | Path) -> None:
        """Keep the set as a safetensors file: moments in single precision, rows in half."""
        arrays = {
            "count": np.array([self.count]),
            "mean": self.mean.astype(np.float32),
            "covariance": self.covariance.astype(np.float32),
            "rows": self.rows.astype(np.float16),
        }
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, str(file))

    def frechet_distance(self, features: np.ndarray) -> float:
        """
        Fréchet distance of other images to all of the reference; see [`frechet_distance`].

        Args:
            features (`np.ndarray` of shape `(n, features)`): Features of at least two images.

        Returns:
            `float`: At least 0.
        """
        self.check_width(features.shape[1])
        features = np.asarray(features, dtype=np.float64)
        mean, freedom = features.mean(axis=0), len(features) - 1
        centred = features - mean
        # The trace of the root of a matrix is the sum of the roots of its eigenvalues, real and not negative here.
        if len(features) <= len(mean):
            # Those of `XᵀX Σ` are those of `X Σ Xᵀ`, which is small and symmetric, and zeros.
            values = np.linalg.eigvalsh(centred @ self.covariance @ centred.T / freedom)
        else:
            values = np.linalg.eigvals(centred.T @ centred / freedom @ self.covariance).real
        roots = np.sqrt(np.clip(values, 0, None))
        shift, spread = mean - self.mean, (centred**2).sum() / freedom
        return max(0.0, float(shift @ shift + spread + np.trace(self.covariance) - 2 * roots.sum()))

    def kernel_distance(self, features: np.ndarray) -> float:
        """
        Kernel distance of other images to the reference's rows; see [`kernel_distance`].

        Args:
            features (`np.ndarray` of shape `(n, features)`): Features of at least two images.

        Returns:
            `float`: About 0 for sets of the same distribution.
        """
        self.check_width(features.shape[1])
        return kernel_distance(features, self.rows)

    def floor(self, count: int) -> list[float]:
        """
        Fréchet distance of so many of the reference's images to all its others: what a set scores for being small.

        Args:
            count (`int`): Images in a set, at least two.

        Returns:
            `list[float]`: Its mean over random choices, and the range of 95% of them; nothing where there are not
            twice as many rows.

        Examples:

        ```python
        >>> points = np.random.default_rng(0).normal(size=(100, 3))
        >>> len(ReferenceSet.of(points).floor(20)), ReferenceSet.of(points).floor(60)
        (3, [])
        ```
        """
        if 2 * count > len(self.rows):
            return []
        rng = np.random.default_rng(0)
        distances = []
        for _ in range(_FLOOR_SETS):
            chosen = rng.permutation(len(self.rows))[:count]
            distances.append(self._without(self.rows[chosen]).frechet_distance(self.rows[chosen]))
        return [float(value) for value in (np.mean(distances), *np.percentile(distances, (2.5, 97.5)))]

    def check_width(self, width: int) -> None:
        """See that images with so many features can be compared with the set."""
        if width != len(self.mean):
            raise BenchError(
                f"The reference set has {len(self.mean)} features per image, but these images have {width}: "
                "name the extractor that the reference was made with."
            )

    def _without(self, rows: np.ndarray) -> "ReferenceSet":
        """What is left of the moments without some of the images; no other image's features are needed for it."""
        count = self.count - len(rows)
        mean = (self.count * self.mean - rows.sum(axis=0)) / count
        # Sums of products about the mean of all, then about the new mean.
        about = (self.count - 1) * self.covariance - (rows - self.mean).T @ (rows - self.mean)
        shift = mean - self.mean
        return ReferenceSet(count, mean, (about - count * np.outer(shift, shift)) / (count - 1), rows[:0])


def load_reference(name: str, extractor: Extractor) -> ReferenceSet:
    """
    Load a reference set.

    `"emoji"` stands for renders of what the embedded model was taught, whose features ship with it; any other name is
    a safetensors file that [`ReferenceSet.save`] wrote, or a folder of images.
    """
    file = _kept_reference(name)
    return ReferenceSet.load(file) if file is not None else ReferenceSet.of(extractor.images(image_files(name)))


def check_reference(name: str, extractor: Extractor) -> None:
    """See that a reference set is there and fits the extractor, before hours of drawing."""
    file = _kept_reference(name)
    if file is not None:
        ReferenceSet.load(file).check_width(extractor.width)
    else:
        image_files(name)


def _kept_reference(name: str) -> Path | None:
    """The file of a reference set that is kept as features; `None` for a folder of images."""
    if name == "emoji":
        return Path(resolve_model("emoji")) / "clip" / "reference.safetensors"
    return Path(name) if name.endswith(".safetensors") else None
