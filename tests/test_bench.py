"""The benchmark: fair timing, methods that are really on and really off, honest rows, runs that resume."""

import io
import json
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import UNet2DConditionModel
from models import tiny_sd, tiny_unet
from rich.console import Console

import agentsd
from agentsd.bench import (
    METHODS,
    BenchError,
    BenchSettings,
    MethodUnavailable,
    SuiteSettings,
    bench_pipeline,
    environment,
    run_bench,
    run_suite,
)
from agentsd.bench import runner as runner_module
from agentsd.bench.methods import AttentionFreeProcessor, patchable_sites
from agentsd.bench.report import BenchResult, Row
from agentsd.bench.shapes import SD15_UNET, share_weights, unet_inputs
from agentsd.bench.store import RunFolder
from agentsd.bench.timing import PeakMemory, Sample, Variant, summarize, time_round
from agentsd.patch import current_patch


CPU = torch.device("cpu")
PATCHES = [name for name in METHODS if name != "vanilla"]
TINY_SUITE = SuiteSettings(sizes=((64, 64), (128, 64)), repeats=2)


@pytest.fixture
def unet():
    return tiny_unet()


@torch.no_grad()
def call(unet, height=128, width=128):
    return unet(*unet_inputs(unet, height, width)).sample


# Timing


def test_variants_are_interleaved_and_warmed_up_after_each_switch():
    events = []

    def variant(name):
        @contextmanager
        def enter():
            events.append(f"+{name}")
            yield
            events.append(f"-{name}")

        return Variant(name, enter, lambda: events.append(name))

    variants = [variant("a"), variant("b")]
    for _ in range(2):
        time_round(variants, CPU, warmup=2)
    assert events == ["+a", "a", "a", "a", "-a", "+b", "b", "b", "b", "-b"] * 2


def test_only_the_last_call_is_timed():
    times = iter([0.2, 0.0])
    variant = Variant("slow start", nullcontext, lambda: __import__("time").sleep(next(times)))
    assert time_round([variant], CPU, warmup=1)["slow start"].seconds < 0.1


def test_every_call_is_announced():
    told = []
    time_round([Variant("a", nullcontext, lambda: None)], CPU, warmup=1, on_call=told.append)
    assert told == ["a", "a"]


def test_speedup_is_the_median_of_paired_ratios():
    # The second round is disturbed for both alike: the ratio of the medians would be 2.5, no round shows that.
    rounds = [
        {"vanilla": Sample(1.0), "fast": Sample(0.5)},
        {"vanilla": Sample(9.0), "fast": Sample(4.5)},
        {"vanilla": Sample(2.5), "fast": Sample(1.0)},
    ]
    summary = summarize(rounds, "fast", baseline="vanilla")
    assert summary.speedup == 2.0
    assert (summary.q1, summary.median, summary.q3) == (0.75, 1.0, 2.75)
    assert summary.rounds == 3
    assert summarize(rounds, "fast").speedup is None
    assert summarize(rounds[:1], "fast").q1 == summarize(rounds[:1], "fast").q3 == 0.5


def test_a_summary_needs_a_round():
    with pytest.raises(ValueError, match="no finished round"):
        summarize([], "vanilla")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from Linux' /proc")
def test_peak_memory_forgets_earlier_peaks():
    memory = PeakMemory(CPU)
    memory.reset()
    small = memory.read()
    if small is None:
        pytest.skip("this kernel does not let a process set back its peak")
    torch.ones(64 * 2**20)  # 256 MiB, freed at once
    large = memory.read()
    assert large > small + 200 * 2**20
    memory.reset()
    assert memory.read() < large - 100 * 2**20


# Methods


@pytest.mark.parametrize("name", PATCHES)
def test_a_method_is_on_inside_and_gone_outside(unet, name):
    before = call(unet)
    keys = set(unet.state_dict())
    with METHODS[name].enter(unet, 0.4):
        assert not torch.equal(call(unet), before)
    assert torch.equal(call(unet), before)
    assert set(unet.state_dict()) == keys
    assert not [module for module in unet.modules() if hasattr(module, "_tome_info")]


@pytest.mark.parametrize("name", PATCHES)
def test_a_method_is_gone_after_an_error(unet, name):
    before = call(unet)
    with pytest.raises(KeyboardInterrupt), METHODS[name].enter(unet, 0.4):
        raise KeyboardInterrupt
    assert torch.equal(call(unet), before)


@pytest.mark.parametrize("name", PATCHES)
def test_a_method_takes_a_pipeline(name):
    pipe = tiny_sd()
    before = call(pipe.unet)
    with METHODS[name].enter(pipe, 0.4):
        assert not torch.equal(call(pipe.unet), before)


def test_vanilla_is_the_model_itself(unet):
    before = call(unet)
    with METHODS["vanilla"].enter(unet, None):
        assert torch.equal(call(unet), before)


def test_tomesd_is_the_real_package(unet):
    with METHODS["tomesd"].enter(unet, 0.3):
        blocks = [module for module in unet.modules() if type(module).__name__ == "ToMeBlock"]
        assert blocks
        assert blocks[0]._tome_info["args"]["ratio"] == 0.3
    assert not [module for module in unet.modules() if type(module).__name__ == "ToMeBlock"]


@pytest.mark.parametrize(
    ("name", "preset"), [("agentsd", "paper"), ("agentsd-agent", "agent"), ("agentsd-tome", "tome")]
)
def test_agentsd_methods_run_their_presets(unet, name, preset):
    with METHODS[name].enter(unet, 0.3):
        assert current_patch(unet).config == agentsd.AgentSDConfig.preset(preset, ratio=0.3)
    assert not agentsd.is_patched(unet)


def test_a_patch_that_was_there_before_comes_back(unet):
    agentsd.apply_patch(unet, 0.2)
    with METHODS["agentsd"].enter(unet, 0.4):
        pass
    assert current_patch(unet).config.ratio == 0.2


def test_attention_free_runs_in_the_layers_that_agentsd_patches(unet):
    with METHODS["agentsd"].enter(unet, 0.4):
        patched = list(current_patch(unet).site_names)
        assert [site.name for site in patchable_sites(unet)] == patched
    with METHODS["attention-free"].enter(unet, None):
        free = [name for name, module in unet.named_modules() if _is_free(module)]
    assert free == patched
    assert len(free) < sum(name.endswith("attn1") for name, _ in unet.named_modules())


def _is_free(module):
    return isinstance(getattr(module, "processor", None), AttentionFreeProcessor)


def test_attention_free_is_the_value_projection(unet):
    attn = patchable_sites(unet)[0].attn
    x = torch.randn(2, 16, attn.to_v.in_features)
    with METHODS["attention-free"].enter(unet, None):
        assert torch.equal(attn(x), attn.to_out[0](attn.to_v(x)))


def test_a_model_without_self_attention_is_not_timed_as_if_it_had_some():
    unet = tiny_unet(
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, mid_block_type="UNetMidBlock2D"
    )
    for name, error in (("agentsd", ValueError), ("attention-free", MethodUnavailable), ("tomesd", MethodUnavailable)):
        with pytest.raises(error), METHODS[name].enter(unet, 0.4):
            pass


def test_processors_taken_away_while_patching_are_noticed(unet, monkeypatch):
    from agentsd.bench import methods

    monkeypatch.setattr(methods, "AgentAttnProcessor", type("Another", (), {}))
    with pytest.raises(MethodUnavailable, match="patched no self-attention"), METHODS["agentsd"].enter(unet, 0.4):
        pass
    assert not agentsd.is_patched(unet)


# Generations of a pipeline


def test_bench_of_a_pipeline(monkeypatch):
    loaded = {}

    def load(model, *, device=None, dtype=None):
        loaded.update(model=model, device=device, dtype=dtype)
        return tiny_sd()

    monkeypatch.setattr(runner_module, "load_pipeline", load)
    told = []
    settings = BenchSettings(
        model="a model", ratios=(0.3, 0.5), steps=2, batch=2, warmup=0, repeats=2, dtype="float32", device="cpu"
    )
    result = run_bench(settings, progress=lambda *state: told.append(state))

    assert loaded == {"model": "a model", "device": "cpu", "dtype": "float32"}
    expected = [("vanilla", None)]
    expected += [
        (name, ratio) for name in ("agentsd", "agentsd-agent", "agentsd-tome", "tomesd") for ratio in (0.3, 0.5)
    ]
    expected += [("attention-free", None)]
    assert [(row.method, row.ratio) for row in result.rows] == expected
    assert {(row.height, row.width, row.rounds) for row in result.rows} == {(128, 128, 2)}
    assert all(row.q1 <= row.median <= row.q3 for row in result.rows)
    assert result.rows[0].speedup == 1
    assert [row.of_tomesd for row in result.rows if row.method == "tomesd"] == [1, 1]
    assert result.rows[-1].of_attention_free == 1
    assert not any(row.is_computed for row in result.rows)
    assert told[0] == (0, 20, "vanilla")
    assert told[1] == (1, 20, "agentsd 0.3")
    assert told[-1] == (20, 20, "done")
    assert result.environment["device"] == "cpu"
    assert result.environment["dtype"] == "float32"


def test_bench_uses_the_size_and_steps_asked_for():
    pipe = tiny_sd()
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    settings = BenchSettings(methods=("vanilla",), height=64, width=96, steps=3, batch=2, warmup=1, repeats=1)
    result = bench_pipeline(pipe, settings)
    assert calls == [(4, 4, 8, 12)] * 6  # with guidance, and a warm-up
    assert (result.rows[0].height, result.rows[0].width) == (64, 96)


def test_a_missing_package_is_a_row_that_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    settings = BenchSettings(methods=("vanilla", "tomesd"), steps=1, warmup=0, repeats=1)
    result = bench_pipeline(tiny_sd(), settings)
    vanilla, tomesd = result.rows
    assert vanilla.median > 0
    assert tomesd.median is None
    assert "not installed" in tomesd.reason
    assert "not run" in result.to_markdown()
    assert any("tomesd 0.4 did not run: tomesd is not installed" in note for note in result.notes)


def test_no_method_that_can_run_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    with pytest.raises(BenchError, match="None of the methods can run here: tomesd is not installed"):
        bench_pipeline(tiny_sd(), BenchSettings(methods=("tomesd",)))


# The suite of UNet calls


def test_the_cpu_suite(tmp_path):
    result = run_suite("cpu", TINY_SUITE, out=tmp_path, build_unet=tiny_unet)
    methods = ["vanilla", "agentsd-agent", "agentsd-tome", "agentsd", "tomesd", "attention-free"]
    assert [row.method for row in result.rows] == methods * 2
    assert [(row.height, row.width) for row in result.rows[::6]] == [(64, 64), (128, 64)]

    records = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [(record["height"], record["width"]) for record in records] == [(64, 64)] * 2 + [(128, 64)] * 2
    seconds = [{key: sample["seconds"] for key, sample in record["samples"].items()} for record in records[:2]]
    whole = [0.4 * round["agentsd-agent 0.4"] + 0.6 * round["agentsd-tome 0.4"] for round in seconds]
    row = result.rows[3]
    assert row.is_computed
    assert [row.method for row in result.rows if row.is_computed] == ["agentsd", "agentsd"]
    assert row.median == pytest.approx(sum(whole) / 2)
    speedups = [round["vanilla"] / time for round, time in zip(seconds, whole, strict=True)]
    assert row.speedup == pytest.approx(sum(speedups) / 2)
    assert row.of_tomesd == pytest.approx(row.speedup / result.rows[4].speedup)
    assert row.of_attention_free == pytest.approx(row.speedup / result.rows[5].speedup)
    assert "agentsd †" in result.to_markdown()
    assert "0.4 of the agent phase's time plus 0.6 of the ToMe phase's" in result.to_markdown()


def test_copies_for_the_suite_share_weights_and_nothing_else():
    """Five patched copies of a model of 3.4 GB must fit in memory, and patching one must not touch another."""
    unet = tiny_unet()
    twin = share_weights(unet)
    assert all(a is b for a, b in zip(unet.parameters(), twin.parameters(), strict=True))
    with METHODS["tomesd"].enter(twin, 0.4), METHODS["agentsd"].enter(twin, 0.4):
        assert not agentsd.is_patched(unet)
        assert "ToMeBlock" not in {type(module).__name__ for module in unet.modules()}


def test_an_interrupted_suite_resumes(tmp_path):
    def interrupt(done, total, what):
        if done == 22:  # in the third of four rounds
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite("cpu", TINY_SUITE, out=tmp_path, progress=interrupt, build_unet=tiny_unet)
    log = tmp_path / "rounds.jsonl"
    before = log.read_text()
    assert len(before.splitlines()) == 2
    log.write_text(before + '{"height": 128, "wid')  # cut off while writing

    told = []
    result = run_suite(
        "cpu", TINY_SUITE, out=tmp_path, resume=True, progress=lambda *state: told.append(state), build_unet=tiny_unet
    )
    after = log.read_text()
    assert after.startswith(before)
    assert len([json.loads(line) for line in after.splitlines()]) == 4
    assert told[0] == (15, 30, "64×128 vanilla")
    assert all(row.rounds == 2 for row in result.rows)

    finished = run_suite("cpu", TINY_SUITE, out=tmp_path, resume=True, build_unet=tiny_unet)
    assert finished.rows == result.rows
    assert log.read_text() == after


def test_rounds_are_never_mixed_with_those_of_another_run(tmp_path):
    run_suite("cpu", SuiteSettings(sizes=((64, 64),), repeats=1), out=tmp_path, build_unet=tiny_unet)
    with pytest.raises(BenchError, match="earlier run"):
        run_suite("cpu", SuiteSettings(sizes=((64, 64),), repeats=1), out=tmp_path, build_unet=tiny_unet)
    other = SuiteSettings(sizes=((64, 64),), repeats=1, ratios=(0.5,))
    with pytest.raises(BenchError, match=r"another run \(different: settings.ratios\)"):
        run_suite("cpu", other, out=tmp_path, resume=True, build_unet=tiny_unet)


def test_a_log_that_cannot_be_read(tmp_path):
    RunFolder(tmp_path, {}).append({"round": 0})
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\nnonsense\n')
    with pytest.raises(BenchError, match=r"Line 2 of .*rounds\.jsonl"):
        RunFolder(tmp_path, {}, resume=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(BenchError, match=r"run\.json cannot be read"):
        RunFolder(tmp_path, {}, resume=True)


def test_resuming_a_folder_that_is_new_starts_there(tmp_path):
    assert RunFolder(tmp_path / "new", {}, resume=True).rounds == []


def test_suites_and_folders_that_do_not_exist():
    with pytest.raises(BenchError, match="no suite 'gpu'"):
        run_suite("gpu")
    with pytest.raises(BenchError, match="needs the folder"):
        run_suite("cpu", resume=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratios": (0.0,)}, "between 0 and 1"),
        ({"ratios": (1.0,)}, "between 0 and 1"),
        ({"ratios": ()}, "empty"),
        ({"repeats": 0}, "repeats"),
        ({"warmup": -1}, "warmup"),
        ({"steps": 0}, "steps"),
        ({"height": 512}, "both `height` and `width`"),
        ({"batch": 0}, "batch"),
        ({"methods": ()}, "empty"),
        ({"methods": ("vanilla", "magic")}, "no method 'magic'"),
    ],
)
def test_bad_bench_settings(values, message):
    with pytest.raises(BenchError, match=message):
        BenchSettings(**values)


@pytest.mark.parametrize("sizes", [(), ((100, 64),), ((0, 64),)])
def test_bad_suite_sizes(sizes):
    with pytest.raises(BenchError):
        SuiteSettings(sizes=sizes)


# Shapes, environment, report


def test_the_sd15_shape_is_the_real_one():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    sites = patchable_sites(unet)
    assert len(sites) == 5
    assert {(site.attn.to_q.in_features, site.attn.heads) for site in sites} == {(320, 8)}


def test_inputs_fit_the_model_and_repeat(unet):
    first, second = unet_inputs(unet, 64, 128), unet_inputs(unet, 64, 128)
    assert first[0].shape == (2, 4, 8, 16)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_environment_is_plain_data():
    facts = json.loads(json.dumps(environment("cpu", torch.bfloat16)))
    assert facts["torch"] == torch.__version__ or facts["torch"] == torch.__version__.split("+")[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["dtype"] == "bfloat16"
    assert facts["tomesd"] == "0.1.3"
    assert facts["cpu"]


def test_the_report_is_written_and_fits_a_terminal(tmp_path):
    row = Row("agentsd-agent", 0.4, 768, 768, 5, 31.234, 31.0, 31.987, 1.6, 1.2, 0.96, 7 * 2**30)
    failed = Row("tomesd", 0.4, 512, 512, reason="tomesd is not installed")
    result = BenchResult("A title", {"seed": 0}, environment("cpu", torch.float32), [failed, row], ["A note."])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    for word in ("768×768", "agentsd-agent", "31.23 s", "31.00–31.99", "1.600", "0.960", "7.00 GiB", "not run"):
        assert word in text
    data, table = result.save(tmp_path / "new")
    assert json.loads(data.read_text())["rows"][1]["speedup"] == 1.6
    assert "| 768×768 | agentsd-agent | 0.4 | 31.23 s |" in table.read_text()
    assert "- A note." in table.read_text()


@pytest.mark.slow
def test_the_real_shape_runs():
    result = run_suite("cpu", SuiteSettings(sizes=((128, 128),), warmup=0, repeats=1))
    assert all(row.median > 0 for row in result.rows)
