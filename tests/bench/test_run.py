"""A run of the benchmark: every case is a row, with what was measured or why it could not be."""

import json
import platform
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from bench_runs import calls, quality, speed
from compat_models import tiny_gligen
from diffusers import StableDiffusionPipeline
from models import ONE_LEVEL, tiny_refiner, tiny_sd
from other_pipelines import tiny_audio, tiny_ldm3d, tiny_text_to_video, without_size

from agentsd.bench import METHODS, BenchError, BenchSettings, load_result, measure, run, run_bench
from agentsd.bench.methods import Baseline
from agentsd.bench.models import SHAPES, UNetSubject
from agentsd.bench.rows import Case
from agentsd.bench.schedule import CALL_STEPS
from agentsd.bench.store import RunFolder
from agentsd.utils.timing import Sample, Variant


# Generations


def test_every_method_at_every_setting_is_a_row(model):
    reported = []
    settings = speed(model, ratios=(0.3, 0.5), batches=(1, 2), sizes=((64, 64), (64, 96)), repeats=1, steps=1)
    result = run_bench(settings, progress=lambda *state: reported.append(state))
    names = ["baseline"]
    names += [
        f"{name} {ratio}" for name in ("agentsd", "agentsd-agent", "agentsd-tome", "tomesd") for ratio in (0.3, 0.5)
    ]
    names += ["attention-free"]
    assert [row.name for row in result.rows] == names * 4
    settings = [(row.height, row.width, row.batch) for row in result.rows[:: len(names)]]
    assert settings == [(64, 64, 1), (64, 64, 2), (64, 96, 1), (64, 96, 2)]
    for row in result.rows:
        assert row.q1 <= row.seconds <= row.q3
        assert 0 < row.step_q1 <= row.step_seconds <= row.step_q3 < row.q3
        assert row.step_of_baseline[0] > 0
        assert (row.rounds, row.steps, row.reason, row.peak_bytes) == (1, 1, None, None)
    assert {row.speedup for row in result.rows if row.method == "baseline"} == {1}
    assert [row.step_of_baseline for row in result.rows if row.method == "baseline"] == [[1.0]] * 4
    assert result.rows[1].step_of_baseline[0] != result.rows[1].speedup, "text and decoding take time too"
    compared = {row.method for row in result.rows if row.of_tomesd}
    assert compared == {"agentsd", "agentsd-agent", "agentsd-tome"}, "with tomesd at their own ratio"
    assert {row.method for row in result.rows if row.of_free} == compared | {"tomesd"}
    assert reported[0] == ("tiny 64×64 baseline", 0, 80)
    assert reported[-1] == ("done", 80, 80)
    assert result.environment["device"] == "cpu"
    assert result.environment["dtype"] == "float32"
    assert result.environment["sdpa"] == "flash attention"
    if platform.libc_ver()[0] == "glibc":
        assert result.environment["malloc"] == "keeps freed memory"


def test_a_model_draws_at_its_own_size_by_default(model):
    (row,) = run_bench(speed(model, sizes=(), methods=("baseline",), repeats=1)).rows
    assert (row.height, row.width) == (128, 128)


def test_every_other_round_is_in_reverse_order(model, tmp_path):
    run_bench(speed(model, methods=("baseline", "agentsd", "tomesd"), repeats=3), out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    orders = [list(row["samples"]) for row in rows if row["kind"] == "round"]
    assert orders == [orders[0], orders[0][::-1], orders[0]]


def test_memory_is_measured_for_each_method(model):
    rows = run_bench(speed(model, methods=("baseline", "agentsd"), memory=True, repeats=1)).rows
    assert all(100 * 2**20 < row.peak_bytes < 8 * 2**30 for row in rows)


@pytest.mark.parametrize(("share", "steps"), [(0.5, 3), (0.6, 3), (2.0, 6)])
def test_fewer_steps_fit_in_the_time_of_agentsd(model, monkeypatch, share, steps):
    """As many as fit in half of the time, say; never more than the baseline has, also where agentsd is slower."""
    taken = []

    def time_round(variants, device, on_call=None, on_error=None):
        seconds = {"baseline": 1.0, "agentsd 0.4": share}
        taken.append([variant.name for variant in variants])
        return {
            variant.name: Sample(6 * seconds.get(variant.name, 1), seconds.get(variant.name, 1))
            for variant in variants
        }

    monkeypatch.setattr(measure, "time_round", time_round)
    rows = run_bench(speed(model, methods=("baseline", "fewer-steps"), steps=6, repeats=2)).rows
    assert [row.steps for row in rows] == [6, steps]
    in_turn = [["baseline", "agentsd 0.4"], ["baseline", "fewer-steps 0.4"]]
    assert taken == [order for names in in_turn for order in (names, names[::-1])]


def test_a_share_of_the_steps_is_timed_and_drawn(model):
    methods = ("baseline", "fewer-steps-75%", "fewer-steps-50%")
    rows = run_bench(quality(model, methods=methods, steps=4, images=1)).rows
    assert [(row.name, row.steps) for row in rows] == [(name, 4 - index) for index, name in enumerate(methods)]
    assert all("psnr" in row.quality for row in rows[1:])


def test_configurations_of_one_method_are_compared_with_each_other(model, tmp_path):
    """In one run: each has a row, images and memory of its own, and a resumed run finds them."""
    methods = ("baseline", "agentsd", "agentsd:agent_until=0", "agentsd:agent_until=0:late_phase=kv-mean")
    size = (128, 128)  # enough tokens for agents
    settings = quality(model, methods=methods, ratios=(0.3, 0.5), images=1, sizes=(size,), steps=4, memory=True)
    result = run_bench(settings, out=tmp_path)
    assert [row.name for row in result.rows] == [
        "baseline",
        *(f"{name} {ratio}" for name in methods[1:] for ratio in (0.3, 0.5)),
    ]
    assert all(row.seconds and row.peak_bytes for row in result.rows)
    drawn = {path.parent.name: path.read_bytes() for path in tmp_path.rglob("00000.png")}
    assert set(drawn) == {row.name.replace(" ", "-").replace(":", "-") for row in result.rows}
    assert len(set(drawn.values())) == 6, "down-sampled keys alone are the same at both ratios"
    assert "| agentsd:agent_until=0:late_phase=kv-mean | 0.5 |" in result.to_markdown()
    assert run_bench(settings, out=tmp_path, resume=True).rows == result.rows
    assert load_result(tmp_path).rows == result.rows


@pytest.mark.parametrize("with_memory", [False, True], ids=["here", "in_a_process_of_its_own"])
def test_a_peer_that_cannot_run_is_a_row_that_says_why(model, monkeypatch, with_memory):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    result = run_bench(speed(model, methods=("baseline", "tomesd", "hidiffusion"), memory=with_memory))
    baseline, tomesd, hidiffusion = result.rows
    assert baseline.seconds > 0
    assert tomesd.seconds is None
    assert "not installed" in tomesd.reason
    assert hidiffusion.reason.startswith("hidiffusion does not")
    assert "not run" in result.to_markdown()
    assert any("tomesd 0.4 at 64×64 did not run: tomesd is not installed" in note for note in result.notes())


def run_out_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 EiB")


def run_out_on_a_cpu():
    torch.empty(2**46, dtype=torch.uint8)  # 64 TiB


@pytest.mark.parametrize("run_out", [run_out_on_a_gpu, run_out_on_a_cpu])
def test_out_of_memory_is_a_cell(model, monkeypatch, run_out):
    class Greedy(Baseline):
        def apply(self, pipe, ratio, options):
            calls = []

            def refuse(module, args):
                calls.append(module)
                if len(calls) > 1:  # the warm-up still fits
                    run_out()

            pipe.unet.register_forward_pre_hook(refuse)

    monkeypatch.setitem(METHODS, "greedy", Greedy("greedy"))
    result = run_bench(speed(model, methods=("baseline", "greedy"), steps=1))
    baseline, greedy = result.rows
    assert baseline.rounds == 2
    assert greedy.reason == "out of memory"
    assert "| greedy |  | out of memory |" in result.to_markdown()


def test_no_method_that_can_run_is_an_error(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    with pytest.raises(BenchError, match="None of the methods can run here: tomesd is not installed"):
        run_bench(speed(model, methods=("tomesd",)))


def test_compiled_on_both_sides(model, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda module, mode, **_: modes.append(mode) or module)
    settings = partial(speed, model, methods=("baseline", "agentsd"), repeats=1)
    assert run_bench(settings(compile=True)).title.endswith(", torch.compile")
    assert run_bench(settings(compile="reduce-overhead")).title.endswith(", torch.compile (reduce-overhead)")
    assert modes == [None] * 2 + ["reduce-overhead"] * 2


def test_every_variant_is_really_compiled(tmp_path, monkeypatch):
    """More of them than Dynamo keeps by default: past that it would go on uncompiled, in silence."""
    tiny_sd(**ONE_LEVEL).save_pretrained(tmp_path / "small")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # capturing is what is tested
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(cache_size_limit=2):
        run_bench(speed(str(tmp_path / "small"), methods=("baseline", "agentsd"), compile=True, repeats=1, steps=5))
        assert torch._dynamo.config.cache_size_limit == 2, "as it was found"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3, "one for the baseline, and one for each phase"


# Calls of a UNet


def test_the_cpu_suite_computes_the_whole_schedule(shape, tmp_path):
    result = run_bench(calls(), out=tmp_path)
    methods = ["baseline", "agentsd-agent", "agentsd-tome", "agentsd", "tomesd", "attention-free"]
    assert [row.method for row in result.rows] == methods * 2
    assert [(row.height, row.width) for row in result.rows[::6]] == [(64, 64), (128, 64)]

    rounds = [record["samples"] for record in RunFolderReader(tmp_path).rounds if record["height"] == 64]
    seconds = [{name: sample["seconds"] for name, sample in samples.items()} for samples in rounds]
    whole = [0.4 * one["agentsd-agent 0.4"] + 0.6 * one["agentsd-tome 0.4"] for one in seconds]
    row = result.rows[3]
    assert [row.method for row in result.rows if row.is_computed] == ["agentsd", "agentsd"]
    assert row.seconds == pytest.approx(sum(whole) / 2)
    speedups = [one["baseline"] / time for one, time in zip(seconds, whole, strict=True)]
    assert row.speedup == pytest.approx(sum(speedups) / 2)
    for (value,), other in ((row.of_tomesd, "tomesd 0.4"), (row.of_free, "attention-free")):
        ratios = [one[other] / time for one, time in zip(seconds, whole, strict=True)]
        assert value == pytest.approx(sum(ratios) / 2), "round by round, not of two medians"
    assert "agentsd †" in result.to_markdown()
    assert "0.4 of the agent phase's time plus 0.6 of the ToMe phase's" in result.to_markdown()


def test_one_phase_for_all_steps_is_called_not_computed(shape):
    """Naming `sx`, `sy` or `agent_ratio` leaves no schedule to compute."""
    methods = ("baseline", "agentsd-agent", "agentsd-tome", "agentsd")
    for options in ({"sx": 2}, {"sy": 4}, {"agent_ratio": 0.9}):
        result = run_bench(calls(methods=methods, sizes=((64, 64),), repeats=1, options=options))
        row = result.rows[3]
        assert (row.method, row.is_computed, row.rounds) == ("agentsd", False, 1)
        assert row.seconds > 0
        assert "computed" not in result.to_markdown()


def test_what_needs_steps_is_the_mean_of_the_calls_of_a_run(shape, monkeypatch, tmp_path):
    """A method that takes 1 s in each of 12 calls is as fast as one of a single call of 1 s."""

    def time_round(variants, device, on_call=None, on_error=None):
        return {v.name: Sample(CALL_STEPS if "0.4" in v.name else 1.0, 0.5) for v in variants}

    monkeypatch.setattr(measure, "time_round", time_round)
    methods = ("baseline", "agentsd+reuse-2", "attention-free")
    result = run_bench(calls(methods=methods, sizes=((64, 64),), repeats=1), out=tmp_path)
    assert [(row.steps, row.seconds, row.speedup) for row in result.rows] == [
        (None, 1.0, 1.0),
        (CALL_STEPS, 1.0, 1.0),
        (None, 1.0, 1.0),
    ]
    assert {row.step_seconds for row in result.rows} == {None}
    assert "| agentsd+reuse-2 | 0.4 | 12 |" in result.to_markdown()
    assert "12 steps: the mean of as many calls" in result.to_markdown()
    (one,) = RunFolderReader(tmp_path).rounds
    assert one["samples"]["agentsd+reuse-2 0.4"] == {"seconds": 1.0, "step_seconds": None}


@pytest.mark.parametrize("options", [{"reuse": 2}, {"match_interval": 2}], ids=str)
def test_an_option_that_keeps_something_takes_steps(shape, options):
    """A single call would be timed as if nothing were."""
    methods = ("baseline", "agentsd-agent", "agentsd")
    rows = run_bench(calls(methods=methods, sizes=((64, 64),), repeats=1, options=options)).rows
    assert [(row.method, row.steps, row.is_computed) for row in rows] == [
        (name, CALL_STEPS, False) for name in methods
    ]


class RunFolderReader:
    def __init__(self, path):
        self.rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
        self.rounds = [record for record in self.rounds if record["kind"] == "round"]


def test_what_needs_a_generation_says_so_in_a_call(shape):
    rows = run_bench(calls(methods=("baseline", "fewer-steps", "agentsd"), sizes=((64, 64),))).rows
    assert "only in a generation" in rows[1].reason
    assert "agentsd-agent and agentsd-tome, which did not both run" in rows[2].reason


def test_sizes_after_the_budget_are_left_out(shape):
    rows = run_bench(calls(methods=("baseline",), budget_minutes=1e-4)).rows
    assert [row.reason for row in rows] == [None, "left out: the 0.0001 minutes were used up"]


@pytest.mark.slow
def test_the_real_shape_runs():
    result = run_bench(BenchSettings.of_suite("cpu", sizes=((128, 128),), repeats=1))
    assert all(row.seconds > 0 for row in result.rows)


def test_what_compiles_later_is_warmed_up_for_longer(monkeypatch):
    """DeepCache makes another graph in its second call, which must not be compiled in the first timed round."""
    graphs = iter([0, 1, 1, 2, 2, 2])  # looked at before and after each call
    monkeypatch.setattr(measure, "compiled_graphs", lambda: next(graphs))
    called = []
    for compiled, wanted in ((True, 3), (False, 1)):
        called.clear()
        bench = SimpleNamespace(
            settings=BenchSettings(compile=compiled),
            subject=SimpleNamespace(device=torch.device("cpu")),
        )
        graphs = iter([0, 1, 1, 2, 2, 2])
        measure.CaseTimer._warm_up(bench, Variant("deepcache", called.append), lambda: None)
        assert len(called) == wanted


@pytest.mark.parametrize(
    ("settings", "steps", "wanted"),
    [
        ({"suite": "shapes", "models": ("sd15",)}, 12, 4),
        ({"suite": "shapes", "models": ("sd15",)}, 1, 1),
        ({"suite": "shapes", "models": ("sd15",), "compile": True}, 12, 12),
        ({"suite": "speed"}, 20, 20),
    ],
)
def test_only_calls_that_are_not_compiled_have_a_short_warm_up(settings, steps, wanted):
    bench = SimpleNamespace(settings=BenchSettings.of_suite(**settings))
    assert measure.CaseTimer._warm_up_steps(bench, steps) == wanted


def test_every_row_has_its_own_memory(model, monkeypatch):
    def peak(device, prepare, others=0):
        _, case, _ = prepare.args
        return case.width + (case.method == "agentsd")

    monkeypatch.setattr(measure, "peak_memory", peak)
    settings = speed(model, methods=("baseline", "agentsd"), memory=True, repeats=1, sizes=((64, 64), (64, 96)))
    assert [row.peak_bytes for row in run_bench(settings).rows] == [64, 65, 96, 97]


@pytest.mark.parametrize("compile", [False, True, "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"])
def test_memory_and_launches_on_a_gpu_are_kept_without_what_others_hold(tmp_path, monkeypatch, compile):
    """Without one: what is asked of it is watched. Of CUDA graphs, the memory of activations is not counted."""
    monkeypatch.setattr(measure, "peak_memory", lambda device, prepare, others: prepare() and 1000 - others)
    monkeypatch.setattr(measure, "count_launches", lambda call: call() or 40)
    steps = []
    subject = SimpleNamespace(
        device=torch.device("cuda"), call=lambda model, case, count: lambda watch: steps.append(count)
    )
    folder = RunFolder(tmp_path, {}, {})
    timer = measure.CaseTimer(subject, BenchSettings(compile=compile), folder, None, None)
    case = Case("m", "baseline", None, 64, 64, 1)
    timer._twins[case.name] = object()
    for _ in range(2):  # the second time, both are on record
        timer._profile(case, Variant(case.name, lambda watch: None), others=300)
    key = {"model": "m", "height": 64, "width": 64, "batch": 1, "name": "baseline"}
    memory = [] if compile in ("reduce-overhead", "max-autotune") else [{"kind": "memory", **key, "peak_bytes": 700}]
    assert folder.rounds.records == [*memory, {"kind": "launches", **key, "launches": 4.0}]
    assert steps == [10]


def test_the_budget_is_in_minutes(shape, monkeypatch):
    clock = iter([0.0, 0.0, 89.0])
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    rows = run_bench(calls(methods=("baseline",), budget_minutes=1.5)).rows
    assert [row.reason for row in rows] == [None, None]


def test_a_model_is_gone_when_the_next_one_is_loaded(shape, monkeypatch):
    """Memory may have room for one only."""
    monkeypatch.setitem(SHAPES, "sd21", SHAPES["sd15"])
    made, alive, load = [], [], UNetSubject.load

    def watched(self):
        alive.extend(ref() is not None for ref in made)
        unet = load(self)
        made.append(weakref.ref(unet))
        return unet

    monkeypatch.setattr(UNetSubject, "load", watched)
    settings = {"methods": ("baseline",), "sizes": ((64, 64),), "repeats": 1, "memory": False, "device": "cpu"}
    run_bench(BenchSettings.of_suite("shapes", models=("sd15", "sd21"), **settings))
    assert alive == [False]


# Progress


@pytest.mark.parametrize(("methods", "total"), [(("baseline", "agentsd"), 10), (("agentsd", "fewer-steps"), 17)])
def test_progress_goes_by_calls_and_images(model, methods, total):
    """Without a leap: also over the baseline's images where it is not asked for, and calls that settle steps."""
    reported = []
    run_bench(quality(model, methods=methods), progress=lambda what, done, total: reported.append((done, total)))
    assert reported == [(done, total) for done in range(total + 1)]


def test_progress_begins_where_a_run_was_cut_off(model, tmp_path):
    def interrupt(what, done, total):
        if done == 8:  # the second image of agentsd, after four calls and four images
            assert what.endswith("64×64 agentsd 0.4 images")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(quality(model), out=tmp_path, progress=interrupt)
    reported = []
    run_bench(quality(model), out=tmp_path, resume=True, progress=lambda what, done, total: reported.append(done))
    assert reported == [8, 9, 10]


def test_what_cannot_run_counts_as_done(model, monkeypatch):
    reported = []
    monkeypatch.setitem(sys.modules, "tomesd", None)
    run_bench(quality(model, methods=("tomesd", "baseline")), progress=lambda what, done, total: reported.append(done))
    assert reported == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("build", [tiny_ldm3d, tiny_text_to_video])
def test_an_image_with_depth_and_the_first_frame_of_a_video(build, tmp_path):
    """They are timed step by step, and judged like images."""
    build().save_pretrained(tmp_path / "tiny")
    result = run_bench(quality(str(tmp_path / "tiny"), images=2), out=tmp_path / "out")
    assert [row.images for row in result.rows] == [2, 2]
    assert all(row.step_seconds > 0 and row.reason is None for row in result.rows)
    assert 0 < result.rows[1].quality["ssim"][0] < 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny_audio, "AudioLDMPipeline gives `audios`, not images"),
        (tiny_refiner, "StableDiffusionXLImg2ImgPipeline starts from an image"),
        (tiny_gligen, "StableDiffusionGLIGENPipeline needs `gligen_phrases` and `gligen_boxes`"),
        (lambda: without_size(StableDiffusionPipeline), "give `height` and `width`"),
    ],
)
@pytest.mark.parametrize("values", [{}, {"memory": True}])
def test_what_cannot_be_drawn_is_named_at_once(build, message, values, tmp_path):
    """Once for all cases, and not as the failure of each in a process of its own."""
    build().save_pretrained(tmp_path / "tiny")
    sizes = () if "height" in message else ((64, 64),)
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        run_bench(speed(str(tmp_path / "tiny"), sizes=sizes, **values))
    assert "None of the methods" not in str(caught.value)


def test_what_the_libraries_warn_of_is_said_once(model):
    long = tuple(f"{name} " * 30 for name in ("apple", "heart", "tree", "house", "river", "stone", "cloud"))
    result = run_bench(quality(model, images=7, prompts=long))
    assert len(result.warnings) == 6
    assert all(text.startswith("The prompt is longer than the 77 tokens") for text in result.warnings[:5])
    assert result.warnings[5] == "2 more warnings of this kind were left out."
    assert run_bench(speed(model, repeats=1)).warnings == []
