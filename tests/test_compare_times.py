"""agentsd.compare: times that mean something, of one patch and of several."""

import warnings

import pytest
import torch
from comparisons import PROMPT, compare, shown
from compat_models import image, with_unet
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from models import ONE_LEVEL, tiny_sd

import agentsd
from agentsd.utils.timing import time_rounds


def test_progress_counts_the_steps_of_every_image():
    """Also of the warm-ups, which can be cancelled as well."""
    seen = []
    comparison = compare(tiny_sd(), PROMPT, steps=4, progress=lambda *step: seen.append(step))
    for variant in ("baseline", "agentsd"):
        for what, total in (("warm-up", 3), ("round 1", 4)):
            counts = [step[1:] for step in seen if step[0] == f"{variant}, {what}"]
            assert counts == [(done, total) for done in range(total + 1)]
    assert len(seen) == 2 * (4 + 5)
    assert len(comparison.baseline_time.steps) == len(comparison.agentsd_time.steps) == 4
    assert comparison.baseline_time.total > sum(comparison.baseline_time.steps) > 0


def drawn(seen):
    """The images that progress told of, in order."""
    return list(dict.fromkeys(what for what, done, _ in seen if done))


def test_rounds_are_interleaved_in_alternating_order():
    """What drifts (heat, a neighbour's load) must not be taken for a difference. Nothing comes between two rounds."""
    seen = []
    comparison = compare(tiny_sd(), PROMPT, steps=1, seconds=0.5, progress=lambda *step: seen.append(step))
    *warm_ups, first, second, third, fourth, fifth, sixth = drawn(seen)[:8]
    assert {name.split(", ")[1] for name in warm_ups} == {"warm-up"} and len(warm_ups) == 2
    assert [first, second] == ["baseline, round 1", "agentsd, round 1"]
    assert [third, fourth] == ["agentsd, round 2", "baseline, round 2"]
    assert [fifth, sixth] == ["baseline, round 3", "agentsd, round 3"]
    assert comparison.rounds == len(drawn(seen)) // 2 - 1 >= 3
    assert len(comparison.agentsd_run.rounds) == len(comparison.baseline_run.rounds)
    low, high = comparison.speed_up_interval
    assert low < comparison.speed_up < high


def with_step_times(monkeypatch, of_baseline, of_agentsd):
    """A clock that stands still but in the steps of timed images: these take a time from a list, round by round."""
    now = 0.0
    monkeypatch.setattr("agentsd.utils.timing.time.perf_counter", lambda: now)

    def progress(what, done, total):
        nonlocal now
        name, part = what.split(", ")
        times = {"baseline": of_baseline, "agentsd": of_agentsd}[name]
        if part.startswith("round") and done < total:
            now += times[(int(part.split()[1]) - 1) % len(times)]

    return progress


def test_a_clear_difference_takes_three_rounds(monkeypatch):
    progress = with_step_times(monkeypatch, [1.0, 1.01, 0.99], [0.5, 0.505, 0.5])
    comparison = compare(tiny_sd(), PROMPT, steps=2, seconds=1000, progress=progress)
    assert comparison.rounds == 3
    assert comparison.speed_up == pytest.approx(2, rel=0.01)
    assert comparison.is_difference_measured
    assert comparison.speed_up_interval[0] > 1.9


def test_without_a_difference_rounds_go_on_until_the_time_is_over(monkeypatch):
    """And the result says so, wherever the speed-up itself happens to be."""
    progress = with_step_times(monkeypatch, [1.0, 1.2], [1.2, 1.0])
    comparison = compare(tiny_sd(), PROMPT, steps=2, seconds=40, progress=progress)
    assert comparison.rounds == 10  # of 4.4 seconds each
    low, high = comparison.speed_up_interval
    assert low < 1 < high
    assert comparison.is_difference_measured is False
    assert shown(comparison).count("no difference measured") == 2
    assert "medians of 10 rounds in alternating order" in comparison.timing
    assert comparison.timing in " ".join(shown(comparison).split())


def test_where_one_round_takes_all_the_time_there_is_one(monkeypatch):
    progress = with_step_times(monkeypatch, [20.0], [10.0])
    comparison = compare(tiny_sd(), PROMPT, steps=2, seconds=30, progress=progress)
    assert comparison.rounds == 1
    assert (comparison.speed_up, comparison.speed_up_interval, comparison.is_difference_measured) == (2, None, None)
    assert shown(comparison).count(" timed once │") == 2
    assert [row[3] for row in comparison.rows()[1:3]] == ["2.00×, timed once"] * 2
    assert "Each image timed once, after a warm-up." in shown(comparison)


def test_a_compiled_model_is_warm_when_it_is_timed():
    """Each time it is patched anew it is compiled anew, which takes a thousand times as long as a step."""
    pipe = tiny_sd(**ONE_LEVEL)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    seen = []

    def progress(what, done, total):
        seen.append((what, torch._dynamo.utils.counters["stats"]["unique_graphs"]))

    comparison = compare(pipe, PROMPT, steps=3, seconds=1000, progress=progress)
    graphs = [{count for what, count in seen if what == f"{name}, round 1"} for name in ("baseline", "agentsd")]
    assert [len(counts) for counts in graphs] == [1, 1]
    assert comparison.rounds == 1


# --- several patches --------------------------------------------------------------------------------------------


def test_all_patches_are_timed_in_the_same_rounds_until_all_are_clear(monkeypatch):
    """One without a difference keeps all of them going; an unclear one and a clear one each say so."""
    now = 0.0
    monkeypatch.setattr("agentsd.utils.timing.time.perf_counter", lambda: now)
    times = {"baseline": [1.0, 1.0], "same": [1.1, 0.9], "half": [0.5, 0.51]}
    seen = []

    def progress(what, done, total):
        nonlocal now
        seen.append((what, done, total))
        name, part = what.split(", ")
        if part.startswith("round") and done < total:
            now += times[name][int(part.split()[1]) % 2]

    configs = {"same": agentsd.AgentSDConfig(ratio=0), "half": agentsd.AgentSDConfig()}
    comparison = compare(tiny_sd(), PROMPT, steps=2, seconds=24, configs=configs, progress=progress)
    rounds = [what for what in drawn(seen) if "round" in what]
    assert rounds[:6] == [
        *("baseline, round 1", "same, round 1", "half, round 1"),
        *("half, round 2", "same, round 2", "baseline, round 2"),
    ]
    assert comparison.rounds == len(rounds) / 3 == 5
    same, half = comparison.variants.values()
    assert (same.speed_up.is_difference, half.speed_up.is_difference) == (False, True)
    assert shown(comparison).count("no difference") == 2


def three_rounds(variants, device, seconds, is_clear, on_call):
    return time_rounds(variants, device, seconds, lambda: True, on_call)


@pytest.mark.parametrize("options", [{}, {"image": image(), "strength": 0.3}], ids=["text", "image"])
def test_feature_reuse_is_warm_when_it_is_timed(options):
    """With the few steps that warm everything else up it would be off, which is no news to anybody."""
    pipe, seen = with_unet(StableDiffusionImg2ImgPipeline if options else StableDiffusionPipeline), []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Feature reuse")
        compare(pipe, "a", steps=40, configs=["fast"], progress=lambda *step: seen.append(step), **options)
    assert max(done for what, done, _ in seen if what == "fast, warm-up") == 8
    assert max(done for what, done, _ in seen if what == "baseline, warm-up") == 3


def test_that_a_run_is_too_short_for_feature_reuse_is_said_once(monkeypatch):
    """Not by every patch and in every round."""
    monkeypatch.setattr("agentsd.compare.time_rounds", three_rounds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comparison = compare(tiny_sd(), PROMPT, steps=5, configs=["paper", "balanced", "fast"], seconds=1000)
    assert comparison.rounds == 3
    said = [str(warning.message) for warning in caught if "Feature reuse" in str(warning.message)]
    assert said == ["Feature reuse is off in runs of fewer than 8 steps; this one has 5."] == comparison.warnings
