"""The engine behind the web page: one generation at a time, limits, visitors who do not see each other."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from models import tiny_refiner, tiny_sd

import agentsd
from agentsd.bench import METHODS
from agentsd.bench import methods as methods_module
from agentsd.bench.methods import reseed
from agentsd.bench.models import twin_pipeline
from agentsd.demo.engine import Engine
from agentsd.demo.queue import Stopped
from agentsd.demo.requests import Limits, Wish


CONFIG = agentsd.AgentSDConfig()


@pytest.fixture(scope="module")
def wish():
    return Wish("red", "", "tiny", seed=3, steps=3, guidance_scale=5.0, height=128, width=64)


@pytest.fixture
def engine(model):
    return Engine([model], device="cpu", limits=Limits(side=256, steps=50, sweep=4, waiting=1))


def ignore(what, done, total):
    pass


def draw(pipe, wish):
    options = {"num_inference_steps": wish.steps, "generator": torch.Generator().manual_seed(wish.seed)}
    return np.asarray(pipe(**wish.call, **options).images[0])


def test_images_are_those_of_the_pipeline(engine, wish):
    comparison, is_cached = engine.compare("me", wish, CONFIG, ignore)
    assert not is_cached
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd(), wish))
    np.testing.assert_array_equal(np.asarray(comparison.agentsd), draw(agentsd.apply_patch(tiny_sd()), wish))


def test_the_plain_run_is_kept_by_everything_that_determines_it(engine, wish):
    first, _ = engine.compare("me", wish, CONFIG, ignore)
    told = []
    again, is_cached = engine.compare("me", wish, agentsd.AgentSDConfig(ratio=0.7), lambda *step: told.append(step[0]))
    assert is_cached
    assert again.baseline_run is first.baseline_run
    assert "without agentsd" not in told
    others = {"prompt": "blue", "negative_prompt": "x", "seed": 4, "steps": 2, "guidance_scale": 2.0}
    for name, value in {**others, "height": 64, "width": 128}.items():
        assert not engine.compare("me", replace(wish, **{name: value}), CONFIG, ignore)[1], name


def test_a_visitor_has_only_its_own_images(engine, wish):
    engine.compare("me", wish, CONFIG, ignore)
    assert not engine.compare("you", wish, CONFIG, ignore)[1]
    engine.forget("me")
    assert not engine.compare("me", wish, CONFIG, ignore)[1]
    assert engine.compare("you", wish, CONFIG, ignore)[1]


def test_old_runs_make_room_for_new_ones(engine, wish, monkeypatch):
    monkeypatch.setattr("agentsd.demo.engine._KEPT_RUNS", 2)
    for seed in (1, 2, 3):
        engine.compare("me", replace(wish, seed=seed), CONFIG, ignore)
    assert [engine.compare("me", replace(wish, seed=seed), CONFIG, ignore)[1] for seed in (3, 2, 1)] == [
        True, True, False]  # fmt: skip


@pytest.mark.parametrize("what", ["without agentsd", "with agentsd"])
def test_stopping_ends_a_run_at_its_next_step(engine, wish, what):
    told = []

    def stop_at_two(name, done, total):
        told.append((name, done))
        if (name, done) == (what, 2):
            assert engine.stop("you") == 0
            assert engine.stop("me") == 1

    with pytest.raises(Stopped):
        engine.compare("me", replace(wish, steps=20), CONFIG, stop_at_two)
    assert told[-1] == (what, 2)
    comparison, _ = engine.compare("me", wish, CONFIG, ignore)
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd(), wish))


def in_background(function):
    outcome = []

    def run():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def test_one_generation_at_a_time_and_the_line_has_an_end(engine, wish):
    told, is_running, may_go_on = [], threading.Event(), threading.Event()

    def hold(name, done, total):
        told.append(("me", name))
        is_running.set()
        assert may_go_on.wait(60)

    first, _ = in_background(lambda: engine.compare("me", wish, CONFIG, hold))
    assert is_running.wait(60)
    second, second_outcome = in_background(
        lambda: engine.compare("you", wish, CONFIG, lambda name, done, total: told.append(("you", name)))
    )
    while ("you", "waiting for another generation") not in told:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="waiting already"):
        engine.compare("they", wish, CONFIG, ignore)
    may_go_on.set()
    first.join()
    second.join()
    assert second_outcome[0][0].agentsd.size == (64, 128)
    at_work = [who for who, name in told if not name.startswith("waiting")]
    assert at_work == sorted(at_work)  # all of mine, then all of yours


def test_what_waits_can_be_stopped(engine, wish):
    is_running, may_go_on, waits = threading.Event(), threading.Event(), threading.Event()

    def hold(name, done, total):
        is_running.set()
        assert may_go_on.wait(60)

    first, first_outcome = in_background(lambda: engine.compare("me", wish, CONFIG, hold))
    assert is_running.wait(60)
    second, second_outcome = in_background(lambda: engine.compare("you", wish, CONFIG, lambda *step: waits.set()))
    assert waits.wait(60)
    assert engine.stop("you") == 1
    second.join(10)
    assert isinstance(second_outcome[0], Stopped)
    may_go_on.set()
    first.join()
    assert not isinstance(first_outcome[0], Exception)


def test_tokens_are_those_that_were_merged(engine, wish):
    drawn = engine.tokens("me", wish, agentsd.AgentSDConfig(ratio=0.5), ignore)
    np.testing.assert_array_equal(np.asarray(drawn.image), draw(agentsd.apply_patch(tiny_sd(), ratio=0.5), wish))
    assert drawn.warnings == []
    rows = agentsd.report(agentsd.apply_patch(tiny_sd(), ratio=0.5), height=128, width=64).rows
    maps = drawn.maps
    assert {name for name, _ in maps} == {row.name for row in rows}
    assert {step for _, step in maps} == {0, 1, 2}
    agents, merging_only = maps[rows[0].name, 0], maps[rows[0].name, 2]
    assert agents.groups.shape == (16, 8)
    assert agents.caption == "128 tokens merged to 64, 8 agents"
    assert merging_only.caption == "128 tokens merged to 64, no agents (token merging only)"


def test_a_black_image_is_no_result_anywhere(engine, wish):
    """Half precision overflows on some models: every tab must say so."""
    decoder = engine._pipes["tiny"].vae.decoder
    torch.nn.init.constant_(decoder.conv_out.bias, float("nan"))
    assert "not finite" in engine.tokens("me", wish, CONFIG, ignore).warnings[0]
    plain, todo = engine.sweep("me", wish, ["todo"], [], ignore)
    assert "not finite" in plain.run.warnings[0]
    assert "image with todo has values that are not finite" in todo.run.warnings[0]


def test_nothing_is_kept_for_a_visitor_who_leaves_in_the_last_moment(engine, wish):
    """While the image is decoded, no step is left at which the generation could end."""
    vae = engine._pipes["tiny"].vae
    decode = vae.decode

    def leave(*args, **options):
        engine.forget("me")
        return decode(*args, **options)

    vae.decode = leave
    with pytest.raises(Stopped):
        engine.compare("me", wish, CONFIG, ignore)
    assert not engine._plain_runs


def test_a_sweep_draws_what_a_benchmark_draws(engine, wish):
    """tomesd goes on with one generator: the warm-up must not change the image."""
    tome = engine.sweep("me", wish, ["tomesd"], [0.5], ignore)[1]
    twin = twin_pipeline(tiny_sd())
    METHODS["tomesd"].apply(twin, 0.5, {})
    reseed(twin, wish.seed)
    np.testing.assert_array_equal(np.asarray(tome.run.image), draw(twin, wish))


def test_all_steps_of_the_scheduler_are_recorded(engine, wish, monkeypatch):
    """PLMS calls the model once more than it was asked for steps."""
    monkeypatch.setattr(
        engine._pipes["tiny"], "scheduler", PNDMScheduler.from_config(tiny_sd().scheduler.config, skip_prk_steps=True)
    )
    told = []
    maps = engine.tokens("me", wish, CONFIG, lambda *step: told.append(step)).maps
    assert {step for _, step in maps} == {0, 1, 2, 3}
    assert told[-1] == ("with agentsd", 4, 4)


def test_a_sweep_tells_an_earlier_run_and_goes_on_after_a_failure(engine, wish, monkeypatch):
    engine.compare("me", wish, CONFIG, ignore)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(methods_module.ToMeSD, "apply", fail)
    runs = engine.sweep("me", wish, ["tomesd", "agentsd"], [0.5], ignore)
    assert runs[0].is_cached
    assert (runs[1].run, runs[1].reason) == (None, "out of memory")
    assert runs[2].run is not None


def test_a_sweep_compares_methods(engine, wish):
    runs = engine.sweep("me", wish, ["tomesd", "agentsd"], [0.5], ignore)
    assert [run.name for run in runs] == ["baseline", "tomesd 0.5", "agentsd 0.5"]
    assert runs[0].speed_up == 1
    np.testing.assert_array_equal(np.asarray(runs[0].run.image), draw(tiny_sd(), wish))
    np.testing.assert_array_equal(np.asarray(runs[2].run.image), draw(agentsd.apply_patch(tiny_sd(), ratio=0.5), wish))
    again = engine.sweep("me", wish, ["tomesd"], [0.5], ignore)
    np.testing.assert_array_equal(again[1].run.values, runs[1].run.values)
    assert 10 < runs[1].psnr < 100
    assert not agentsd.is_patched(engine._pipes["tiny"])


def test_a_method_that_is_not_there_says_so(engine, wish, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tomesd", None)
    runs = engine.sweep("me", wish, ["tomesd", "deepcache"], [0.5], ignore)
    assert runs[1].run is None
    assert "[bench]" in runs[1].reason
    assert runs[2].ratio is None


def test_every_method_of_the_sweep_exists():
    from agentsd.demo.engine import SWEEP_METHODS

    assert set(SWEEP_METHODS) <= set(methods_module.METHODS)


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
def test_bad_wishes(engine, wish, values, error, message):
    for ask in (
        lambda wish: engine.compare("me", wish, CONFIG, ignore),
        lambda wish: engine.tokens("me", wish, CONFIG, ignore),
        lambda wish: engine.sweep("me", wish, ["agentsd"], [0.5], ignore),
    ):
        with pytest.raises(error, match=message):
            ask(replace(wish, **values))


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
def test_bad_sweeps(engine, wish, methods, ratios, message):
    with pytest.raises(ValueError, match=message):
        engine.sweep("me", wish, methods, ratios, ignore)


def test_models_are_looked_for_at_the_start(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        Engine([str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="same name"):
        Engine([model, model])
    tiny_refiner().save_pretrained(tmp_path / "refiner")
    with pytest.raises(TypeError, match="starts from an image"):
        Engine([str(tmp_path / "refiner")])


@pytest.mark.parametrize("values", [{"side": 8}, {"side": 500}, {"steps": 0}, {"waiting": 25}, {"waiting": -1}])
def test_bad_limits(values):
    with pytest.raises(ValueError, match=f"limit on {next(iter(values))}"):
        Limits(**values)


def test_what_suits_a_model(engine):
    assert engine.own_settings("tiny") == (128, 128, 7.5)
    assert Engine(["emoji"], device="cpu").own_settings("emoji") == (256, 256, 4.0)


def test_a_sweep_s_speed_up_is_plain_time_over_own(engine, wish):
    plain, tome = engine.sweep("me", wish, ["tomesd"], [0.5], ignore)
    assert plain.speed_up == 1
    assert tome.speed_up == pytest.approx(plain.run.time.seconds_per_step / tome.run.time.seconds_per_step)


def test_a_model_s_own_size_stays_within_the_limits(model):
    assert Engine([model], device="cpu", limits=Limits(side=64)).own_settings("tiny")[:2] == (64, 64)


def test_models_are_loaded_in_the_precision_asked_for(model):
    assert Engine([model], device="cpu", dtype="bfloat16")._pipes["tiny"].unet.dtype == torch.bfloat16
