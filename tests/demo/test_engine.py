"""The engine behind the web page: what it draws, its limits, and how sessions stop what they have running."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from compat_models import tiny_lcm
from diffusers import PNDMScheduler, StableDiffusionPipeline
from models import tiny_refiner, tiny_sd
from other_pipelines import tiny_audio, tiny_ldm3d, tiny_text_to_video, without_size

import agentsd
from agentsd.bench import METHODS
from agentsd.bench.models import twin_pipeline
from agentsd.bench.peers import ToMeSD, reseed
from agentsd.demo.engine import SWEEP_METHODS, Engine, Stopped
from agentsd.demo.requests import ImageRequest, Limits


CONFIG = agentsd.AgentSDConfig()


@pytest.fixture(scope="module")
def image_request():
    return ImageRequest("red", "", "tiny", seed=3, steps=3, guidance_scale=5.0, height=128, width=64)


@pytest.fixture
def engine(model):
    return Engine([model], device="cpu", limits=Limits(side=256, steps=50, sweep=4, waiting=1))


def ignore(what, done, total):
    pass


def draw(pipe, image_request):
    generator = torch.Generator().manual_seed(image_request.seed)
    output = pipe(**image_request.call, num_inference_steps=image_request.steps, generator=generator)
    return np.asarray(output.images[0])


def test_images_are_those_of_the_pipeline(engine, image_request):
    comparison = engine.compare("me", image_request, CONFIG, 1, ignore)
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd(), image_request))
    np.testing.assert_array_equal(np.asarray(comparison.agentsd), draw(agentsd.apply_patch(tiny_sd()), image_request))


def test_a_comparison_times_both_for_as_long_as_asked(engine, image_request):
    names = []
    assert engine.compare("me", image_request, CONFIG, 0, ignore).rounds == 1
    assert engine.compare("me", image_request, CONFIG, 1, lambda name, *_: names.append(name)).rounds >= 3
    assert {"baseline, round 3", "agentsd, round 3"} <= set(names)
    for seconds in (-1, 31):
        with pytest.raises(ValueError, match="seconds of timing must be from 0 to 30"):
            engine.compare("me", image_request, CONFIG, seconds, ignore)


def generate(engine, kind, image_request, progress):
    if kind == "compare":
        return engine.compare("me", image_request, CONFIG, 0, progress)
    if kind == "tokens":
        return engine.tokens("me", image_request, CONFIG, progress)
    return engine.sweep("me", image_request, ["agentsd"], [0.5], progress)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("compare", "baseline, round 1"),
        ("compare", "agentsd, round 1"),
        ("tokens", "with agentsd"),
        ("sweep", "without agentsd"),
        ("sweep", "with agentsd 0.5"),
    ],
)
def test_stopping_ends_a_run_at_its_next_step(engine, image_request, kind, name):
    steps = []

    def stop_at_five(what, done, total):
        steps.append((what, done))
        if (what, done) == (name, 5):
            engine.stop("you")
            engine.stop("me", "another kind")
        if (what, done) == (name, 6):
            engine.stop("me", kind)

    with pytest.raises(Stopped):
        generate(engine, kind, replace(image_request, steps=20), stop_at_five)
    assert steps[-1] == (name, 6)
    # Nothing is left of it, neither a patch nor the stop.
    comparison = generate(engine, "compare", image_request, ignore)
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd(), image_request))


def test_one_generation_runs_at_a_time(engine, image_request):
    """Gradio lets the next one in while one that was stopped is still in its last step."""
    events, is_running, may_go_on = [], threading.Event(), threading.Event()

    def hold(*_):
        is_running.set()
        assert may_go_on.wait(60)
        events.append("mine")

    def mine():
        with pytest.raises(Stopped):
            generate(engine, "compare", image_request, hold)

    def yours():
        engine.tokens("you", image_request, CONFIG, lambda *_: events.append("yours"))

    threads = [threading.Thread(target=mine), threading.Thread(target=yours)]
    threads[0].start()
    assert is_running.wait(60)
    threads[1].start()
    engine.stop("me")
    time.sleep(0.5)
    assert events == []
    may_go_on.set()
    for thread in threads:
        thread.join(60)
    assert events == ["mine", *["yours"] * image_request.steps]


def test_a_session_that_leaves_stops_all_it_has_running(engine, image_request):
    with pytest.raises(Stopped):
        generate(engine, "tokens", image_request, lambda *_: engine.leave("me"))


@pytest.mark.parametrize("kind", ["compare", "tokens", "sweep"])
def test_nothing_begins_for_a_session_that_has_left(engine, image_request, kind, monkeypatch):
    """Gradio begins what waits even if its page leaves in that moment, and nobody would stop it."""
    engine.leave("me")
    engine.leave("you")
    with pytest.raises(RuntimeError, match="connection to this page was lost"):
        generate(engine, kind, image_request, lambda *_: pytest.fail("it was drawn"))
    assert not engine._stops
    engine.tokens("another", image_request, CONFIG, ignore)
    # A page that comes back, as after a computer's sleep, can ask again; one that does not is forgotten.
    monkeypatch.setattr("agentsd.demo.engine._SECONDS_OF_LEAVING", -1.0)
    generate(engine, kind, image_request, ignore)
    engine.leave("another")
    assert list(engine._left) == ["another"]


def test_a_session_that_leaves_as_its_run_begins_is_stopped(engine, image_request, monkeypatch):
    class Leaving(dict):
        def get(self, session, default):
            since = super().get(session, default)
            monkeypatch.setattr(engine, "_left", {})
            engine.leave(session)
            return since

    monkeypatch.setattr(engine, "_left", Leaving())
    with pytest.raises(Stopped):
        generate(engine, "tokens", image_request, ignore)


def test_tokens_are_those_that_were_merged(engine, image_request):
    drawn = engine.tokens("me", image_request, agentsd.AgentSDConfig(ratio=0.5), ignore)
    np.testing.assert_array_equal(
        np.asarray(drawn.image), draw(agentsd.apply_patch(tiny_sd(), ratio=0.5), image_request)
    )
    assert (drawn.steps, drawn.warnings) == (3, [])
    rows = agentsd.report(agentsd.apply_patch(tiny_sd(), ratio=0.5), height=128, width=64).rows
    maps = drawn.maps
    assert {name for name, _ in maps} == {row.name for row in rows}
    assert {step for _, step in maps} == {0, 1, 2}
    agents, merging_only = maps[rows[0].name, 0], maps[rows[0].name, 2]
    assert agents.groups.shape == (16, 8)
    assert agents.caption == "128 tokens merged to 64, 8 agents"
    assert merging_only.caption == "128 tokens merged to 64, no agents (token merging only)"


def test_a_black_image_is_no_result_anywhere(engine, image_request):
    """Half precision overflows on some models: every tab must say so."""
    decoder = engine._pipes["tiny"].vae.decoder
    torch.nn.init.constant_(decoder.conv_out.bias, float("nan"))
    assert "not finite" in engine.tokens("me", image_request, CONFIG, ignore).warnings[0]
    baseline, todo = engine.sweep("me", image_request, ["todo"], [], ignore)
    assert "not finite" in baseline.run.warnings[0]
    assert "image with todo has values that are not finite" in todo.run.warnings[0]


@pytest.mark.filterwarnings("error:Feature reuse")
def test_too_few_steps_for_feature_reuse_are_a_warning_everywhere(engine, image_request):
    """Of the page, which nobody sees who reads the terminal."""
    said = ["Feature reuse is off in runs of fewer than 8 steps; this one has 3."]
    config = agentsd.AgentSDConfig.preset("fast")
    assert engine.compare("me", image_request, config, 1, ignore).warnings == said
    assert engine.tokens("me", image_request, config, ignore).warnings == said
    baseline, fast = engine.sweep("me", image_request, ["fast"], [0.4], ignore)
    assert (baseline.run.warnings, fast.run.warnings) == ([], said)
    long = replace(image_request, steps=8)
    assert engine.compare("me", long, config, 0, ignore).warnings == []


def test_a_sweep_draws_what_a_benchmark_draws(engine, image_request):
    """tomesd goes on with one generator: the warm-up must not change the image."""
    tome = engine.sweep("me", image_request, ["tomesd"], [0.5], ignore)[1]
    twin = twin_pipeline(tiny_sd())
    METHODS["tomesd"].apply(twin, 0.5, {})
    reseed(twin, image_request.seed)
    np.testing.assert_array_equal(np.asarray(tome.run.image), draw(twin, image_request))


def test_all_steps_of_the_scheduler_are_recorded(engine, image_request, monkeypatch):
    """PLMS calls the model once more than it was asked for steps."""
    monkeypatch.setattr(
        engine._pipes["tiny"], "scheduler", PNDMScheduler.from_config(tiny_sd().scheduler.config, skip_prk_steps=True)
    )
    steps = []
    drawn = engine.tokens("me", image_request, CONFIG, lambda *step: steps.append(step))
    assert drawn.steps == 4 and {step for _, step in drawn.maps} == {0, 1, 2, 3}
    assert steps[-1] == ("with agentsd", 4, 4)


def test_a_sweep_goes_on_after_a_failure(engine, image_request, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ToMeSD, "apply", fail)
    runs = engine.sweep("me", image_request, ["tomesd", "agentsd"], [0.5], ignore)
    assert (runs[1].run, runs[1].reason) == (None, "out of memory")
    assert runs[2].run is not None


def test_a_sweep_compares_methods(engine, image_request):
    runs = engine.sweep("me", image_request, ["tomesd", "agentsd"], [0.5], ignore)
    assert [run.name for run in runs] == ["baseline", "tomesd 0.5", "agentsd 0.5"]
    assert runs[0].speed_up.value == 1
    np.testing.assert_array_equal(np.asarray(runs[0].run.image), draw(tiny_sd(), image_request))
    np.testing.assert_array_equal(
        np.asarray(runs[2].run.image), draw(agentsd.apply_patch(tiny_sd(), ratio=0.5), image_request)
    )
    again = engine.sweep("me", image_request, ["tomesd"], [0.5], ignore)
    np.testing.assert_array_equal(again[1].run.values, runs[1].run.values)
    assert 10 < runs[1].psnr < 100
    assert not agentsd.is_patched(engine._pipes["tiny"])


def test_a_method_that_is_not_there_says_so(engine, image_request, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tomesd", None)
    runs = engine.sweep("me", image_request, ["tomesd", "deepcache"], [0.5], ignore)
    assert runs[1].run is None
    assert "[bench]" in runs[1].reason
    assert runs[2].ratio is None


def test_every_method_of_the_sweep_exists():
    assert set(SWEEP_METHODS) <= set(METHODS)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"model": "other"}, ValueError, "no model 'other'"),
        ({"prompt": None}, TypeError, "text"),
        ({"prompt": "x" * 2001}, ValueError, "2000 characters"),
        ({"negative_prompt": "x" * 2001}, ValueError, "2000 characters"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"steps": 51}, ValueError, "steps must be from 1 to 50"),
        ({"steps": 2.5}, TypeError, "whole number"),
        ({"height": 32}, ValueError, "height must be from 64 to 256"),
        ({"width": 264}, ValueError, "width must be from 64 to 256"),
        ({"width": 100}, ValueError, "multiples of 8"),
        ({"guidance_scale": -1.0}, ValueError, "guidance"),
    ],
)
def test_bad_requests(engine, image_request, values, error, message):
    for kind in ("compare", "tokens", "sweep"):
        with pytest.raises(error, match=message):
            generate(engine, kind, replace(image_request, **values), ignore)


@pytest.mark.parametrize(
    "methods, ratios, message",
    [
        ([], [0.5], "Choose from the methods"),
        (["baseline"], [0.5], "Choose from the methods"),
        (["agentsd"], [], "at least one ratio"),
        (["agentsd"], [1.5], "ratio"),
        (["agentsd"], [0.1] * 5, "5 ratios, and at most 4"),
        (["agentsd", "tomesd"], [0.2, 0.4], "5 runs, and at most 4"),
    ],
)
def test_bad_sweeps(engine, image_request, methods, ratios, message):
    with pytest.raises(ValueError, match=message):
        engine.sweep("me", image_request, methods, ratios, ignore)


def test_models_are_looked_for_at_the_start(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        Engine([str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="same name"):
        Engine([model, model])
    tiny_refiner().save_pretrained(tmp_path / "refiner")
    with pytest.raises(TypeError, match="StableDiffusionXLImg2ImgPipeline starts from an image"):
        Engine([str(tmp_path / "refiner")])
    tiny_audio().save_pretrained(tmp_path / "audio")
    with pytest.raises(TypeError, match="AudioLDMPipeline gives `audios`, not images"):
        Engine([str(tmp_path / "audio")])


@pytest.mark.parametrize("build", [tiny_ldm3d, tiny_text_to_video])
def test_an_image_with_depth_and_the_first_frame_of_a_video(build, image_request, tmp_path):
    """Every tab draws them."""
    build().save_pretrained(tmp_path / "tiny")
    engine = Engine([str(tmp_path / "tiny")], device="cpu")
    request = replace(image_request, steps=2)
    generator = torch.Generator().manual_seed(request.seed)
    output = build()(**request.call, num_inference_steps=2, generator=generator, output_type="np")
    expected = output.rgb[0] if build is tiny_ldm3d else output.frames[0][0]
    np.testing.assert_array_equal(engine.compare("me", request, CONFIG, 0, ignore).baseline_run.values, expected)
    np.testing.assert_array_equal(engine.sweep("me", request, ["todo"], [], ignore)[0].run.values, expected)
    assert engine.tokens("me", request, CONFIG, ignore).image.size == (64, 128)


def test_a_prompt_that_is_too_long_is_named_in_every_tab(engine, image_request):
    """Each time, not only the first; the page shows it once, whatever it is about."""
    image_request = replace(image_request, steps=1)
    for request, text in (
        (replace(image_request, prompt="apple " * 30), "The prompt is longer than the 77 tokens"),
        (replace(image_request, negative_prompt="apple " * 30), "The negative prompt is longer than the 77 tokens"),
    ):
        for _ in range(2):
            assert [each[: len(text)] for each in engine.tokens("me", request, CONFIG, ignore).warnings] == [text]
            assert [each[: len(text)] for each in engine.compare("me", request, CONFIG, 0, ignore).warnings] == [text]
        sweep = engine.sweep("me", request, ["todo"], [], ignore)
        assert {each.run.warnings[0][: len(text)] for each in sweep} == {text}


def test_a_model_that_does_not_say_its_size(tmp_path):
    without_size(StableDiffusionPipeline).save_pretrained(tmp_path / "tiny")
    assert Engine([str(tmp_path / "tiny")], device="cpu").own_settings("tiny")[:2] == (512, 512)


def test_what_a_model_does_not_take_is_named(image_request, tmp_path):
    """A latent consistency model has no negative prompt."""
    tiny_lcm().save_pretrained(tmp_path / "tiny")
    engine = Engine([str(tmp_path / "tiny")], device="cpu")
    for kind in ("compare", "tokens", "sweep"):
        with pytest.raises(TypeError, match="takes no `negative_prompt`: leave that out"):
            generate(engine, kind, replace(image_request, negative_prompt="blue"), ignore)


@pytest.mark.parametrize("values", [{"side": 8}, {"side": 500}, {"steps": 0}, {"waiting": 0}, {"seconds": 0}])
def test_bad_limits(values):
    with pytest.raises(ValueError, match=f"limit on {next(iter(values))}"):
        Limits(**values)


def test_what_suits_a_model(engine):
    assert engine.own_settings("tiny") == (128, 128, 7.5)
    assert Engine(["emoji"], device="cpu").own_settings("emoji") == (512, 512, 4.0)


def test_a_sweep_s_speed_up_is_the_baseline_s_time_over_own(engine, image_request):
    baseline, tome = engine.sweep("me", image_request, ["tomesd"], [0.5], ignore)
    assert baseline.speed_up.value == 1
    ratio = baseline.run.time.total / tome.run.time.total
    assert tome.speed_up.value == pytest.approx(ratio)
    assert str(tome.speed_up).endswith("×, timed once")


def test_a_model_s_own_size_stays_within_the_limits(model):
    assert Engine([model], device="cpu", limits=Limits(side=64)).own_settings("tiny")[:2] == (64, 64)


def test_models_are_loaded_in_the_precision_asked_for(model):
    assert Engine([model], device="cpu", dtype="bfloat16")._pipes["tiny"].unet.dtype == torch.bfloat16
