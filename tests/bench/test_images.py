"""The benchmark draws what was asked for, and judges each image by what it was to be."""

import numpy as np
import PIL.Image
import pytest
import torch
from bench_runs import quality
from models import tiny_sd

from agentsd.bench import BenchError, run_bench
from agentsd.bench.features import ClipFeatures, image_files
from agentsd.bench.measure import CaseTimer
from agentsd.bench.models import PipelineSubject
from agentsd.bench.set_metrics import clip_scores


PROMPTS = ("red apple", "blue heart")


def test_images_have_their_prompt_seed_guidance_and_size(model, tmp_path):
    """Prompts in turn, each image with the next seed."""
    wish = {"prompts": PROMPTS, "seed": 5, "guidance_scale": 2.0, "sizes": ((64, 96),)}
    run_bench(quality(model, methods=("baseline",), **wish), out=tmp_path)
    for index in range(3):
        expected = tiny_sd()(
            PROMPTS[index % 2],
            height=64,
            width=96,
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(5 + index),
        ).images[0]
        drawn = PIL.Image.open(tmp_path / f"images/tiny-96x64-batch1/baseline/{index:05d}.png")
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))


def test_fewer_steps_are_timed_and_drawn_with_fewer_steps(model, tmp_path, monkeypatch):
    monkeypatch.setattr(CaseTimer, "_fitting_steps", lambda *_: 2)
    taken, draw = set(), PipelineSubject.draw

    def watched(self, pipe, case, steps, *arguments, **options):
        taken.add((case.method, "timed" if options else "drawn", steps))
        return draw(self, pipe, case, steps, *arguments, **options)

    monkeypatch.setattr(PipelineSubject, "draw", watched)
    run_bench(quality(model, methods=("baseline", "fewer-steps"), steps=4), out=tmp_path)
    expected = {"baseline": 4, "fewer-steps": 2}
    assert taken == {(method, what, steps) for method, steps in expected.items() for what in ("timed", "drawn")}


def test_clip_score_is_that_of_each_image_s_own_prompt(model, clip, tmp_path):
    _, own = run_bench(quality(model, features=clip, prompts=PROMPTS), out=tmp_path).rows
    extractor = ClipFeatures(clip)
    drawn = extractor.images(image_files(tmp_path / "images/tiny-64x64-batch1/agentsd-0.4"))
    expected = clip_scores(drawn, extractor.texts([PROMPTS[0], PROMPTS[1], PROMPTS[0]]))
    assert own.quality["clip"] == [pytest.approx(np.mean(expected))]


def test_inception_judges_sets_without_texts(model, tmp_path, monkeypatch):
    """Its last features, which FID is defined by; a stand-in, as its weights are fetched."""
    built = []

    class Network(torch.nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            built.append((name, *features_list))

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            return pixels.double().mean(dim=(2, 3))

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Network)
    _, own = run_bench(quality(model, features="inception"), out=tmp_path).rows
    assert set(own.quality) == {"psnr", "ssim", "fid", "kid"}
    assert set(built) == {("inception-v3-compat", "2048")}


def test_a_reference_of_another_extractor_is_refused_before_anything_is_drawn(model, clip, tmp_path):
    with pytest.raises(BenchError, match="features per image"):
        run_bench(quality(model, features=clip, reference="emoji"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_large_images_have_a_multi_scale_similarity(model, tmp_path):
    _, own = run_bench(quality(model, sizes=((176, 176),), images=1, steps=1), out=tmp_path).rows
    assert 0 < own.quality["ms_ssim"][0] < 1
