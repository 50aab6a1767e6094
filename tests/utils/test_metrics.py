"""agentsd.utils.metrics: fidelity numbers that people will quote, so they must mean what they say."""

import math
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from agentsd.utils.metrics import ms_ssim, psnr, ssim, to_tensor


@pytest.fixture
def images():
    """A smooth image and a noisy copy, as PIL images."""
    ramp = np.linspace(0, 255, 48 * 40 * 3).reshape(48, 40, 3)
    noise = np.random.default_rng(0).normal(scale=12, size=ramp.shape)
    return [PIL.Image.fromarray(values.clip(0, 255).astype(np.uint8)) for values in (ramp, ramp + noise)]


def in_every_form(image):
    array = np.asarray(image, dtype=np.float64) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    return {"pil": image, "array": array, "batch of arrays": array[None], "tensor": tensor, "batch": tensor[None]}


def test_identical_images_are_perfect(images):
    """No rounding may make an image differ from itself: "identical" is read off these two values."""
    assert psnr(images[0], images[0]) == math.inf
    assert ssim(images[0], images[0]) == 1.0


def test_psnr_is_the_formula(images):
    """Against the definition: a wrong data range would shift every number by decibels."""
    first, second = (np.asarray(image, dtype=np.float64) / 255 for image in images)
    assert psnr(*images) == pytest.approx(-10 * math.log10(((first - second) ** 2).mean()), abs=1e-5)


def test_ssim_is_the_formula(images):
    """Against Wang et al. 2004: a Gaussian window of 11×11 pixels, reflected at the borders, and values up to 1."""
    first, second = (np.asarray(image, dtype=np.float64) / 255 for image in images)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def smooth(x):
        padded = np.pad(x, ((5, 5), (5, 5), (0, 0)), mode="reflect")
        return np.einsum("ijcab,ab->ijc", np.lib.stride_tricks.sliding_window_view(padded, (11, 11), (0, 1)), window)

    mean_1, mean_2 = smooth(first), smooth(second)
    variance_1, variance_2 = smooth(first**2) - mean_1**2, smooth(second**2) - mean_2**2
    covariance = smooth(first * second) - mean_1 * mean_2
    likeness = (2 * mean_1 * mean_2 + 0.01**2) * (2 * covariance + 0.03**2)
    likeness /= (mean_1**2 + mean_2**2 + 0.01**2) * (variance_1 + variance_2 + 0.03**2)
    assert ssim(*images) == pytest.approx(likeness.mean(), abs=1e-9)


def test_ssim_falls_with_noise_and_is_symmetric(images):
    """A similarity that did not fall, or depended on the order, would say nothing."""
    assert 0 < ssim(*images) < 0.95
    assert ssim(*images) == pytest.approx(ssim(*reversed(images)), abs=1e-12)


def test_the_smallest_image_of_multi_scale_similarity():
    """It halves an image four times; a smaller one would fail inside the library, or be judged by fewer scales."""
    image = torch.rand(3, 176, 176, generator=torch.Generator().manual_seed(0))
    noisy = (image + 0.2 * torch.rand(3, 176, 176, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert ms_ssim(image, image) == pytest.approx(1.0)
    assert 0 < ms_ssim(noisy, image) < 1
    with pytest.raises(ValueError, match="at least 176×176 pixels, but these have 176×175"):
        ms_ssim(image[:, :175], image[:, :175])


def test_multi_scale_similarity_does_not_stretch_the_contrast():
    """Images of little contrast are alike, whatever is in them."""
    one, two = torch.rand(2, 3, 176, 176, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(0.5 + one / 100, 0.5 + two / 100) > ms_ssim(one, two) + 0.3


@pytest.mark.parametrize("form", ["array", "batch of arrays", "tensor", "batch"])
def test_every_form_of_a_image_gives_the_same(images, form):
    """PIL images, arrays (channels last) and tensors (channels first) must not be mixed up."""
    first, second = (in_every_form(image)[form] for image in images)
    assert psnr(first, second) == pytest.approx(psnr(*images), abs=1e-5)
    assert ssim(first, second) == pytest.approx(ssim(*images), abs=1e-9)
    assert psnr(first, images[1]) == pytest.approx(psnr(*images), abs=1e-5)


def test_half_precision_on_any_device_is_taken(images):
    """Pipelines return float16 tensors."""
    half = to_tensor(images[0]).half()
    assert to_tensor(half).dtype == torch.float64
    assert psnr(half, images[0]) > 60


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 20, 24), ValueError, "differ in size: 24×20 pixels, 3 channels and 20×20 pixels"),
        (torch.zeros(1, 20, 20), ValueError, "differ in size"),
        (torch.full((3, 20, 20), math.nan), ValueError, "not finite"),
        (torch.full((3, 20, 20), math.inf), ValueError, "not finite"),
        (torch.full((3, 20, 20), 1.5), ValueError, r"in \[0, 1\], but go from 1.5 to 1.5"),
        (torch.full((3, 20, 20), -0.5), ValueError, r"in \[0, 1\], but go from -0.5 to -0.5"),
        (torch.zeros(3, 20, 20, dtype=torch.uint8), TypeError, "hold floats"),
        (np.zeros((20, 20, 3), dtype=np.uint8), TypeError, "hold floats"),
        (torch.zeros(20, 20), ValueError, "has 2"),
        (np.zeros((20, 20)), ValueError, "has 2"),
        ("image.png", TypeError, "but got str"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_cannot_be_compared_is_refused(metric, image, error, message):
    """A number for the wrong thing is worse than none."""
    with pytest.raises(error, match=message):
        metric(image, torch.zeros(3, 20, 20))


def test_ssim_needs_its_window():
    """Below its window, torchmetrics would return NaN."""
    with pytest.raises(ValueError, match="at least 11×11 pixels, but these have 10×20"):
        ssim(torch.zeros(3, 20, 10), torch.zeros(3, 20, 10))


def test_importing_is_light():
    """Importing the module must not wait for torch and torchmetrics."""
    code = "import sys, agentsd.utils.metrics; sys.exit(bool({'torch', 'torchmetrics', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
