"""Images: drawn as asked for, the same ones however they are drawn, and judged in pairs."""

import json
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from bench_runs import quality
from diffusers import PNDMScheduler
from models import tiny_sd
from typer.testing import CliRunner

import agentsd
from agentsd.bench import BenchError, BenchSettings, run_bench
from agentsd.bench.features import image_files
from agentsd.bench.images import ImageJudge, read_prompts
from agentsd.bench.measure import CaseTimer
from agentsd.bench.models import PipelineSubject
from agentsd.bench.run import subject_of
from agentsd.cli import app


PROMPTS = ("red apple", "blue heart")


def images(folder):
    return {file.relative_to(folder).as_posix(): np.asarray(PIL.Image.open(file)) for file in image_files(folder)}


def test_images_have_their_prompt_seed_guidance_and_size(model, tmp_path):
    """Prompts in turn, each image with the next seed."""
    asked = {"prompts": PROMPTS, "seed": 5, "guidance_scale": 2.0, "sizes": ((64, 96),)}
    run_bench(quality(model, methods=("baseline",), **asked), out=tmp_path)
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

    def watched(self, pipe, case, steps, prompts, seeds, end_of_step=None):
        taken.add((case.method, "drawn" if end_of_step is None else "timed", steps))
        return draw(self, pipe, case, steps, prompts, seeds, end_of_step)

    monkeypatch.setattr(PipelineSubject, "draw", watched)
    run_bench(quality(model, methods=("baseline", "fewer-steps"), steps=4), out=tmp_path)
    expected = {"baseline": 4, "fewer-steps": 2}
    assert taken == {(method, what, steps) for method, steps in expected.items() for what in ("timed", "drawn")}


def test_large_images_have_a_multi_scale_similarity(model, tmp_path):
    _, own = run_bench(quality(model, sizes=((176, 176),), images=1, steps=1), out=tmp_path).rows
    assert 0 < own.quality["ms_ssim"][0] < 1


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

    def spoil(self, model, case, steps, prompts, seeds, end_of_step=None):
        output = draw(self, model, case, steps, prompts, seeds, end_of_step)
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


def test_what_compiled_code_refuses_while_drawing_costs_one_row(model, tmp_path, monkeypatch):
    def compile(unet, **_):
        if agentsd.is_patched(unet):
            unet.register_forward_pre_hook(refuse)
        return unet

    def refuse(*_):
        raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten")

    monkeypatch.setattr(torch, "compile", compile)
    baseline, patched = run_bench(quality(model, repeats=0, compile="reduce-overhead"), out=tmp_path).rows
    assert baseline.reason is None
    assert patched.reason == "RuntimeError: accessing tensor output of CUDAGraphs that has been overwritten"


# The command, which leaves a file for each image that a process draws.
WITNESS = """
import os
from pathlib import Path
from agentsd.bench.models import PipelineSubject
from agentsd.cli import main

def draw(self, model, case, steps, prompts, seeds, end_of_step=None):
    if end_of_step is None:  # otherwise it is timed
        for seed in seeds:
            Path(__file__).with_name(f"process-{os.environ['RANK']}-{case.method}-{seed}").touch()
    return original(self, model, case, steps, prompts, seeds, end_of_step)

original = PipelineSubject.draw
PipelineSubject.draw = draw
main()
"""


def test_two_processes_draw_the_same_images(model, tmp_path):
    command = ["bench", model, "--suite", "quality", "--methods", "baseline,tomesd", "--prompts", "5", "--steps", "1"]
    command += "--repeats 1 --no-memory --device cpu --height 64 --width 64 --batch 2 --out".split()
    alone = CliRunner().invoke(app, [*command, str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.stderr
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


def test_an_image_that_cannot_be_read_is_named(model, tmp_path):
    run_bench(quality(model), out=tmp_path)
    cases = tmp_path / "cases.jsonl"
    cases.write_text(cases.read_text().splitlines(keepends=True)[0])
    file = next((tmp_path / "images").rglob("agentsd-0.4/00001.png"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BenchError, match=r"00001\.png cannot be read"):
        run_bench(quality(model), out=tmp_path, resume=True)


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red apple\n\n  a tiger face \n", encoding="utf-8")
    assert read_prompts(file) == ("a red apple", "a tiger face")
    file.write_text("\n")
    with pytest.raises(BenchError, match="no prompts"):
        read_prompts(file)
    with pytest.raises(BenchError, match="Cannot read the prompts"):
        read_prompts(tmp_path / "none.txt")
