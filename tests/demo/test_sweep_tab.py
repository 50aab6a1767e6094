"""The plot of a sweep."""

import math

import pytest

from agentsd.bench import plots
from agentsd.demo.engine import SweepRun
from agentsd.demo.requests import ImageRequest
from agentsd.demo.sweep_tab import _plot
from agentsd.utils.timing import SpeedUp


REQUEST = ImageRequest("red", "", "tiny", seed=0, steps=2, guidance_scale=2.0, height=64, width=64)
BASELINE = SweepRun("baseline", None, speed_up=SpeedUp(1.0))


@pytest.fixture
def axes(monkeypatch):
    """What is drawn, as it is drawn."""
    drawn, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure.axes[0]) or save(figure, file))
    return drawn


def run_of(method, speed_up, psnr, ratio=0.4):
    return SweepRun(method, ratio, speed_up=SpeedUp(speed_up), psnr=psnr, ssim=0.9)


def test_the_plot_says_that_speed_was_timed_once(axes):
    assert _plot([BASELINE, run_of("agentsd", 1.2, 30.0)], REQUEST).width > 500
    assert axes[0].get_xlabel() == "speed-up over the baseline (timed once)"


def test_the_plot_is_of_psnr_with_presets_and_the_front(axes):
    """The one that the benchmark draws."""
    runs = [run_of("balanced", 1.5, 48.0), run_of("fast", 1.8, 38.0), run_of("tomesd", 1.1, 31.0)]
    _plot([BASELINE, *runs, SweepRun("todo", None, reason="out of memory")], REQUEST)
    assert axes[0].get_ylabel() == "PSNR to the baseline's image in dB"
    assert {(note.get_text(), note.xy) for note in axes[0].texts} == {
        (run.method, (run.speed_up.value, run.psnr)) for run in runs
    }
    (front,) = (line for line in axes[0].lines if line.get_label() == "Pareto front")
    assert [tuple(point) for point in front.get_xydata()] == [(1.5, 48.0), (1.8, 38.0)]


def test_images_that_are_the_baseline_s_own_are_nowhere_in_the_plot(axes):
    """They are no decibels away from it; of nothing else there is no plot."""
    same = run_of("agentsd", 1.0, math.inf, ratio=0.0)
    assert _plot([BASELINE, same, run_of("fast", 1.8, 38.0)], REQUEST) is not None
    assert [note.get_text() for note in axes[0].texts] == ["fast"]
    assert _plot([BASELINE, same], REQUEST) is None
