"""How close one image is to another: PSNR, SSIM and MS-SSIM, and how they are written."""

import math
from typing import TYPE_CHECKING, TypeAlias, Union


if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

# What pipelines return with `output_type` "pil", "np" and "pt".
Image: TypeAlias = Union["PIL.Image.Image", "np.ndarray", "torch.Tensor"]

# Structural similarity looks through a Gaussian window of this many pixels.
SSIM_SIDE = 11
# Its multi-scale form halves the image four times, and then looks through the same window.
MS_SSIM_SIDE = SSIM_SIDE * 2**4


def psnr(image: Image, reference: Image) -> float:
    """
    Peak signal-to-noise ratio in decibels; higher is closer.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            The image, as [`to_tensor`] takes it. A batch is treated as one large image.
        reference (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): What to compare it with, of the same size.

    Returns:
        `float`: Decibels; infinity for identical images.

    Raises:
        TypeError: If one of the two is not an image.
        ValueError: If the sizes differ, or a value is not finite or outside `[0, 1]`.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.metrics import psnr
    >>> black = torch.zeros(3, 16, 16)
    >>> round(psnr(black + 0.1, black), 3)
    20.0
    ```
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    first, second = _pair(image, reference)
    return float(peak_signal_noise_ratio(first, second, data_range=1.0))


def ssim(image: Image, reference: Image) -> float:
    """
    Structural similarity; higher is closer.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            The image, as [`to_tensor`] takes it, at least 11 pixels high and wide. Of a batch, the mean is returned.
        reference (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): What to compare it with, of the same size.

    Returns:
        `float`: At most 1, which identical images get.

    Raises:
        TypeError: If one of the two is not an image.
        ValueError: If the sizes differ, an image is too small, or a value is not finite or outside `[0, 1]`.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.metrics import ssim
    >>> image = torch.rand(3, 16, 16)
    >>> ssim(image, image)
    1.0
    ```
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = _pair(image, reference)
    _check_side("Structural similarity", first, SSIM_SIDE)
    similarity = structural_similarity_index_measure(first, second, data_range=1.0)
    assert not isinstance(similarity, tuple)  # only with `return_full_image` or `return_contrast_sensitivity`
    return float(similarity)


def ms_ssim(image: Image, reference: Image) -> float:
    """
    Structural similarity over five scales; higher is closer.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            The image, as [`to_tensor`] takes it, at least 176 pixels high and wide. Of a batch, the mean is
            returned.
        reference (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): What to compare it with, of the same size.

    Returns:
        `float`: At most 1, which identical images get.

    Raises:
        TypeError: If one of the two is not an image.
        ValueError: If the sizes differ, an image is too small, or a value is not finite or outside `[0, 1]`.

    Examples:

    ```python
    >>> import torch
    >>> from agentsd.utils.metrics import ms_ssim
    >>> image = torch.rand(3, 176, 176)
    >>> round(ms_ssim(image, image), 6)
    1.0
    ```
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    first, second = _pair(image, reference)
    _check_side("Multi-scale structural similarity", first, MS_SSIM_SIDE)
    return float(multiscale_structural_similarity_index_measure(first, second, data_range=1.0))


def to_tensor(image: Image) -> "torch.Tensor":
    """
    An image as a tensor of values in `[0, 1]`.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A PIL image; an array of shape `(height, width, channels)`; or a tensor of shape
            `(channels, height, width)`. Arrays and tensors may have a batch dimension in front, and hold floats in
            `[0, 1]`, as pipelines return them with `output_type` `"np"` and `"pt"`.

    Returns:
        `torch.Tensor` of shape `(batch, channels, height, width)`: float64, on the CPU, or on the GPU it was on.

    Raises:
        TypeError: If it is none of these, or an array or tensor of integers.
        ValueError: If it has another number of dimensions, or a value is not finite or outside `[0, 1]`.

    Examples:

    ```python
    >>> import PIL.Image
    >>> from agentsd.utils.metrics import to_tensor
    >>> to_tensor(PIL.Image.new("RGB", (32, 16), "white")).shape
    torch.Size([1, 3, 16, 32])
    ```
    """
    import numpy as np
    import PIL.Image
    import torch

    if isinstance(image, PIL.Image.Image):
        image = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise TypeError(f"Expected a PIL image, an array or a tensor, but got {type(image).__name__}.")
    if image.ndim not in (3, 4):
        raise ValueError(f"An image has three dimensions, or four with a batch, but this one has {image.ndim}.")
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.moveaxis(image, -1, -3).copy())
    if not image.is_floating_point():
        raise TypeError(f"Images as arrays and tensors hold floats in [0, 1], but this one holds {image.dtype}.")
    # Double precision, so that identical images have a similarity of exactly 1. Only CPUs and CUDA have it.
    image = image.detach().to(image.device if image.is_cuda else "cpu", torch.float64)
    if not image.isfinite().all():
        raise ValueError("The image has values that are not finite (NaN or infinity).")
    if image.min() < 0 or image.max() > 1:
        raise ValueError(f"The image's values must be in [0, 1], but go from {image.min():g} to {image.max():g}.")
    return image if image.ndim == 4 else image[None]


def _pair(image: Image, reference: Image) -> tuple["torch.Tensor", "torch.Tensor"]:
    first = to_tensor(image)
    second = to_tensor(reference).to(first.device)
    if first.shape != second.shape:
        raise ValueError(f"The images differ in size: {_size(first)} and {_size(second)}.")
    return first, second


def _check_side(metric: str, image: "torch.Tensor", least: int) -> None:
    if min(image.shape[-2:]) < least:
        raise ValueError(f"{metric} needs images of at least {least}×{least} pixels, but these have {_size(image)}.")


def _size(image: "torch.Tensor") -> str:
    batch, channels, height, width = image.shape
    return f"{width}×{height} pixels, {channels} channels" + (f", batch {batch}" if batch > 1 else "")


def decibels(value: float | None) -> str:
    """A peak signal-to-noise ratio for people."""
    return "unknown" if value is None else "identical" if math.isinf(value) else f"{value:.2f} dB"


def similarity(value: float | None) -> str:
    """A structural similarity for people."""
    return "unknown" if value is None else f"{value:.4f}"


def fidelity(image: "np.ndarray", reference: "np.ndarray") -> tuple[float | None, float | None]:
    """PSNR and SSIM of images of shape `(height, width, 3)`; `None` if one is not finite or, for SSIM, too small."""
    import numpy as np

    if not (np.isfinite(image).all() and np.isfinite(reference).all()):
        return None, None
    is_large = min(image.shape[:2]) >= SSIM_SIDE
    return psnr(image, reference), ssim(image, reference) if is_large else None
