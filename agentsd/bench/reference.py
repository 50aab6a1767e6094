"""A reference set of images, kept as its features: what sets of drawn images are compared with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..utils.loading import resolve_model
from .features import Extractor, image_files
from .set_metrics import frechet_distance_of_moments, kernel_distance
from .store import BenchError


_FLOOR_SETS = 50


@dataclass(frozen=True)
class ReferenceSet:
    """
    Features of a set of images, or what of them FID and KID need.

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

        Examples:

        ```python
        >>> import numpy as np
        >>> from agentsd.bench.reference import ReferenceSet
        >>> points = np.random.default_rng(0).normal(size=(100, 3))
        >>> round(ReferenceSet.of(points, rows=10).frechet_distance(points + [2, 0, 0]), 6)
        4.0
        ```
        """
        features = np.asarray(features, dtype=np.float64)
        covariance = np.atleast_2d(np.cov(features, rowvar=False))
        return cls(len(features), features.mean(axis=0), covariance, features[:rows])

    @classmethod
    def load(cls, file: str | Path) -> "ReferenceSet":
        """
        Read what [`ReferenceSet.save`] wrote.

        Args:
            file (`str` or `Path`): A safetensors file with `count`, `mean`, `covariance` and `rows`.

        Returns:
            `ReferenceSet`: The set.

        Raises:
            BenchError: If the file cannot be read, or holds something else.
        """
        try:
            arrays = load_file(str(file))
        except (OSError, SafetensorError) as error:
            raise BenchError(f"Cannot read the reference set {file}: {error}.") from error
        if set(arrays) != {"count", "mean", "covariance", "rows"}:
            raise BenchError(f"{file} is not a reference set: it holds {', '.join(sorted(arrays)) or 'nothing'}.")
        count = arrays.pop("count").item()
        return cls(count, **{name: array.astype(np.float64) for name, array in arrays.items()})

    def save(self, file: str | Path) -> None:
        """
        Keep the set: moments in single precision, rows in half.

        Args:
            file (`str` or `Path`): The safetensors file to write.
        """
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

        Raises:
            BenchError: If the features are those of another extractor.
        """
        other = ReferenceSet.of(self._fitting(features))
        return frechet_distance_of_moments(other.mean, other.covariance, self.mean, self.covariance)

    def kernel_distance(self, features: np.ndarray) -> float:
        """
        Kernel distance of other images to the reference's rows; see [`kernel_distance`].

        Args:
            features (`np.ndarray` of shape `(n, features)`): Features of at least two images.

        Returns:
            `float`: About 0 for sets of the same distribution.

        Raises:
            BenchError: If the features are those of another extractor.
        """
        return kernel_distance(self._fitting(features), self.rows)

    def floor(self, count: int) -> list[float]:
        """
        Fréchet distance of so many of the reference's images to all its others: what a set scores for being small.

        Args:
            count (`int`): Images in a set, at least two.

        Returns:
            `list[float]`: Its mean over random choices, and the range of 95 % of them; nothing where there are not
            twice as many rows.

        Examples:

        ```python
        >>> import numpy as np
        >>> from agentsd.bench.reference import ReferenceSet
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

    def _without(self, rows: np.ndarray) -> "ReferenceSet":
        """What is left of the moments without some of the images; no other image's features are needed for it."""
        count = self.count - len(rows)
        mean = (self.count * self.mean - rows.sum(axis=0)) / count
        # Sums of products about the mean of all, then about the new mean.
        about = (self.count - 1) * self.covariance - (rows - self.mean).T @ (rows - self.mean)
        shift = mean - self.mean
        return ReferenceSet(count, mean, (about - count * np.outer(shift, shift)) / (count - 1), rows[:0])

    def _fitting(self, features: np.ndarray) -> np.ndarray:
        self.check_width(features.shape[1])
        return features

    def check_width(self, width: int) -> None:
        """
        See that images can be compared with the set.

        Args:
            width (`int`): Number of their features.

        Raises:
            BenchError: If the set has another number of them.
        """
        if width != len(self.mean):
            raise BenchError(
                f"The reference set has {len(self.mean)} features per image, but these images have {width}: "
                "name the extractor that the reference was made with."
            )


def load_reference(name: str, extractor: Extractor) -> ReferenceSet:
    """
    Load a reference set.

    Args:
        name (`str`):
            `"emoji"` for renders of what the embedded model was taught, whose features ship with it; a safetensors
            file that [`ReferenceSet.save`] wrote; or a folder of images.
        extractor (`Extractor`): What turns images into features; must be the one a kept set was made with.

    Returns:
        `ReferenceSet`: The set.

    Raises:
        BenchError: If there is nothing of that kind.
    """
    file = kept_reference(name)
    return ReferenceSet.load(file) if file is not None else ReferenceSet.of(extractor.images(image_files(name)))


def check_reference(name: str, extractor: Extractor) -> None:
    """
    See that a reference set is there and fits, before hours of drawing.

    Args:
        name (`str`): See [`load_reference`].
        extractor (`Extractor`): What the images' features will come from.

    Raises:
        BenchError: If there is nothing of that kind, or it was made with another extractor.
    """
    file = kept_reference(name)
    if file is not None:
        ReferenceSet.load(file).check_width(extractor.width)
    else:
        image_files(name)


def kept_reference(name: str) -> Path | None:
    """
    The file of a reference set that is kept as features.

    Args:
        name (`str`): See [`load_reference`].

    Returns:
        `Path` or `None`: The file; `None` for a folder of images.
    """
    if name == "emoji":
        return Path(resolve_model("emoji")) / "clip" / "reference.safetensors"
    return Path(name) if name.endswith(".safetensors") else None
