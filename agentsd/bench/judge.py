"""Draws a set of pictures with each method and judges it: against vanilla's pictures, and as a set."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..metrics import MS_SSIM_SIDE, ms_ssim, psnr, ssim
from ..pictures import to_image
from .features import PerceptualDistance, load_extractor
from .intervals import bootstrap_mean, bootstrap_sets
from .reference import load_reference
from .set_metrics import clip_scores, frechet_distance, kernel_distance
from .settings import BenchSettings, Case, picture_folder
from .workers import Workers


@dataclass
class PictureJudge:
    """
    Draws and judges the pictures of one model.

    Args:
        subject (`PipelineSubject`): Draws.
        settings (`BenchSettings`): How many pictures, from which seeds, and how sets are compared.
        images (`Path`): Folder for the pictures; those that lie there already are not drawn again.
        workers (`Workers`): The processes that share the drawing.
        prompts (`tuple[str, ...]`): What is drawn, in turn.
    """

    subject: Any
    settings: BenchSettings
    images: Path
    workers: Workers
    prompts: tuple[str, ...]

    def judge(
        self,
        case: Case,
        baseline: Case,
        steps: int,
        model: Callable[[], Any],
        vanilla: Callable[[], Any],
    ) -> dict[str, Any]:
        """
        Draw the set of a case, and compare it with vanilla's.

        Args:
            case (`Case`): What is judged.
            baseline (`Case`): Vanilla at the same setting.
            steps (`int`): Denoising steps of the case.
            model (`Callable`): Gives the pipeline with the case's method on; asked only if something is to be drawn.
            vanilla (`Callable`): Gives the unpatched pipeline.

        Returns:
            `dict[str, Any]`: Numbers of pictures, and under `"quality"` each metric's value with the ends of its
            95 % interval. Only the main process has all of them.
        """
        reference = self._draw(baseline, self.settings.steps, vanilla)
        pictures = reference if case == baseline else self._draw(case, steps, model)
        self.workers.wait()  # until all have drawn their share
        if not self.workers.is_main:
            return {}
        is_bad = [_is_blank(file) for file in pictures]
        good = [file for file, bad in zip(pictures, is_bad, strict=True) if not bad]
        pairs = [
            (file, other)
            for file, other, bad in zip(pictures, reference, is_bad, strict=True)
            if case != baseline and not bad and not _is_blank(other)
        ]
        quality = {} if case == baseline else self._pairs(pairs)
        numbers = {"pictures": len(pictures), "blank": sum(is_bad)}
        sets = self._sets(good, pairs)
        scores = {**quality.pop("scores", {}), **sets}
        return {**numbers, **quality, "quality": scores}

    def _draw(self, case: Case, steps: int, model: Callable[[], Any]) -> list[Path]:
        """The files of a case's pictures, drawn by all processes together where they are not there yet."""
        folder = self.images / picture_folder(case)
        folder.mkdir(parents=True, exist_ok=True)
        count = self.settings.pictures
        files = [folder / f"{index:05d}.png" for index in range(count)]
        # The same pictures are drawn together however many processes there are, since a batch may round differently.
        chunks = [range(start, min(start + case.batch, count)) for start in range(0, count, case.batch)]
        for chunk in self.workers.share(chunks):
            if all(files[index].exists() for index in chunk):
                continue
            prompts = [self.prompts[index % len(self.prompts)] for index in chunk]
            seeds = [self.settings.seed + index for index in chunk]
            output = self.subject.draw(model(), case, steps, prompts, seeds)
            for index, picture in zip(chunk, output.images, strict=True):
                unfinished = files[index].with_suffix(".part")
                to_image(picture).save(unfinished, format="png")
                unfinished.replace(files[index])
        return files

    def _pairs(self, pairs: Sequence[tuple[Path, Path]]) -> dict[str, Any]:
        """Fidelity to the same seed's vanilla picture, over pairs of which neither is blank."""
        scores: dict[str, list[float]] = {"psnr": [], "ssim": [], "ms_ssim": [], "lpips": []}
        perceptual = PerceptualDistance() if self.settings.lpips else None
        identical = 0
        for file, other in pairs:
            first, second = _read(file), _read(other)
            value = psnr(first, second)
            if value == math.inf:
                identical += 1
            else:
                scores["psnr"].append(value)
            scores["ssim"].append(ssim(first, second))
            if min(first.size) >= MS_SSIM_SIDE:
                scores["ms_ssim"].append(ms_ssim(first, second))
            if perceptual is not None:
                scores["lpips"].append(perceptual(first, second))
        means = {name: bootstrap_mean(values) for name, values in scores.items() if values}
        return {"identical": identical, "scores": means}

    def _sets(self, pictures: Sequence[Path], pairs: Sequence[tuple[Path, Path]]) -> dict[str, Any]:
        """Distances between sets, where an extractor was named: to the reference, or else to vanilla's pictures."""
        if self.settings.features is None or not pictures:
            return {}
        extractor = load_extractor(self.settings.features)
        features = extractor.pictures(pictures)
        scores: dict[str, list[float]] = {}
        if self.settings.reference is not None:
            reference = load_reference(self.settings.reference, extractor)
            if len(pictures) > 1:
                scores["fid"] = bootstrap_sets(reference.frechet_distance, features)
                scores["kid"] = bootstrap_sets(reference.kernel_distance, features)
        elif len(pairs) > 1:
            own, vanilla = (extractor.pictures(files) for files in zip(*pairs, strict=True))
            scores["fid"] = bootstrap_sets(frechet_distance, own, vanilla)
            scores["kid"] = bootstrap_sets(partial(kernel_distance, paired=True), own, vanilla)
        texts = extractor.texts([self.prompts[int(file.stem) % len(self.prompts)] for file in pictures])
        if texts is not None:
            scores["clip"] = bootstrap_mean(clip_scores(features, texts))
        return scores


def _read(file: Path) -> PIL.Image.Image:
    with PIL.Image.open(file) as image:
        return image.convert("RGB")


def _is_blank(file: Path) -> bool:
    """Whether a picture is a single colour, as one of values that are not finite is shown."""
    return not np.ptp(np.asarray(_read(file)), axis=(0, 1)).any()
