"""What cannot be measured is refused before anything runs."""

import pytest

from agentsd.bench import BenchError, BenchSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"suite": "gpu"}, "no suite 'gpu'. Known: speed"),
        ({"ratios": (0.0,)}, "between 0 and 1"),
        ({"ratios": (1.0,)}, "between 0 and 1"),
        ({"ratios": ()}, "empty"),
        ({"repeats": 0}, "repeats"),
        ({"warmup": 0}, "warmup"),
        ({"steps": 0}, "steps"),
        ({"images": 0}, "images"),
        ({"batches": (0,)}, "batch"),
        ({"batches": ()}, "empty"),
        ({"methods": ()}, "empty"),
        ({"methods": ("baseline", "magic")}, "no method 'magic'"),
        ({"models": ()}, "empty"),
        ({"models": ("a/final", "b/final")}, "a/final and b/final are both called final"),
        ({"sizes": ((100, 64),)}, "multiples of 8"),
        ({"sizes": ((0, 64),)}, "multiples of 8"),
        ({"budget_minutes": 0}, "budget_minutes"),
        ({"scheduler": "pndm"}, "no scheduler 'pndm'. Known: ddim, plms"),
        ({"compile": "fast"}, "no mode of torch.compile 'fast'. Known: default, "),
        ({"options": {"ratio": 0.5}}, "name it among the ratios"),
        ({"options": {"speed": 2}}, "Unknown option 'speed'"),
        ({"options": {"agent_until": 2}}, "agent_until"),
        ({"suite": "shapes", "sizes": ()}, "empty"),
        ({"suite": "shapes", "sizes": ((64, 64),), "models": ("sd3",)}, "no shape 'sd3'"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(BenchError, match=message):
        BenchSettings(**values)


def test_a_suite_keeps_what_it_is_about():
    with pytest.raises(BenchError, match=r"'cpu' is about models=\('sd15',\), not \('sdxl',\)"):
        BenchSettings.of_suite("cpu", models=("sdxl",), device="cuda")
    with pytest.raises(BenchError, match="'cpu' is about device='cpu', not 'cuda'"):
        BenchSettings(suite="cpu", models=("sd15",), sizes=((64, 64),), device="cuda", dtype="float32")


@pytest.mark.parametrize(
    ("suite", "values", "unused"),
    [
        ("speed", {"images": 64}, "images"),
        ("speed", {"prompts": ("a cat", "a dog")}, "prompts"),
        ("shapes", {"steps": 50, "guidance_scale": 5.0}, "steps`, `guidance_scale"),
        ("cpu", {"prompts": ("a cat",)}, "prompts"),
    ],
)
def test_what_would_have_no_effect_is_refused(suite, values, unused):
    with pytest.raises(BenchError, match=f"has no use for `{unused}`"):
        BenchSettings.of_suite(suite, **values)


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
