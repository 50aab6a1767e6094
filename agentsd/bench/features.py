"""Extractors of image features, for distances between sets of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..utils.images import opened
from ..utils.libraries import how_to_install
from ..utils.loading import resolve_model
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

    Args:
        name (`str`):
            `"emoji"` for the encoder that ships with the embedded model and knows its drawings only, `"inception"`
            for the network that FID and KID are defined by, or a folder or hub id of a CLIP model.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where it is to run.

    Returns:
        `Extractor`: The extractor.

    Raises:
        BenchError: If a package or the weights cannot be had.
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
    """
    The 2,048 features of Inception v3 that FID and KID are defined by; its weights are fetched on first use.

    Args:
        device (`torch.device` or `str`, defaults to `"cpu"`): Where it runs.
    """

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
        rows = []
        for start in range(0, len(files), _BATCH):
            arrays = [np.array(opened(file)) for file in files[start : start + _BATCH]]
            sizes = {array.shape for array in arrays}
            # Images of several sizes do not fit into one batch; the network scales each to its own size.
            for batch in [np.stack(arrays)] if len(sizes) == 1 else [array[None] for array in arrays]:
                pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._device)
                with torch.no_grad():
                    rows.append(_rows(self._model(pixels)))
        return np.concatenate(rows)

    def texts(self, prompts: Sequence[str]) -> np.ndarray | None:
        """See [`Extractor.texts`]."""
        return None


class ClipFeatures:
    """
    The joint features of a CLIP model.

    Args:
        model (`str`): A folder, or an id on the Hugging Face Hub; safetensors only.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where it runs.
    """

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
        rows = []
        for start in range(0, len(files), _BATCH):
            batch = [opened(file) for file in files[start : start + _BATCH]]
            pixels = self._processor(images=batch, return_tensors="pt").pixel_values
            states = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
            rows.append(_rows(self._model.visual_projection(states)))
        return np.concatenate(rows)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> np.ndarray | None:
        """See [`Extractor.texts`]."""
        rows = []
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
            rows.append(_rows(self._model.text_projection(states)))
        return np.concatenate(rows)


def image_files(folder: str | Path) -> list[Path]:
    """
    The images of a folder and of the folders in it, sorted.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `list[Path]`: Files.

    Raises:
        BenchError: If there are fewer than two.
    """
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in _SUFFIXES)
    if len(files) < 2:
        raise BenchError(f"{folder} holds {len(files)} images ({', '.join(_SUFFIXES)}): name a folder with more.")
    return files


def _rows(features: torch.Tensor) -> np.ndarray:
    return features.cpu().double().numpy()
