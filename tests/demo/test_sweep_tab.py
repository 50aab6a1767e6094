"""The plot of a sweep."""

from agentsd.bench import plots
from agentsd.demo.engine import SweepRun
from agentsd.demo.requests import ImageRequest
from agentsd.demo.sweep_tab import _plot
from agentsd.utils.timing import SpeedUp


def test_the_plot_says_that_speed_was_timed_once(monkeypatch):
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure) or save(figure, file))
    image_request = ImageRequest("red", "", "tiny", seed=0, steps=2, guidance_scale=2.0, height=64, width=64)
    runs = [SweepRun("baseline", None, speed_up=SpeedUp(1.0), ssim=1.0)]
    runs.append(SweepRun("agentsd", 0.4, speed_up=SpeedUp(1.2), ssim=0.9))
    assert _plot(runs, image_request).width > 500
    assert figures[0].axes[0].get_xlabel() == "speed-up over the baseline (timed once)"
