"""Judging images: the same ones however they are drawn, in pairs and as sets, and what is wrong said in time."""

import json
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import torch
from bench_runs import quality
from diffusers import PNDMScheduler

from agentsd.bench import BenchError, BenchSettings, load_result, run_bench
from agentsd.bench.features import ClipFeatures, InceptionFeatures, image_files
from agentsd.bench.images import ImageJudge, read_prompts
from agentsd.bench.measure import CaseTimer
from agentsd.bench.models import PipelineSubject, plms
from agentsd.bench.run import subject_of
from agentsd.bench.set_metrics import ReferenceSet, check_reference, frechet_distance, kernel_distance
from agentsd.utils.loading import load_pipeline
from agentsd.utils.metrics import psnr


def images(folder):
    return {file.relative_to(folder).as_posix(): np.asarray(PIL.Image.open(file)) for file in image_files(folder)}


def test_images_are_drawn_and_judged_in_pairs(model, tmp_path):
    baseline, agentsd = run_bench(quality(model), out=tmp_path).rows
    drawn = images(tmp_path / "images")
    names = [f"tiny-64x64-batch1/{name}/0000{index}.png" for name in ("agentsd-0.4", "baseline") for index in range(3)]
    assert list(drawn) == names
    assert not np.array_equal(drawn[names[3]], drawn[names[4]])  # another prompt and seed
    errors = [np.mean((drawn[names[index]] / 255 - drawn[names[index + 3]] / 255) ** 2) for index in range(3)]
    (psnr,) = agentsd.quality["psnr"]
    assert psnr == pytest.approx(np.mean([-10 * np.log10(error) for error in errors]))
    assert agentsd.quality["ssim"][0] < 1
    assert "ms_ssim" not in agentsd.quality  # too small an image
    assert (baseline.quality, baseline.images, baseline.blank) == ({}, 3, 0)


def test_the_paper_suite_runs_on_a_model_of_ones_own(model, tmp_path):
    prompts = ("a photo of a goldfish", "a photo of a tench")
    with pytest.raises(BenchError, match=r"classes of ImageNet, .*--prompts FILE"):
        BenchSettings.of_suite("paper", models=(model,))
    given = {"ratios": (0.3,), "sizes": ((64, 64),), "steps": 3, "repeats": 1, "memory": False, "device": "cpu"}
    settings = BenchSettings.of_suite("paper", models=(model,), prompts=prompts, images=2, **given)
    rows = run_bench(settings, out=tmp_path).rows
    assert [row.name for row in rows] == ["baseline", "tomesd 0.3", "agentsd 0.3"]
    assert all(row.seconds > 0 and (row.steps, row.images, row.blank) == (3, 2, 0) for row in rows)
    assert all({"psnr", "ssim"} <= row.quality.keys() for row in rows[1:])
    subject = subject_of(model, settings, prompts[0], None)
    assert isinstance(subject.load().scheduler, PNDMScheduler)


def test_plms_draws_what_the_embedded_model_was_taught():
    """Its noise ends in no signal at all, which PLMS cannot start from and does not know of by itself."""
    pipe = load_pipeline("emoji", device="cpu")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe("a red apple", num_inference_steps=50, guidance_scale=4.0, generator=generator).images[0]

    own = draw()
    levels = pipe.scheduler.alphas_cumprod
    pipe.scheduler = plms(pipe.scheduler)
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, levels)
    assert psnr(draw(), own) > 28


def test_images_that_are_the_same_are_counted(model, tmp_path, monkeypatch):
    """`fewer-steps` is baseline where agentsd is no faster."""
    monkeypatch.setattr(CaseTimer, "_fitting_steps", lambda *arguments: 2)
    result = run_bench(quality(model, methods=("baseline", "fewer-steps")), out=tmp_path)
    row = result.rows[1]
    assert (row.steps, row.identical, row.quality) == (2, 3, {"ssim": [1.0]})
    assert "identical" in result.to_markdown()


@pytest.mark.parametrize("rows", [64, 40, 1])
def test_blank_images_are_counted_and_left_out(model, tmp_path, monkeypatch, rows):
    """A few values that are not finite are as bad as nothing else; a resumed run knows it from the file."""
    draw = PipelineSubject.draw

    def spoil(self, model, case, steps, prompts, seeds, **options):
        output = draw(self, model, case, steps, prompts, seeds, **options)
        if case.method == "agentsd" and seeds[0] == 1:
            output.images[0, :rows] = np.nan
        return output

    monkeypatch.setattr(PipelineSubject, "draw", spoil)
    result = run_bench(quality(model), out=tmp_path)
    _, agentsd = result.rows
    assert (agentsd.images, agentsd.blank) == (3, 1)
    assert agentsd.quality["psnr"][0] > 10  # black against an image would be far below
    assert "1 of 3" in result.to_markdown()
    cases = tmp_path / "cases.jsonl"
    cases.write_text(cases.read_text().splitlines(keepends=True)[0])
    assert run_bench(quality(model), out=tmp_path, resume=True).rows[1] == agentsd


def test_a_killed_set_is_drawn_to_its_end(model, tmp_path):
    settings = quality(model)
    whole = run_bench(settings, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cases = tmp_path / "cut" / "cases.jsonl"
    cases.write_text(cases.read_text().splitlines(keepends=True)[0])
    cut = tmp_path / "cut" / "images" / "tiny-64x64-batch1" / "agentsd-0.4" / "00001.png"
    cut.unlink()
    again = run_bench(settings, out=tmp_path / "cut", resume=True)
    assert again == whole
    first, second = images(tmp_path / "whole" / "images"), images(tmp_path / "cut" / "images")
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("methods", "total"), [(("baseline", "agentsd"), 10), (("agentsd", "fewer-steps"), 17)])
def test_progress_goes_by_calls_and_images(model, methods, total):
    """Without a leap: also over the baseline's images where it is not asked for, and calls that settle steps."""
    told = []
    run_bench(quality(model, methods=methods), progress=lambda what, done, total: told.append((done, total)))
    assert told == [(done, total) for done in range(total + 1)]


def test_progress_begins_where_a_run_was_cut_off(model, tmp_path):
    def interrupt(what, done, total):
        if done == 8:  # the second image of agentsd, after four calls and four images
            assert what.endswith("64×64 agentsd 0.4 images")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(quality(model), out=tmp_path, progress=interrupt)
    told = []
    run_bench(quality(model), out=tmp_path, resume=True, progress=lambda what, done, total: told.append(done))
    assert told == [8, 9, 10]


def test_what_cannot_run_counts_as_done(model, monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, "tomesd", None)
    run_bench(quality(model, methods=("tomesd", "baseline")), progress=lambda what, done, total: told.append(done))
    assert told == [5, 6, 7, 8, 9, 10]


def test_memory_that_runs_out_while_drawing_costs_one_row(model, tmp_path, monkeypatch):
    judge = ImageJudge.judge

    def greedy(self, case, *arguments):
        if case.method == "agentsd":
            torch.empty(2**46, dtype=torch.uint8)  # 64 TiB
        return judge(self, case, *arguments)

    monkeypatch.setattr(ImageJudge, "judge", greedy)
    baseline, agentsd = run_bench(quality(model), out=tmp_path).rows
    assert baseline.reason is None
    assert agentsd.reason == "out of memory"


# The command, which leaves a file for each image that a process draws.
WITNESS = """
import os
from pathlib import Path
from agentsd.bench.models import PipelineSubject
from agentsd.cli import main

def draw(self, model, case, steps, prompts, seeds, **options):
    if not options:  # otherwise it is timed
        for seed in seeds:
            Path(__file__).with_name(f"process-{os.environ['RANK']}-{case.method}-{seed}").touch()
    return original(self, model, case, steps, prompts, seeds, **options)

original = PipelineSubject.draw
PipelineSubject.draw = draw
main()
"""


def test_two_processes_draw_the_same_images(model, tmp_path):
    command = ["bench", model, "--suite", "quality", "--methods", "baseline,tomesd", "--prompts", "5", "--steps", "1"]
    command += "--repeats 1 --no-memory --device cpu --height 64 --width 64 --batch 2 --out".split()
    alone = subprocess.run(
        [sys.executable, "-m", "agentsd", *command, str(tmp_path / "one")], capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr
    script = tmp_path / "witness.py"
    script.write_text(WITNESS)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += "--num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no".split()
    both = subprocess.run(
        [*launcher, str(script), *command, str(tmp_path / "two")], capture_output=True, text=True, check=False
    )
    assert both.returncode == 0, both.stderr
    drawn = {
        rank: sorted(file.name.split("-", 2)[2] for file in tmp_path.glob(f"process-{rank}-*")) for rank in (0, 1)
    }
    assert drawn == {
        0: [f"{method}-{seed}" for method in ("baseline", "tomesd") for seed in (0, 1, 4)],
        1: [f"{method}-{seed}" for method in ("baseline", "tomesd") for seed in (2, 3)],
    }
    first, second = (images(tmp_path / name / "images") for name in ("one", "two"))
    assert len(first) == 10
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "cases.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [row["quality"] for row in rows[0]] == [row["quality"] for row in rows[1]]
    assert both.stdout.count("report.md") == 1


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
    own = quality("emoji", images=3, sizes=())
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reference": "somewhere"}, r"name one as `features`"),
        ({"sizes": ((8, 64),)}, "SSIM needs at least 11 pixels per side"),
        ({"seed": -1}, "`seed` must lie between"),
        ({"models": ("sd15",)}, "suite 'shapes'"),
        ({"suite": "speed", "features": "emoji"}, "judges no images"),
        ({"suite": "speed", "lpips": True}, "judges no images"),
    ],
)
def test_what_would_be_ignored_or_fail_late_is_refused(values, message):
    suite = values.pop("suite", "quality")
    with pytest.raises(BenchError, match=message):
        BenchSettings.of_suite(suite, **{"models": ("somebody/else",), **values})


def test_a_image_that_cannot_be_read_is_named(model, tmp_path):
    run_bench(quality(model), out=tmp_path)
    cases = tmp_path / "cases.jsonl"
    cases.write_text(cases.read_text().splitlines(keepends=True)[0])
    file = next((tmp_path / "images").rglob("agentsd-0.4/00001.png"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BenchError, match=r"00001\.png cannot be read"):
        run_bench(quality(model), out=tmp_path, resume=True)


def test_features_of_a_image_are_computed_once(model, clip, tmp_path, monkeypatch):
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


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red apple\n\n  a tiger face \n", encoding="utf-8")
    assert read_prompts(file) == ("a red apple", "a tiger face")
    file.write_text("\n")
    with pytest.raises(BenchError, match="no prompts"):
        read_prompts(file)
    with pytest.raises(BenchError, match="Cannot read the prompts"):
        read_prompts(tmp_path / "none.txt")
