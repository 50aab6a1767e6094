"""Draws a set of images with each method and judges it: against the baseline's images, and as a set."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..utils.images import drawn_images, opened, to_image
from ..utils.intervals import bootstrap_mean, jackknife
from ..utils.loading import resolve_model
from ..utils.metrics import MS_SSIM_SIDE, ms_ssim, psnr, ssim, to_tensor
from .features import Extractor, PerceptualDistance, load_extractor
from .rows import Case, image_folder
from .set_metrics import ReferenceSet, check_reference, clip_scores, frechet_distance, kernel_distance, load_reference
from .settings import BenchSettings
from .store import BenchError
from .workers import Workers


# A covariance needs two images, and an interval sets with some of them left out.
_SMALLEST_SET = 3


@dataclass
class ImageJudge:
    """
    Draws and judges the images of one model, the prompts in turn.

    Images that lie in the folder already are not drawn again. `on_draw` gets the name of a case and a number of images
    before each drawing.
    """

    subject: Any
    settings: BenchSettings
    images: Path
    workers: Workers
    prompts: tuple[str, ...]
    on_draw: Callable[[str, int], None]
    # The baseline's images are compared with again and again.
    _known: dict[Path, np.ndarray] = field(default_factory=dict, init=False)

    @cached_property
    def _extractor(self) -> Extractor | None:
        name = self.settings.features
        return None if name is None else load_extractor(name, self.subject.device)

    @cached_property
    def _perceptual(self) -> PerceptualDistance | None:
        return PerceptualDistance(self.subject.device) if self.settings.lpips else None

    @cached_property
    def _reference(self) -> ReferenceSet | None:
        name = self.settings.reference
        return None if name is None or self._extractor is None else load_reference(name, self._extractor)

    def judge(
        self,
        case: Case,
        baseline_case: Case,
        steps: int,
        model: Callable[[], Any],
        baseline: Callable[[], Any],
    ) -> dict[str, Any]:
        """
        Draw the set of a case, and compare it with the baseline's.

        `model` and `baseline` give the pipelines, and are asked only if something is to be drawn. What comes back is
        numbers of images and, under `"quality"`, each metric's value with the ends of its 95% interval; only the main
        process has all of them.
        """
        others = self._draw(baseline_case, self.settings.steps, baseline)
        images = others if case == baseline_case else self._draw(case, steps, model)
        self.workers.wait()  # until all have drawn their share
        if not self.workers.is_main:
            return {}
        good = [file for file in images if not _is_blank(file)]
        pairs = [
            (file, other)
            for file, other in zip(images, others, strict=True)
            if case != baseline_case and file in good and not _is_blank(other)
        ]
        identical, fidelity = self._pairs(pairs)
        return {
            "images": len(images),
            "blank": len(images) - len(good),
            "identical": identical,
            "quality": {**fidelity, **self._sets(good, pairs)},
        }

    def _draw(self, case: Case, steps: int, model: Callable[[], Any]) -> list[Path]:
        """The files of a case's images, drawn by all processes together where they are not there yet."""
        folder = self.images / image_folder(case)
        folder.mkdir(parents=True, exist_ok=True)
        count = self.settings.images
        files = [folder / f"{index:05d}.png" for index in range(count)]
        # The same images are drawn together however many processes there are, since a batch may round differently.
        chunks = [range(start, min(start + case.batch, count)) for start in range(0, count, case.batch)]
        for chunk in self.workers.share(chunks):
            if all(files[index].exists() for index in chunk):
                continue
            prompts = [self.prompts[index % len(self.prompts)] for index in chunk]
            seeds = [self.settings.seed + index for index in chunk]
            self.on_draw(case.name, len(chunk))
            output = self.subject.draw(model(), case, steps, prompts, seeds)
            for index, image in zip(chunk, drawn_images(output), strict=True):
                # Files have no NaN: kept all black, such an image counts as blank on a resume too.
                whole = image if np.isfinite(image).all() else np.zeros_like(image)
                unfinished = files[index].with_suffix(".part")
                to_image(whole).save(unfinished, format="png")
                unfinished.replace(files[index])
        return files

    def _pairs(self, pairs: Sequence[tuple[Path, Path]]) -> tuple[int, dict[str, list[float]]]:
        """How many pairs are identical, and fidelity to the baseline's image of the same seed; neither is blank."""
        scores: dict[str, list[float]] = {"psnr": [], "ssim": [], "ms_ssim": [], "lpips": []}
        identical = 0
        for file, other in pairs:
            first, second = self._pixels(file), self._pixels(other)
            value = psnr(first, second)
            if value == math.inf:
                identical += 1
            else:
                scores["psnr"].append(value)
            scores["ssim"].append(ssim(first, second))
            if min(first.shape[-2:]) >= MS_SSIM_SIDE:
                scores["ms_ssim"].append(ms_ssim(first, second))
            if self._perceptual is not None:
                scores["lpips"].append(self._perceptual(first, second))
        return identical, {name: bootstrap_mean(values) for name, values in scores.items() if values}

    def _pixels(self, file: Path) -> torch.Tensor:
        """An image as metrics take it: on the GPU, if there is one, for structural similarity takes a CPU long."""
        pixels = to_tensor(_read(file))
        return pixels.to(self.subject.device) if self.subject.device.type == "cuda" else pixels

    def _sets(self, images: Sequence[Path], pairs: Sequence[tuple[Path, Path]]) -> dict[str, list[float]]:
        """What needs the features of whole sets, where an extractor was named."""
        if self._extractor is None or not images:
            return {}
        scores = self._set_scores(self._extractor, images)
        return {**scores, **self._set_changes(self._extractor, pairs)} if pairs else scores

    def _set_scores(self, extractor: Extractor, images: Sequence[Path]) -> dict[str, list[float]]:
        """A set by itself: how far it is from the reference, and how well its images fit their prompts."""
        features, texts = self._features(extractor, images), self._texts(extractor, images)
        reference = self._reference
        scores: dict[str, list[float]] = {}
        if reference is not None and len(images) >= _SMALLEST_SET:
            scores["fid"] = jackknife(reference.frechet_distance, features)
            scores["kid"] = jackknife(reference.kernel_distance, features)
            if floor := reference.floor(len(images)):
                scores["fid_floor"] = floor
        if texts is not None:
            scores["clip"] = bootstrap_mean(clip_scores(features, texts))
        return scores

    def _set_changes(self, extractor: Extractor, pairs: Sequence[tuple[Path, Path]]) -> dict[str, list[float]]:
        """
        A set beside the baseline's images of the same seeds: how far it is from them; or, where there is a reference,
        how much farther from that. What such methods change is far less than what the choice of seeds does, so that
        the intervals of the two distances would say little about their difference.
        """
        files, others = zip(*pairs, strict=True)
        own, baseline = self._features(extractor, files), self._features(extractor, others)
        texts, reference = self._texts(extractor, files), self._reference
        scores: dict[str, list[float]] = {}
        if len(pairs) >= _SMALLEST_SET and reference is None:
            scores["fid"] = jackknife(frechet_distance, own, baseline)
            scores["kid"] = jackknife(partial(kernel_distance, paired=True), own, baseline)
        elif len(pairs) >= _SMALLEST_SET and reference is not None:
            for name, distance in (("fid", reference.frechet_distance), ("kid", reference.kernel_distance)):
                scores[f"{name}_change"] = jackknife(lambda a, b, to=distance: to(a) - to(b), own, baseline)
        if texts is not None:
            changes = np.subtract(clip_scores(own, texts), clip_scores(baseline, texts))
            scores["clip_change"] = bootstrap_mean(changes.tolist())
        return scores

    def _features(self, extractor: Extractor, images: Sequence[Path]) -> np.ndarray:
        """Features of images, computed once for each."""
        new = [file for file in images if file not in self._known]
        if new:
            self._known.update(zip(new, extractor.images(new), strict=True))
        return np.stack([self._known[file] for file in images])

    def _texts(self, extractor: Extractor, images: Sequence[Path]) -> np.ndarray | None:
        """Features of what the images were to show."""
        return extractor.texts([self.prompts[int(file.stem) % len(self.prompts)] for file in images])


def check_metrics(settings: BenchSettings) -> None:
    """See that the networks and the reference that a run needs can be had, before hours of drawing."""
    if settings.lpips:
        PerceptualDistance()
    if settings.features is not None:
        extractor = load_extractor(settings.features)
        if settings.reference is not None:
            check_reference(settings.reference, extractor)


def builtin_prompts() -> tuple[str, ...]:
    """A plain prompt for everything that the embedded model has learned to draw."""
    training = Path(resolve_model("emoji")) / "training.json"
    return tuple(json.loads(training.read_text(encoding="utf-8"))["prompts"])


def read_prompts(file: str | Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines are left out."""
    try:
        # With or without the mark that Windows' editors put in front.
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"Cannot read the prompts in {file}: {error}.") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise BenchError(f"{file} holds no prompts: write one on each line.")
    return prompts


def _read(file: Path) -> PIL.Image.Image:
    try:
        return opened(file)
    except OSError as error:
        raise BenchError(f"The image {file} cannot be read ({error}). Delete it and resume with --resume.") from error


def _is_blank(file: Path) -> bool:
    """Whether an image is a single colour, as one with values that are not finite is kept."""
    return not np.ptp(np.asarray(_read(file)), axis=(0, 1)).any()
