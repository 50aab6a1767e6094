"""agentsd.compare: two honest images of one seed, times that mean something, and a pipeline left as it was."""

import json
import math
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from comparisons import PROMPT, compare, draw, shown
from compat_models import half_mask, image, tiny_animatediff, tiny_gligen, tiny_instruct_pix2pix, with_unet
from diffusers import (
    EulerDiscreteScheduler,
    MusicLDMPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from models import TEXT_WIDTH, tiny_controlnet, tiny_refiner, tiny_sd, tiny_sd2, tiny_sdxl
from other_pipelines import (
    tiny_audio,
    tiny_image_variation,
    tiny_ldm3d,
    tiny_text_to_video,
    tiny_unclip,
    tiny_upscaler,
)

import agentsd
from agentsd.models.unet import find_layers
from agentsd.utils.timing import time_rounds


def processors(pipe):
    return [layer.attn.processor for layer in find_layers(pipe.unet)]


def test_images_are_those_of_the_two_pipelines():
    """Exactly what the pipeline draws unpatched and patched: the comparison must not disturb either."""
    comparison = compare(tiny_sd(), PROMPT, steps=3, config=agentsd.AgentSDConfig(ratio=0.6))
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd()))
    np.testing.assert_array_equal(np.asarray(comparison.agentsd), draw(agentsd.apply_patch(tiny_sd(), ratio=0.6)))
    assert comparison.report.config.ratio == 0.6
    assert {row.tokens for row in comparison.report.rows} == {256}
    assert comparison.warnings == []
    assert 20 < comparison.psnr < math.inf
    assert 0.5 < comparison.ssim < 1


def test_nothing_merged_is_identical():
    """With `ratio=0` the two are the same bit for bit, and the comparison says so."""
    comparison = compare(tiny_sd(), PROMPT, steps=2, config=agentsd.AgentSDConfig(ratio=0))
    assert (comparison.psnr, comparison.ssim, comparison.difference_scale) == (math.inf, 1.0, 1)
    assert comparison.difference.getextrema() == ((0, 0), (0, 0), (0, 0))
    assert comparison.to_dict()["is_identical"]


@pytest.mark.parametrize("build", [tiny_sd2, tiny_sdxl])
def test_other_models(build):
    """Stable Diffusion 2 and SDXL take the same way."""
    comparison = compare(build(), PROMPT, steps=2, height=96, width=160, negative_prompt="blue", guidance_scale=3.0)
    assert comparison.baseline.size == comparison.agentsd.size == comparison.difference.size == (160, 96)
    assert comparison.settings["guidance_scale"] == 3.0
    assert comparison.psnr < math.inf


def test_pipelines_that_start_from_a_image():
    """Options go to the pipeline; the number of steps is then smaller than asked for, and progress knows it."""
    seen = []
    start = PIL.Image.new("RGB", (128, 128), "red")
    compare(tiny_refiner(), PROMPT, steps=4, image=start, strength=0.5, progress=lambda *step: seen.append(step))
    rounds = [(done, total) for what, done, total in seen if "round" in what and done]
    assert rounds == [(1, 2), (2, 2)] * 2


@pytest.mark.parametrize("options", [{"strength": 0.2}, {}], ids=["given", "the pipeline's own"])
def test_a_warm_up_that_starts_from_a_image_is_long_enough(options):
    """Of three steps at a low strength none would be run, which pipelines refuse. The refiner's own is 0.3."""
    start = PIL.Image.new("RGB", (128, 128), "red")
    comparison = compare(tiny_refiner(), PROMPT, steps=20, image=start, **options)
    assert len(comparison.baseline_time.steps) == len(comparison.agentsd_time.steps) == (4 if options else 6)


# --- the pipeline afterwards ------------------------------------------------------------------------------------


def test_unpatched_pipeline_stays_unpatched():
    """A comparison must not leave a patch behind."""
    pipe = tiny_sd()
    before = processors(pipe)
    compare(pipe, PROMPT, steps=1)
    assert not agentsd.is_patched(pipe)
    assert processors(pipe) == before


def test_a_patch_that_only_a_controlnet_has_is_off_for_the_plain_run():
    pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    options = {"steps": 2, "image": image()}
    plain = compare(pipe, "a", **options).baseline_run
    agentsd.apply_patch(pipe, max_downsample=4)
    agentsd.remove_patch(pipe.unet)
    again = compare(pipe, "a", **options).baseline_run
    assert np.array_equal(again.values, plain.values)
    assert agentsd.is_patched(pipe.controlnet) and not agentsd.is_patched(pipe.unet)


def test_the_wrapper_is_compared_as_its_pipeline():
    """A few steps of an image are warmed up with enough of them."""
    pipe = with_unet(StableDiffusionImg2ImgPipeline)
    options = {"steps": 20, "image": image(), "strength": 0.2}
    comparison = compare(agentsd.AgentSDPipeline(pipe), "a", **options)
    assert comparison.settings["pipeline"] == type(pipe).__name__


def test_a_pipeline_that_does_not_tell_of_its_steps_is_refused():
    class Silent(StableDiffusionPipeline):
        def __call__(self, prompt, num_inference_steps, generator, output_type):
            pytest.fail("it drew")

    with pytest.raises(TypeError, match=r"Silent .* takes no `callback_on_step_end`"):
        compare(with_unet(Silent), "a")


def test_a_pipeline_with_the_callback_of_older_ones():
    boxes = {"gligen_phrases": ["apple"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
    comparison = compare(tiny_gligen(), "a", steps=3, **boxes)
    assert len(comparison.baseline_time.steps) == len(comparison.agentsd_time.steps) == 3
    assert comparison.settings["options"] == boxes


def test_steps_of_ones_own_are_counted():
    pipe = with_unet(StableDiffusionPipeline)
    pipe.scheduler = EulerDiscreteScheduler()
    assert compare(pipe, "a", timesteps=[900, 500, 100]).settings["steps"] == 3


@pytest.mark.parametrize("config", [None, agentsd.AgentSDConfig(ratio=0.2)])
def test_patched_pipeline_keeps_its_patch(config):
    """Also its choice of layers, which no configuration can tell."""
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0.7, filter_fn=lambda name, module: name.startswith("up_blocks.2"))
    image = draw(pipe)
    comparison = compare(pipe, PROMPT, steps=3, config=config)
    assert comparison.settings["patch"]["ratio"] == (0.7 if config is None else 0.2)
    assert len(comparison.report.rows) == (2 if config is None else 3)
    assert agentsd.report(pipe).config.ratio == 0.7
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd()))
    np.testing.assert_array_equal(draw(pipe), image)


@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("variant", ["baseline", "agentsd"])
def test_cancelling_leaves_everything_as_it_was(variant, patch_first):
    """A web page stops a run by raising from the progress function."""
    pipe = tiny_sd()
    if patch_first:
        agentsd.apply_patch(pipe, ratio=0.7)
    image = draw(pipe)
    pipe._progress_bar_config = {"disable": True, "desc": "mine"}

    def cancel(name, done, total):
        if (name, done) == (f"{variant}, round 1", 1):
            raise InterruptedError("cancelled by the user")

    with pytest.raises(InterruptedError, match="cancelled by the user"):
        compare(pipe, PROMPT, steps=3, progress=cancel)
    assert agentsd.is_patched(pipe) == patch_first
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    np.testing.assert_array_equal(draw(pipe), image)


def test_interrupted_pipeline_is_no_result():
    """diffusers' own way to stop returns a half-made image: it must not be compared."""
    pipe = tiny_sd()

    def interrupt(name, done, total):
        pipe._interrupt = done == 1

    with pytest.raises(RuntimeError, match="was interrupted"):
        compare(pipe, PROMPT, steps=3, progress=interrupt)


# --- times ------------------------------------------------------------------------------------------------------


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
    pipe = tiny_sd()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    seen = []

    def progress(what, done, total):
        seen.append((what, torch._dynamo.utils.counters["stats"]["unique_graphs"]))

    comparison = compare(pipe, PROMPT, steps=3, seconds=1000, progress=progress)
    graphs = [{count for what, count in seen if what == f"{name}, round 1"} for name in ("baseline", "agentsd")]
    assert [len(counts) for counts in graphs] == [1, 1]
    assert comparison.rounds == 1


# --- several patches ----------------------------------------------------------------------------------------------


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


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": ["one", "two"]}, TypeError, "must be one string, but got list"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1, but got 0"),
        ({"steps": 2.5}, TypeError, "`steps` must be an integer, but got 2.5"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"seed": True}, TypeError, "`seed` must be an integer"),
        ({"seconds": -1}, ValueError, "`seconds` must be at least 0 and finite, but got -1"),
        ({"seconds": math.nan}, ValueError, "`seconds` must be at least 0 and finite, but got nan"),
        ({"seconds": "30"}, TypeError, "`seconds` must be a number, but got '30'"),
        ({"num_inference_steps": 5}, TypeError, "sets num_inference_steps itself"),
        ({"generator": None, "output_type": "pt"}, TypeError, "sets generator, output_type itself"),
        ({"config": {"ratio": 0.5}}, TypeError, "must be an AgentSDConfig"),
        ({"configs": ["fast", "slow"]}, ValueError, "no preset 'slow'. Choose one of paper, agent, tome, balanced"),
        ({"configs": {"mine": 0.5}}, TypeError, r"`configs\['mine'\]` must be an AgentSDConfig, but got float"),
        ({"configs": "fast"}, TypeError, "`configs` must be names of presets, or configurations by name"),
        ({"configs": []}, ValueError, "`configs` is empty"),
        ({"configs": {"baseline": agentsd.AgentSDConfig()}}, ValueError, "cannot be called 'baseline'"),
        ({"configs": {"a/b": agentsd.AgentSDConfig()}}, ValueError, "cannot be called 'a/b'"),
        ({"configs": ["fast"], "config": agentsd.AgentSDConfig()}, ValueError, "either `config` or `configs`"),
        ({"height": 100, "width": 96}, ValueError, "divisible by 8"),
        ({"height": 96}, ValueError, "both `height` and `width`"),
    ],
)
def test_bad_input(options, error, message):
    """Each mistake is named, and the pipeline is not touched by it."""
    pipe = tiny_sd()
    with pytest.raises(error, match=message):
        compare(pipe, **{"prompt": PROMPT, "steps": 1, **options})
    assert not agentsd.is_patched(pipe)


@pytest.mark.parametrize("build", [tiny_text_to_video, tiny_animatediff, tiny_ldm3d])
def test_the_first_frame_of_a_video_and_the_image_beside_a_depth_map(build):
    """What is compared is what the pipeline draws, without the patch and with it."""
    options = {} if build is tiny_ldm3d else {"num_frames": 2}
    comparison = compare(build(), PROMPT, steps=2, config=agentsd.AgentSDConfig(ratio=0.6), **options)
    for pipe, run in (
        (build(), comparison.baseline_run),
        (agentsd.apply_patch(build(), ratio=0.6), comparison.agentsd_run),
    ):
        generator = torch.Generator().manual_seed(0)
        output = pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="np", **options)
        np.testing.assert_array_equal(run.values, output.rgb[0] if build is tiny_ldm3d else output.frames[0][0])
    assert comparison.psnr < math.inf
    assert len(comparison.baseline_time.steps) == 2


@pytest.mark.parametrize("build", [tiny_audio, lambda: tiny_audio(MusicLDMPipeline)])
def test_a_pipeline_that_gives_sound(build):
    """Found out before anything runs."""
    pipe = build()
    with pytest.raises(TypeError, match=f"{type(pipe).__name__} gives `audios`, not images"):
        compare(pipe, PROMPT)
    assert not agentsd.is_patched(pipe)


def no_tensor_in(text):
    return not any(words in text for words in ("tensor(", "array(", "at 0x"))


def test_embeddings_instead_of_a_prompt(tmp_path):
    """As for weighted or long prompts; the same image as with the prompt, and no tensor in what is written."""
    pipe = tiny_sd()
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    comparison = compare(pipe, steps=2, prompt_embeds=embeds, negative_prompt_embeds=negative)
    np.testing.assert_array_equal(np.asarray(comparison.baseline), draw(tiny_sd(), steps=2))
    saved = json.loads(comparison.save(tmp_path)["comparison"].read_text(encoding="utf-8"))
    assert saved["settings"]["prompt"] is None
    assert saved["settings"]["options"]["prompt_embeds"] == f"Tensor of shape (1, 77, {TEXT_WIDTH}), float32"
    assert no_tensor_in(json.dumps(saved)) and no_tensor_in(repr(comparison))
    assert "prompt_embeds, negative_prompt_embeds, seed 0, 128×128" in " ".join(shown(comparison).split())


def test_embeddings_of_sdxl_and_a_second_prompt():
    pipe = tiny_sdxl()
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, device="cpu")
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    options |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    with_embeds = compare(pipe, steps=2, **options)
    np.testing.assert_array_equal(with_embeds.baseline_run.values, compare(pipe, PROMPT, steps=2).baseline_run.values)
    second = compare(pipe, PROMPT, steps=2, prompt_2="a blue heart")
    assert second.settings["options"] == {"prompt_2": "a blue heart"}
    assert not np.array_equal(second.baseline_run.values, with_embeds.baseline_run.values)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (
            lambda: with_unet(StableDiffusionInpaintPipeline),
            {"prompt": "a", "image": image(), "mask_image": half_mask()},
        ),
        (tiny_instruct_pix2pix, {"prompt": "a", "image": image(), "image_guidance_scale": 2.0}),
        (tiny_upscaler, {"prompt": "a", "image": image(size=32), "noise_level": 5}),
        (tiny_image_variation, {"image": image()}),
        (tiny_unclip, {"image": image()}),
        (tiny_unclip, {"prompt": "a", "image_embeds": torch.ones(1, TEXT_WIDTH)}),
        (tiny_sd, {"prompt": "a", "latents": torch.ones(1, 4, 16, 16)}),
        (tiny_sd, {"prompt": "a", "eta": 0.5, "guidance_rescale": 0.5}),
    ],
)
def test_whatever_a_pipeline_takes(build, options, tmp_path):
    """With or without a prompt; also through the wrapper, and in what is written of it."""
    pipe = build()
    comparison = agentsd.AgentSDPipeline(pipe).compare(steps=4, seconds=0, **options)
    generator = torch.Generator().manual_seed(0)
    with agentsd.patch.unpatched(pipe):
        expected = pipe(**options, num_inference_steps=4, generator=generator, output_type="np").images[0]
    np.testing.assert_array_equal(comparison.baseline_run.values, expected)
    others = {name: value for name, value in options.items() if name != "prompt"}
    assert comparison.settings["options"].keys() == others.keys()
    assert no_tensor_in(comparison.save(tmp_path)["comparison"].read_text(encoding="utf-8"))
    assert no_tensor_in(shown(comparison))


def test_errors_write_out_no_tensors():
    """Those of diffusers as well."""
    pipe, embeds = tiny_sd(), torch.zeros(1, 77, TEXT_WIDTH)
    for options, message in (
        ({"prompt": PROMPT, "prompt_embeds": embeds}, "either `prompt` or `prompt_embeds`"),
        ({"prompt_embeds": embeds.repeat(3, 1, 1)}, r"draws one image, but .* Tensor of shape \(3, 77, 32\)"),
        ({"prompt": embeds}, "must be one string, but got Tensor"),
        ({"prompt": PROMPT, "steps": embeds}, r"an integer, but got Tensor of shape"),
        ({"prompt": PROMPT, "seconds": embeds.numpy()}, r"a number, but got ndarray of shape"),
        ({"prompt": PROMPT, "configs": embeds}, r"but got Tensor of shape"),
        ({"prompt": PROMPT, "ip_adapter_image_embeds": embeds}, "has to be of type `list`"),
    ):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            compare(pipe, **{"steps": 1, **options})
        assert no_tensor_in(str(caught.value)) and len(str(caught.value)) < 400
    with pytest.raises(TypeError, match=r"`ratio` must be a number, but got Tensor of shape \(1, 77, 32\)"):
        agentsd.AgentSDConfig(ratio=embeds)
    assert not agentsd.is_patched(pipe)


def test_what_the_libraries_warn_of_is_said_once():
    """By any number of rounds and variants; it is in the saved file, too."""
    comparison = compare(tiny_sd(), "apple " * 30, steps=1, configs=["paper", "agent"])
    (warning,) = comparison.warnings
    assert warning.startswith("The prompt is longer than the 77 tokens")
    assert comparison.to_dict()["warnings"] == [warning]


def test_an_image_without_a_step_is_refused():
    pipe = with_unet(StableDiffusionImg2ImgPipeline)
    with pytest.raises(ValueError, match=r"`strength=0.01` leaves none of 25 steps"):
        compare(pipe, "a", image=image(), strength=0.01)


def test_pipeline_without_a_unet():
    """Anything else than a pipeline with a UNet is refused before it is run."""
    with pytest.raises(TypeError, match="Expected a diffusers pipeline with a UNet"):
        compare(object(), PROMPT)


def test_both_images_are_the_ones_asked_for():
    request = {"negative_prompt": "blue", "height": 64, "width": 96}
    comparison = compare(tiny_sd(), PROMPT, steps=2, guidance_scale=2.0, seed=3, **request)
    for pipe, found in ((tiny_sd(), comparison.baseline), (agentsd.apply_patch(tiny_sd()), comparison.agentsd)):
        generator = torch.Generator().manual_seed(3)
        expected = pipe(PROMPT, num_inference_steps=2, guidance_scale=2.0, generator=generator, **request).images[0]
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert (comparison.settings["height"], comparison.settings["width"]) == (64, 96)


def test_a_patch_that_does_not_fit_is_refused_before_any_image(monkeypatch):
    """Also the second of several, and whatever the first would have taken."""
    pipe = tiny_sd()
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *_, **__: pytest.fail("it drew"))
    configs = {"good": agentsd.AgentSDConfig(), "bad": agentsd.AgentSDConfig(reuse={"branch": 99})}
    with pytest.raises(ValueError, match="`branch` must be below"):
        compare(pipe, PROMPT, steps=2, seconds=0, configs=configs)
    assert not agentsd.is_patched(pipe)
