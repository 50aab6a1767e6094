"""LPIPS: how different two images look to a network that was fitted to people's judgement."""

import PIL.Image
import torch

from ..utils.libraries import how_to_install
from ..utils.metrics import to_tensor
from .store import BenchError


class PerceptualDistance:
    """
    LPIPS (R. Zhang et al., CVPR 2018) with AlexNet, whose weights are fetched on first use.

    Args:
        device (`torch.device` or `str`, defaults to `"cpu"`): Where it runs.

    Raises:
        BenchError: If a package or the weights cannot be had.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self._metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise BenchError(
                f"LPIPS is unavailable: {' '.join(str(error).split())[:300].rstrip('.')}. It fetches its weights, and "
                f"needs more packages ({how_to_install('quality')})."
            ) from error

    @torch.no_grad()
    def __call__(self, first: PIL.Image.Image, second: PIL.Image.Image) -> float:
        """
        The distance of two images.

        Args:
            first (`PIL.Image.Image`): One.
            second (`PIL.Image.Image`): The other, of the same size.

        Returns:
            `float`: 0 for the same image.
        """
        pixels = [to_tensor(image).to(self._device, torch.float32) for image in (first, second)]
        return float(self._metric(*pixels))
