"""Networks that judge images: extractors of features, for distances between sets, and LPIPS, for pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..utils.images import opened
from ..utils.libraries import how_to_install
from ..utils.loading import resolve_model
from ..utils.metrics import Image, to_tensor
from .store import BenchError


_BATCH = 16
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Extractor(Protocol):
    """Turns images, and perhaps texts, into features."""

    @property
    def width(self) -> int:
        """Number of features of an image."""

    def images(self, files: Sequence[Path]) -> np.ndarray:
        """Features of image files, of shape `(n, features)`."""

    def texts(self, prompts: Sequence[str]) -> np.ndarray | None:
        """Features of texts that compare with those of images, or `None` where there are none."""


def load_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """
    Load an extractor.

    `"emoji"` is the encoder that ships with the embedded model and knows its drawings only, `"inception"` the network
    that FID and KID are defined by; any other name is a folder or hub id of a CLIP model.
    """
    try:
        if name == "inception":
            return InceptionFeatures(device)
        return ClipFeatures(str(Path(resolve_model("emoji")) / "clip") if name == "emoji" else name, device)
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BenchError(
            f"The features of {name!r} are not available: {reason.rstrip('.')}. Inception downloads its weights, and "
            f"needs extra packages ({how_to_install('quality')}); a CLIP model is a folder or an id on the Hub."
        ) from error


class InceptionFeatures:
    """The 2,048 features of Inception v3 that FID and KID are defined by; its weights are fetched on first use."""

    width = 2048

    def __init__(self, device: torch.device | str = "cpu") -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3

        self._device = device
        try:
            self._model = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).to(device)
        except ModuleNotFoundError as error:
            raise ImportError(str(error)) from error

    def images(self, files: Sequence[Path]) -> np.ndarray:
        """See [`Extractor.images`]."""
        parts = []
        for start in range(0, len(files), _BATCH):
            arrays = [np.array(opened(file)) for file in files[start : start + _BATCH]]
            sizes = {array.shape for array in arrays}
            # Images of several sizes do not fit into one batch; the network scales each to its own size.
            for batch in [np.stack(arrays)] if len(sizes) == 1 else [array[None] for array in arrays]:
                pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._device)
                with torch.no_grad():
                    parts.append(_array(self._model(pixels)))
        return np.concatenate(parts)

    def texts(self, prompts: Sequence[str]) -> np.ndarray | None:
        """See [`Extractor.texts`]."""
        return None


class ClipFeatures:
    """The joint features of a CLIP model: a folder, or an id on the Hugging Face Hub; safetensors only."""

    def __init__(self, model: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        self._device = device
        self._model: Any = CLIPModel.from_pretrained(model, use_safetensors=True).eval().to(device)
        self._processor: Any = CLIPImageProcessor.from_pretrained(model)
        self._tokenizer: Any = CLIPTokenizerFast.from_pretrained(model)
        self.width: int = self._model.config.projection_dim

    @torch.no_grad()
    def images(self, files: Sequence[Path]) -> np.ndarray:
        """See [`Extractor.images`]."""
        parts = []
        for start in range(0, len(files), _BATCH):
            batch = [opened(file) for file in files[start : start + _BATCH]]
            pixels = self._processor(images=batch, return_tensors="pt").pixel_values
            states = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
            parts.append(_array(self._model.visual_projection(states)))
        return np.concatenate(parts)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> np.ndarray | None:
        """See [`Extractor.texts`]."""
        parts = []
        length = self._model.config.text_config.max_position_embeddings
        for start in range(0, len(prompts), _BATCH):
            tokens = self._tokenizer(
                list(prompts[start : start + _BATCH]),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            states = self._model.text_model(input_ids=tokens.input_ids.to(self._device)).pooler_output
            parts.append(_array(self._model.text_projection(states)))
        return np.concatenate(parts)


class PerceptualDistance:
    """LPIPS (R. Zhang et al., CVPR 2018) with AlexNet; its weights are fetched on first use."""

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
    def __call__(self, first: Image, second: Image) -> float:
        """The distance of two images of one size: 0 for the same image."""
        pixels = [to_tensor(image).to(self._device, torch.float32) for image in (first, second)]
        return float(self._metric(*pixels))


def image_files(folder: str | Path) -> list[Path]:
    """The images of a folder and of the folders in it, sorted; there must be two at least."""
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in _SUFFIXES)
    if len(files) < 2:
        raise BenchError(f"{folder} holds {len(files)} images ({', '.join(_SUFFIXES)}): name a folder with more.")
    return files


def _array(features: torch.Tensor) -> np.ndarray:
    return features.cpu().double().numpy()
