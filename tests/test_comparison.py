"""What came of a comparison: images that are no result, numbers, the table, the sheet of images, files."""

import json
import math
import statistics
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from comparisons import PROMPT, compare, draw, shown
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from models import tiny_sd
from transformers import CLIPConfig, CLIPImageProcessor

import agentsd
from agentsd.utils.generation import RunTime
from agentsd.utils.images import side_by_side


def test_seconds_per_step_are_those_of_all_steps():
    """With feature reuse, the first one runs the whole UNet: without it, steps would seem faster than they are."""
    assert RunTime(steps=[9.0, 1.0, 2.0, 6.0], total=19.0).seconds_per_step == 4.5
    assert RunTime(steps=[9.0], total=10.0).seconds_per_step == 9.0


def test_a_image_smaller_than_the_window_of_the_similarity():
    comparison = compare(tiny_sd(), PROMPT, steps=1, height=8, width=8)
    assert comparison.psnr is not None
    assert comparison.ssim is None


def test_values_that_are_not_finite_are_flagged():
    """Half-precision overflow ends in a black image: it is named, and gets no fidelity."""
    pipe = tiny_sd()
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, math.nan)
    comparison = compare(pipe, PROMPT, steps=1)
    assert [warning.split(" has ")[0] for warning in comparison.warnings] == [
        "The image without agentsd",
        "The image with agentsd",
    ]
    assert "not finite" in comparison.warnings[0]
    assert (comparison.psnr, comparison.ssim) == (None, None)
    assert comparison.baseline.getextrema() == ((0, 0), (0, 0), (0, 0))
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_black_image_is_flagged():
    """Two black images are identical, which is no success. In half precision the cure is named."""
    pipe = tiny_sd().to(torch.bfloat16)
    torch.nn.init.zeros_(pipe.vae.decoder.conv_out.weight)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, -1)
    comparison = compare(pipe, PROMPT, steps=1)
    assert len(comparison.warnings) == 2
    assert "is a single colour" in comparison.warnings[0]
    assert "try float32" in comparison.warnings[0]


def test_safety_checker_is_named():
    """The image it puts in place is black too, for another reason."""
    pipe = tiny_sd()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    torch.nn.init.constant_(checker.concept_embeds_weights, -1)  # a threshold that every image passes
    pipe.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    comparison = compare(pipe, PROMPT, steps=1)
    assert comparison.warnings[0] == "The safety checker replaced the image without agentsd with a black one."


def test_files(tmp_path):
    """What is saved is what was compared, and JSON that any reader takes (no NaN, no Infinity)."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    comparison = compare(tiny_sd(), PROMPT, steps=2, config=agentsd.AgentSDConfig(ratio=0))
    files = comparison.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "agentsd.png",
        "baseline.png",
        "comparison.json",
        "side_by_side.png",
    ]
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(files["baseline"])), np.asarray(comparison.baseline))
    saved = json.loads(files["comparison"].read_text(encoding="utf-8"), parse_constant=refuse)
    assert saved == json.loads(json.dumps(comparison.to_dict()))
    assert saved["settings"]["prompt"] == PROMPT
    assert saved["psnr"] is None
    assert saved["is_identical"]


def test_table_shows_any_prompt():
    """Prompts hold brackets (weights in some notations), which rich would swallow or fail on as markup."""
    assert "'apple [red] [/]', seed 0, 128×128, 1 steps" in shown(compare(tiny_sd(), "apple [red] [/]", steps=1))


PRESETS = ["paper", "balanced", "fast"]


@pytest.fixture(scope="module")
def presets():
    """Three presets, each of which ran as it is: with enough steps for feature reuse."""
    return compare(tiny_sd(), PROMPT, steps=9, configs=PRESETS)


def test_presets_draw_what_they_draw_alone(presets):
    assert list(presets.variants) == PRESETS
    np.testing.assert_array_equal(np.asarray(presets.baseline), draw(tiny_sd(), steps=9))
    for name, variant in presets.variants.items():
        expected = draw(agentsd.apply_patch(tiny_sd(), preset=name), steps=9)
        np.testing.assert_array_equal(np.asarray(variant.run.image), expected)
        assert variant.report.config == agentsd.AgentSDConfig.preset(name)
        assert variant.baseline is presets.baseline_run
    assert presets.agentsd is presets.variants["paper"].run.image
    assert len({variant.fidelity for variant in presets.variants.values()}) == 3


def test_presets_share_one_table(presets):
    heading, *rows = presets.rows()
    assert heading == ("", "baseline", *PRESETS)
    numbers = {name: cells for name, *cells in rows}
    assert list(numbers) == [
        *("per step", "speed-up per step", "total", "total speed-up"),
        *("peak memory", "PSNR", "SSIM"),
    ]
    for place, name in enumerate(PRESETS, 1):
        variant = presets.variants[name]
        assert [cells[place] for cells in numbers.values()] == [
            f"{variant.run.time.seconds_per_step:.3f} s",
            f"{variant.speed_up.value:.2f}×, timed once",
            f"{variant.run.time.total:.3f} s",
            f"{variant.total_speed_up.value:.2f}×, timed once",
            variant.run.peak,
            f"{variant.fidelity[0]:.2f} dB",
            f"{variant.fidelity[1]:.4f}",
        ]
    assert all(word in shown(presets) for word in heading)
    assert numbers["per step"][0] == f"{presets.baseline_time.seconds_per_step:.3f} s"


def test_presets_share_one_row_of_images(presets, monkeypatch):
    seen = []
    monkeypatch.setattr("agentsd.comparison.side_by_side", lambda *given: seen.append(given) or side_by_side(*given))
    assert replace(presets).side_by_side.width > 4 * 320
    (images, labels), *_ = seen
    assert images == [presets.baseline, *(variant.run.image for variant in presets.variants.values())]
    assert [label.split(":")[0] for label in labels] == ["baseline", *PRESETS]


def test_presets_share_one_file(presets, tmp_path):
    files = presets.save(tmp_path)
    assert list(files) == ["baseline", *PRESETS, "side_by_side", "comparison"]
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in files.values()}
    saved = json.loads(files["comparison"].read_text(encoding="utf-8"))
    assert list(saved["variants"]) == list(saved["settings"]["patches"]) == PRESETS
    for name, found in saved["variants"].items():
        variant = presets.variants[name]
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(files[name])), np.asarray(variant.run.image))
        assert found["speed_up"] == variant.speed_up.value
        assert found["psnr"] == variant.fidelity[0]
        assert found["total_seconds"] == variant.run.time.total
        assert found["report"]["config"] == saved["settings"]["patches"][name]
    # What there is beside a single patch, there is of each.
    alone = compare(tiny_sd(), PROMPT, steps=1).to_dict()
    assert alone.keys() - saved.keys() == {"agentsd", *found} - set(alone["agentsd"])


def test_one_patch_of_a_name_of_ones_own(tmp_path):
    """Its table and its images are those of two, its file that of several."""
    comparison = compare(tiny_sd(), PROMPT, steps=1, configs={"half": agentsd.AgentSDConfig(ratio=0.5)})
    assert comparison.rows()[0] == ("", "without agentsd", "with half", "speed-up")
    assert comparison.save(tmp_path)["half"].name == "half.png"
    assert comparison.to_dict()["variants"]["half"]["report"]["config"]["ratio"] == 0.5


def test_numbers_stand_under_the_run_that_they_are_of():
    comparison = compare(tiny_sd(), PROMPT, steps=2)
    before = [RunTime(steps=[step, step], total=9.0) for step in (2.0, 1.8, 2.1)]
    after = [RunTime(steps=[step, step], total=5.0) for step in (1.0, 0.9, 1.0)]
    baseline = replace(comparison.baseline_run, rounds=before, peak_bytes=2)
    variant = comparison.variants["agentsd"]
    variant = replace(variant, baseline=baseline, run=replace(variant.run, rounds=after, peak_bytes=1))
    comparison = replace(comparison, baseline_run=baseline, variants={"agentsd": variant})
    found = comparison.to_dict()
    assert found["rounds"] == 3
    for name, times, steps, total, peak in (
        ("baseline", before, [2.0, 2.0], 9.0, 2),
        ("agentsd", after, [1, 1], 5, 1),
    ):
        assert found[name] == {
            "seconds_per_step": statistics.fmean(steps),
            "step_seconds": steps,
            "total_seconds": total,
            "rounds": [{"total_seconds": time.total, "step_seconds": time.steps} for time in times],
            "peak_bytes": peak,
        }
    # Pairs of one round are compared: 2.0, 2.0 and 2.1.
    assert found["speed_up"] == comparison.speed_up == pytest.approx(statistics.geometric_mean([2.0, 2.0, 2.1]))
    assert [found["total_speed_up"], *found["total_speed_up_interval"]] == pytest.approx([1.8] * 3)
    low, high = found["speed_up_interval"]
    line = next(line for line in shown(comparison).splitlines() if "per step" in line)
    assert line.index("2.000 s") < line.index("1.000 s") < line.index(f"2.03× ({low:.2f}–{high:.2f})")


def test_the_sheet_has_each_image_under_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr("agentsd.comparison.side_by_side", lambda *given: seen.append(given) or side_by_side(*given))
    comparison = compare(tiny_sd(), PROMPT, steps=1)
    assert comparison.side_by_side is comparison.side_by_side
    (images, labels), *_ = seen
    assert images == [comparison.baseline, comparison.agentsd, comparison.difference]
    assert [label.split(":")[0] for label in labels[:2]] == ["without agentsd", "with agentsd"]
