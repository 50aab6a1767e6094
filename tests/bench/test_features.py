"""Networks that judge: features of images, references, LPIPS, and what is missing said in time."""

import sys

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import torch
from bench_runs import quality

from agentsd.bench import BenchError, BenchSettings, load_result, run_bench
from agentsd.bench.features import ClipFeatures, InceptionFeatures, image_files
from agentsd.bench.set_metrics import ReferenceSet, check_reference, clip_scores, frechet_distance, kernel_distance


PROMPTS = ("red apple", "blue heart")


def images(folder):
    return {file.relative_to(folder).as_posix(): np.asarray(PIL.Image.open(file)) for file in image_files(folder)}


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


def test_sets_are_compared_by_the_features_of_a_clip_model(model, clip, tmp_path):
    baseline, agentsd = run_bench(quality(model, features=clip), out=tmp_path).rows
    assert set(agentsd.quality) == {"psnr", "ssim", "fid", "kid", "clip", "clip_change"}
    assert set(baseline.quality) == {"clip"}  # there is nothing to compare the baseline's images with
    folder = tmp_path / "images" / "tiny-64x64-batch1"
    extractor = ClipFeatures(clip)
    one, other = (extractor.images(image_files(folder / name)) for name in ("agentsd-0.4", "baseline"))
    assert agentsd.quality["fid"][0] == pytest.approx(frechet_distance(one, other))
    assert agentsd.quality["kid"][0] == pytest.approx(kernel_distance(one, other, paired=True))


def test_sets_are_compared_with_real_images(model, clip, tmp_path):
    for index in range(3):
        noise = np.random.default_rng(index).integers(256, size=(64, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / f"{index}.png")
    rows = run_bench(quality(model, features=clip, reference=str(tmp_path)), out=tmp_path / "out").rows
    assert all({"fid", "kid"} <= set(row.quality) for row in rows)


def test_the_embedded_model_brings_its_own_features(tmp_path):
    own = quality("emoji", images=3, sizes=((128, 128),))
    assert own.features == own.reference == "emoji"
    other = quality("emoji", features="inception")
    assert (other.features, other.reference) == ("inception", None)
    assert quality("somebody/else").features is None
    assert BenchSettings.of_suite("speed").features is None
    rows = run_bench(own, out=tmp_path).rows
    assert all({"fid", "kid", "clip", "fid_floor"} <= row.quality.keys() for row in rows)
    baseline, agentsd = (row.quality for row in rows)
    for name in ("fid", "kid", "clip"):
        assert agentsd[f"{name}_change"] == pytest.approx([agentsd[name][0] - baseline[name][0]])
        assert f"{name}_change" not in baseline
    notes = " ".join(load_result(tmp_path).notes())
    assert "features of emoji" in notes and "fresh renders" in notes
    assert f"reference itself have FID {baseline['fid_floor'][0]:.1f}" in notes


def test_features_of_an_image_are_computed_once(model, clip, tmp_path, monkeypatch):
    """Those of the baseline's images are compared with for every other method."""
    seen = []
    compute = ClipFeatures.images
    monkeypatch.setattr(ClipFeatures, "images", lambda self, files: seen.extend(files) or compute(self, files))
    run_bench(quality(model, methods=("baseline", "agentsd", "todo"), features=clip), out=tmp_path)
    assert len(seen) == len(set(seen)) == 9


def test_inception_takes_images_of_several_sizes(tmp_path):
    """A folder to compare with may hold any images. The real network's weights cannot be had offline."""
    for index, size in enumerate([(40, 30), (32, 32), (40, 30)]):
        PIL.Image.new("RGB", size, (index, 0, 0)).save(tmp_path / f"{index}.png")
    extractor = object.__new__(InceptionFeatures)
    extractor._device = "cpu"
    extractor._model = lambda batch: batch.float().mean(dim=(2, 3))
    assert extractor.images(image_files(tmp_path)).tolist() == [[index, 0, 0] for index in range(3)]


def test_a_kept_reference_is_as_good_as_its_images(model, clip, tmp_path):
    """Up to the rounding of its file."""
    (tmp_path / "real").mkdir()
    for index in range(6):
        noise = np.random.default_rng(index).integers(256, size=(64, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / "real" / f"{index}.png")
    kept = str(tmp_path / "kept.safetensors")
    ReferenceSet.of(ClipFeatures(clip).images(image_files(tmp_path / "real"))).save(kept)
    first, second = (
        run_bench(quality(model, features=clip, reference=name), out=tmp_path / out).rows
        for name, out in ((str(tmp_path / "real"), "a"), (kept, "b"))
    )
    for one, other in zip(first, second, strict=True):
        for metric in ("fid", "kid"):
            assert other.quality[metric] == pytest.approx(one.quality[metric], rel=0.02, abs=1e-3)


def test_a_reference_that_does_not_fit_is_explained(clip, tmp_path):
    file = tmp_path / "kept.safetensors"
    ReferenceSet.of(np.eye(4, 3)).save(file)
    with pytest.raises(BenchError, match="3 features per image, but these images have 5"):
        ReferenceSet.load(file).frechet_distance(np.eye(5))
    with pytest.raises(BenchError, match="3 features per image, but these images have 5"):
        ReferenceSet.load(file).kernel_distance(np.eye(5))
    with pytest.raises(BenchError, match="Cannot read the reference set"):
        check_reference(str(tmp_path / "none.safetensors"), ClipFeatures(clip))
    safetensors.numpy.save_file({"mean": np.ones(2)}, str(file))
    with pytest.raises(BenchError, match="is not a reference set: it holds mean"):
        check_reference(str(file), ClipFeatures(clip))


def test_features_that_cannot_be_had_are_an_error_before_anything_is_drawn(model, clip, tmp_path):
    with pytest.raises(BenchError, match=r"features of '.*nowhere' are not available"):
        run_bench(quality(model, features=str(tmp_path / "nowhere")), out=tmp_path / "out")
    with pytest.raises(BenchError, match="holds 0 images"):
        run_bench(quality(model, features=clip, reference=str(tmp_path)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_learned_metrics_say_what_they_need(model, tmp_path, monkeypatch):
    """Their packages are an extra, and their weights are fetched."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for values in ({"lpips": True}, {"features": "inception"}):
        with pytest.raises(BenchError, match=r"(are not available|is unavailable): .*\.\[quality\]"):
            run_bench(quality(model, **values), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lpips_is_a_column_like_the_others(model, tmp_path, monkeypatch):
    """With a stand-in for its network, whose weights would have to be fetched."""
    built = []

    class Difference(torch.nn.Module):
        def __init__(self, net_type, normalize):
            super().__init__()
            built.append((net_type, normalize))

        def forward(self, first, second):
            assert first.shape == second.shape == (1, 3, 64, 64)
            return (first - second).abs().mean()

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Difference)
    result = run_bench(quality(model, lpips=True), out=tmp_path)
    drawn = images(tmp_path / "images")
    names = [name for name in drawn if "baseline" in name]
    pairs = [(drawn[name.replace("baseline", "agentsd-0.4")], drawn[name]) for name in names]
    expected = np.mean([np.abs(first / 255 - second / 255).mean() for first, second in pairs])
    assert result.rows[1].quality["lpips"] == [pytest.approx(expected, abs=1e-6)]
    assert "| LPIPS |" in result.to_markdown()
    assert set(built) == {("alex", True)}
    assert len(built) == 2, "once to see whether it can be had, and once for all cases"
