"""A run of the benchmark: every case a row, finished rows kept byte for byte, nothing mixed."""

import json
import platform
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import tiny_sd

from agentsd.bench import METHODS, BenchError, BenchSettings, environment, load_result, run_bench
from agentsd.bench import methods as methods_module
from agentsd.bench import runner as runner_module
from agentsd.bench import shapes as shapes_module
from agentsd.bench.store import Log, RunFolder
from agentsd.bench.timing import Variant


TINY_SHAPE = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def shape(monkeypatch):
    monkeypatch.setitem(shapes_module.SHAPES, "sd15", TINY_SHAPE)


def speed(model, **values):
    given = {"models": (model,), "sizes": ((64, 64),), "steps": 2, "repeats": 2, "memory": False, "device": "cpu"}
    return BenchSettings.of_suite("speed", **{**given, **values})


def calls(**values):
    given = {"sizes": ((64, 64), (128, 64)), "repeats": 2, "memory": False}
    return BenchSettings.of_suite("cpu", **{**given, **values})


# Generations


def test_every_method_at_every_setting_is_a_row(model):
    told = []
    settings = speed(model, ratios=(0.3, 0.5), batches=(1, 2), sizes=((64, 64), (64, 96)), repeats=1, steps=1)
    result = run_bench(settings, progress=lambda *state: told.append(state))
    names = ["vanilla"]
    names += [
        f"{name} {ratio}" for name in ("agentsd", "agentsd-agent", "agentsd-tome", "tomesd") for ratio in (0.3, 0.5)
    ]
    names += ["attention-free"]
    assert [row.name for row in result.rows] == names * 4
    settings = [(row.height, row.width, row.batch) for row in result.rows[:: len(names)]]
    assert settings == [(64, 64, 1), (64, 64, 2), (64, 96, 1), (64, 96, 2)]
    for row in result.rows:
        assert row.q1 <= row.seconds <= row.q3
        assert 0 < row.step_seconds < row.seconds
        assert (row.rounds, row.steps, row.reason, row.peak_bytes) == (1, 1, None, None)
    assert {row.speedup for row in result.rows if row.method == "vanilla"} == {1}
    compared = {row.method for row in result.rows if row.of_tomesd}
    assert compared == {"agentsd", "agentsd-agent", "agentsd-tome"}, "with tomesd at their own ratio"
    assert {row.method for row in result.rows if row.of_free} == compared | {"tomesd"}
    assert told[0] == (0, 80, f"{model} 64×64 vanilla")
    assert told[-1] == (80, 80, "done")
    assert result.environment["device"] == "cpu"
    assert result.environment["dtype"] == "float32"
    assert result.environment["sdpa"] == "flash attention"
    if platform.libc_ver()[0] == "glibc":
        assert result.environment["malloc"] == "keeps freed memory"


def test_a_model_draws_at_its_own_size_by_default(model):
    (row,) = run_bench(speed(model, sizes=(), methods=("vanilla",), repeats=1)).rows
    assert (row.height, row.width) == (128, 128)


def test_every_other_round_is_in_reverse_order(model, tmp_path):
    run_bench(speed(model, methods=("vanilla", "agentsd", "tomesd"), repeats=3), out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    orders = [list(row["samples"]) for row in rows if row["kind"] == "round"]
    assert orders == [orders[0], orders[0][::-1], orders[0]]


def test_memory_is_measured_for_each_method(model):
    rows = run_bench(speed(model, methods=("vanilla", "agentsd"), memory=True, repeats=1)).rows
    assert all(100 * 2**20 < row.peak_bytes < 8 * 2**30 for row in rows)


@pytest.mark.parametrize(("share", "steps"), [(0.5, 3), (0.6, 3), (2.0, 6)])
def test_fewer_steps_fit_in_the_time_of_agentsd(model, monkeypatch, share, steps):
    """As many as fit in half of the time, say; never more than vanilla has, also where agentsd is slower."""
    taken = []

    def time_round(variants, device, on_call=None, on_error=None):
        seconds = {"vanilla": 1.0, "agentsd 0.4": share}
        taken.append([variant.name for variant in variants])
        return {
            variant.name: Sample(6 * seconds.get(variant.name, 1.0), seconds.get(variant.name)) for variant in variants
        }

    from agentsd.bench import runner
    from agentsd.bench.timing import Sample

    monkeypatch.setattr(runner, "time_round", time_round)
    rows = run_bench(speed(model, methods=("vanilla", "fewer-steps"), steps=6, repeats=2)).rows
    assert [row.steps for row in rows] == [6, steps]
    in_turn = [["vanilla", "agentsd 0.4"], ["vanilla", "fewer-steps 0.4"]]
    assert taken == [order for names in in_turn for order in (names, names[::-1])]


@pytest.mark.parametrize("with_memory", [False, True], ids=["here", "in_a_process_of_its_own"])
def test_a_peer_that_cannot_run_is_a_row_that_says_why(model, monkeypatch, with_memory):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    result = run_bench(speed(model, methods=("vanilla", "tomesd", "hidiffusion"), memory=with_memory))
    vanilla, tomesd, hidiffusion = result.rows
    assert vanilla.seconds > 0
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
    class Greedy(methods_module.Vanilla):
        def apply(self, pipe, ratio, options):
            calls = []

            def refuse(module, args):
                calls.append(module)
                if len(calls) > 1:  # the warm-up still fits
                    run_out()

            pipe.unet.register_forward_pre_hook(refuse)

    monkeypatch.setitem(METHODS, "greedy", Greedy("greedy"))
    result = run_bench(speed(model, methods=("vanilla", "greedy"), steps=1))
    vanilla, greedy = result.rows
    assert vanilla.rounds == 2
    assert greedy.reason == "out of memory"
    assert "| greedy |  | out of memory |" in result.to_markdown()


def test_no_method_that_can_run_is_an_error(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    with pytest.raises(BenchError, match="None of the methods can run here: tomesd is not installed"):
        run_bench(speed(model, methods=("tomesd",)))


def test_compiled_on_both_sides(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    result = run_bench(speed(model, methods=("vanilla", "agentsd"), compile=True, repeats=1))
    assert len(compiled) == 2
    assert "torch.compile" in result.title


def test_every_variant_is_really_compiled(model, monkeypatch):
    """More of them than Dynamo keeps by default: past that it would go on uncompiled, in silence."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # capturing is what is tested
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(cache_size_limit=2):
        run_bench(speed(model, methods=("vanilla", "agentsd"), compile=True, repeats=1, steps=5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3, "one for vanilla, and one for each phase"


# Calls of a UNet


def test_the_cpu_suite_computes_the_whole_schedule(shape, tmp_path):
    result = run_bench(calls(), out=tmp_path)
    methods = ["vanilla", "agentsd-agent", "agentsd-tome", "agentsd", "tomesd", "attention-free"]
    assert [row.method for row in result.rows] == methods * 2
    assert [(row.height, row.width) for row in result.rows[::6]] == [(64, 64), (128, 64)]

    rounds = [record["samples"] for record in RunFolderReader(tmp_path).rounds if record["height"] == 64]
    seconds = [{name: sample["seconds"] for name, sample in samples.items()} for samples in rounds]
    whole = [0.4 * one["agentsd-agent 0.4"] + 0.6 * one["agentsd-tome 0.4"] for one in seconds]
    row = result.rows[3]
    assert [row.method for row in result.rows if row.is_computed] == ["agentsd", "agentsd"]
    assert row.seconds == pytest.approx(sum(whole) / 2)
    speedups = [one["vanilla"] / time for one, time in zip(seconds, whole, strict=True)]
    assert row.speedup == pytest.approx(sum(speedups) / 2)
    for (value,), other in ((row.of_tomesd, "tomesd 0.4"), (row.of_free, "attention-free")):
        ratios = [one[other] / time for one, time in zip(seconds, whole, strict=True)]
        assert value == pytest.approx(sum(ratios) / 2), "round by round, not of two medians"
    assert "agentsd †" in result.to_markdown()
    assert "0.4 of the agent phase's time plus 0.6 of the ToMe phase's" in result.to_markdown()


def test_one_phase_for_all_steps_is_called_not_computed(shape):
    """Naming `sx`, `sy` or `agent_ratio` leaves no schedule to compute."""
    methods = ("vanilla", "agentsd-agent", "agentsd-tome", "agentsd")
    for options in ({"sx": 2}, {"sy": 4}, {"agent_ratio": 0.9}):
        result = run_bench(calls(methods=methods, sizes=((64, 64),), repeats=1, options=options))
        row = result.rows[3]
        assert (row.method, row.is_computed, row.rounds) == ("agentsd", False, 1)
        assert row.seconds > 0
        assert "computed" not in result.to_markdown()


class RunFolderReader:
    def __init__(self, path):
        self.rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
        self.rounds = [record for record in self.rounds if record["kind"] == "round"]


def test_what_needs_a_generation_says_so_in_a_call(shape):
    rows = run_bench(calls(methods=("vanilla", "deepcache", "agentsd"), sizes=((64, 64),))).rows
    assert "over the steps of a generation" in rows[1].reason
    assert "agentsd-agent and agentsd-tome, which did not both run" in rows[2].reason


def test_sizes_after_the_budget_are_left_out(shape):
    rows = run_bench(calls(methods=("vanilla",), budget_minutes=1e-4)).rows
    assert [row.reason for row in rows] == [None, "left out: the 0.0001 minutes were spent"]


def test_what_was_left_out_is_measured_with_another_budget(shape, tmp_path):
    settings = {"methods": ("vanilla", "tomesd"), "sizes": ((64, 64), (128, 64), (64, 128))}
    run_bench(calls(**settings, budget_minutes=1e-4), out=tmp_path)
    cases = tmp_path / "cases.jsonl"
    before = cases.read_text().splitlines(keepends=True)
    assert ["left out" in line for line in before] == [False, False, True, True, True, True]
    again = run_bench(calls(**settings, budget_minutes=1e-9), out=tmp_path, resume=True)
    assert [row.reason for row in again.rows] == [None] * 2 + ["left out: the 1e-09 minutes were spent"] * 4
    whole = run_bench(calls(**settings), out=tmp_path, resume=True)
    assert [row.rounds for row in whole.rows] == [2] * 6
    after = cases.read_text().splitlines(keepends=True)
    assert after[:2] == before[:2]
    assert len(after) == 6
    assert load_result(tmp_path).rows == whole.rows


@pytest.mark.slow
def test_the_real_shape_runs():
    result = run_bench(BenchSettings.of_suite("cpu", sizes=((128, 128),), repeats=1))
    assert all(row.seconds > 0 for row in result.rows)


# Cut off and resumed


def test_an_interrupted_run_goes_on(shape, tmp_path):
    def interrupt(done, total, what):
        if done == 22:  # in the first round of the second size
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(calls(), out=tmp_path, progress=interrupt)
    cases, rounds = tmp_path / "cases.jsonl", tmp_path / "rounds.jsonl"
    before, log = cases.read_text(), rounds.read_text()
    assert len(before.splitlines()) == 6
    assert [row.height for row in load_result(tmp_path).rows] == [64] * 6
    rounds.write_text(log + '{"height": 128, "wid')  # cut off while writing

    result = run_bench(calls(), out=tmp_path, resume=True)
    assert cases.read_text().startswith(before)
    assert rounds.read_text().startswith(log)
    assert [row.rounds for row in result.rows] == [2] * 12
    assert load_result(tmp_path) == result

    after = cases.read_text()
    assert run_bench(calls(), out=tmp_path, resume=True) == result
    assert cases.read_text() == after


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_run_goes_on(model, tmp_path):
    """As a user does it: the same command with --resume."""
    command = [sys.executable, "-m", "agentsd", "bench", model, "--methods", "vanilla,agentsd-tome,tomesd"]
    command += "--steps 1 --repeats 1 --no-memory --device cpu --batch 1 --batch 2 --batch 3".split()
    command += ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cases = tmp_path / "run" / "cases.jsonl"
    until = time.monotonic() + 300
    while (not cases.exists() or cases.read_text().count("\n") < 3) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = cases.read_text()
    assert 3 <= before.count("\n") < 9
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert cases.read_text().startswith(before[: before.rfind("\n") + 1])
    rows = [json.loads(line) for line in cases.read_text().splitlines()]
    assert [(row["batch"], row["method"]) for row in rows] == [
        (batch, method) for batch in (1, 2, 3) for method in ("vanilla", "agentsd-tome", "tomesd")
    ]
    assert (tmp_path / "run" / "report.html").exists()


def test_results_are_never_mixed_with_those_of_another_run(shape, tmp_path):
    settings = calls(methods=("vanilla",), sizes=((64, 64),))
    run_bench(settings, out=tmp_path)
    with pytest.raises(BenchError, match="earlier run"):
        run_bench(settings, out=tmp_path)
    with pytest.raises(BenchError, match=r"another run \(different: methods\)"):
        run_bench(calls(methods=("vanilla", "tomesd"), sizes=((64, 64),)), out=tmp_path, resume=True)
    facts = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps({**facts, "agentsd": "0.0.1"}))
    with pytest.raises(BenchError, match=r"another run \(different: agentsd\)"):
        run_bench(settings, out=tmp_path, resume=True)


def test_rows_that_were_changed_by_hand_are_told_before_anything_is_measured(shape, tmp_path):
    settings = calls(methods=("vanilla", "tomesd"), sizes=((64, 64),))
    run_bench(settings, out=tmp_path)
    cases, rounds = tmp_path / "cases.jsonl", tmp_path / "rounds.jsonl"
    whole = cases.read_text()
    cases.write_text(whole + '{"method": "vanilla"}\n')
    with pytest.raises(BenchError, match=r"cases\.jsonl has rows that no run with these settings wrote"):
        run_bench(settings, out=tmp_path, resume=True)
    # a row whose method had no part in the rounds, because it could not run
    cases.write_text(whole.splitlines(keepends=True)[0])
    records = [json.loads(line) for line in rounds.read_text().splitlines()]
    for record in records:
        del record["samples"]["tomesd 0.4"]
    rounds.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(BenchError, match=r"no row of tomesd 0\.4"):
        run_bench(settings, out=tmp_path, resume=True)
    cases.write_bytes(b"\xff\n")
    with pytest.raises(BenchError, match=r"cases\.jsonl is no text"):
        run_bench(settings, out=tmp_path, resume=True)


def test_what_compiles_later_is_warmed_up_for_longer(monkeypatch):
    """DeepCache makes another graph in its second call, which must not be compiled in the first timed round."""
    graphs = iter([0, 1, 1, 2, 2, 2])  # looked at before and after each call
    monkeypatch.setattr(runner_module, "compiled_graphs", lambda: next(graphs))
    called = []
    for compiled, wanted in ((True, 3), (False, 1)):
        called.clear()
        bench = SimpleNamespace(
            settings=BenchSettings(compile=compiled),
            counter=SimpleNamespace(step=lambda name: None),
            subject=SimpleNamespace(device=torch.device("cpu")),
        )
        graphs = iter([0, 1, 1, 2, 2, 2])
        runner_module._ModelBench._warm_up(bench, Variant("deepcache", called.append))
        assert len(called) == wanted


def test_pictures_without_a_log_are_never_taken_for_those_of_this_run(tmp_path):
    """Their seeds, prompts and method are not known any more."""
    (tmp_path / "images" / "tiny-64x64-batch1" / "vanilla").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(BenchError, match=r"images holds pictures, but no log"):
            RunFolder(tmp_path, {}, {}, resume=resume)


def test_a_log_that_cannot_be_read(tmp_path):
    RunFolder(tmp_path, {}, {}).cases.append({"method": "vanilla"})
    (tmp_path / "cases.jsonl").write_text('{"method": "vanilla"}\nnonsense\n')
    with pytest.raises(BenchError, match=r"Line 2 of .*cases\.jsonl"):
        RunFolder(tmp_path, {}, {}, resume=True)
    (tmp_path / "cases.jsonl").write_text('{"method": "vanilla"}\n["vanilla"]\n')
    with pytest.raises(BenchError, match=r"Line 2 of .*cases\.jsonl cannot be read \(it is no JSON object\)"):
        RunFolder(tmp_path, {}, {}, resume=True)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(BenchError, match=r"settings\.json cannot be read \(it is no JSON object\)"):
        RunFolder(tmp_path, {}, {}, resume=True)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(BenchError, match=r"settings\.json cannot be read"):
        RunFolder(tmp_path, {}, {}, resume=True)


def test_a_line_cut_off_in_writing_is_measured_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert Log(path).records == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n'


def test_resuming_a_folder_that_is_new_starts_there(tmp_path):
    assert RunFolder(tmp_path / "new", {}, {}, resume=True).cases.records == []
    with pytest.raises(BenchError, match="needs the folder"):
        run_bench(resume=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match=r"Cannot write to .*Name another folder"):
        RunFolder(tmp_path / "file" / "below", {}, {})


def test_the_environment_is_plain_data():
    facts = json.loads(json.dumps(environment("cpu", torch.bfloat16)))
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["dtype"] == "bfloat16"
    assert facts["tomesd"] == "0.1.3"
    assert facts["cpu"]


# Bad settings


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
        ({"pictures": 0}, "pictures"),
        ({"batches": (0,)}, "batch"),
        ({"batches": ()}, "empty"),
        ({"methods": ()}, "empty"),
        ({"methods": ("vanilla", "magic")}, "no method 'magic'"),
        ({"models": ()}, "empty"),
        ({"models": ("a/final", "b/final")}, "a/final and b/final are both called final"),
        ({"sizes": ((100, 64),)}, "multiples of 8"),
        ({"sizes": ((0, 64),)}, "multiples of 8"),
        ({"budget_minutes": 0}, "budget_minutes"),
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
    with pytest.raises(BenchError, match="settles models, device itself"):
        BenchSettings.of_suite("cpu", models=("sdxl",), device="cuda")
