"""What is given on the command line arrives where the work is done."""

import pytest
import torch
from typer.testing import CliRunner

import agentsd
from agentsd.cli import app
from agentsd.cli.options import load_model


def run(command, *more):
    return CliRunner().invoke(app, [*command.split(), *map(str, more)])


def stop_at(monkeypatch, name):
    """Note what the function is called with, instead of calling it."""
    calls = []

    def noted(*arguments, **options):
        calls.append((arguments, options))
        raise RuntimeError("not now")

    monkeypatch.setattr(name, noted)
    return calls


def test_compare(monkeypatch, model):
    calls = stop_at(monkeypatch, "agentsd.compare.compare")
    run(
        "compare red --ratio 0.7 --guidance 3 --height 96 --width 160 --seed 3 --negative-prompt blue --seconds 9 -m",
        model,
    )
    (_, prompt), options = calls[0]
    options.pop("progress")
    assert prompt == "red"
    assert options == {
        "config": agentsd.AgentSDConfig(ratio=0.7),
        "steps": 25,
        "guidance_scale": 3.0,
        "height": 96,
        "width": 160,
        "seed": 3,
        "negative_prompt": "blue",
        "seconds": 9.0,
    }


@pytest.mark.parametrize(
    "options, wanted",
    [
        ("", {"configs": {name: agentsd.AgentSDConfig.preset(name) for name in ("paper", "balanced", "fast")}}),
        ("--reuse 3", {"config": agentsd.AgentSDConfig(reuse=3)}),
        ("--set min_tokens=9", {"config": agentsd.AgentSDConfig(min_tokens=9)}),
        ("--set min_tokens=auto", {"config": agentsd.AgentSDConfig(min_tokens="auto")}),
        (
            "--preset fast --preset agent --ratio 0.3 --set reuse=none",
            {"configs": {n: agentsd.AgentSDConfig.preset(n, ratio=0.3, reuse=None) for n in ("fast", "agent")}},
        ),
    ],
)
def test_compare_takes_presets(monkeypatch, model, options, wanted):
    calls = stop_at(monkeypatch, "agentsd.compare.compare")
    run(f"compare red {options} -m", model)
    ((_, given),) = calls
    assert {name: given[name] for name in given if "config" in name} == wanted


def test_bench(monkeypatch):
    calls = stop_at(monkeypatch, "agentsd.bench.run_bench")
    run(
        "bench emoji --suite quality --steps 3 --scheduler dpm++2m --warmup 2 --repeats 4 --seed 7 --guidance 2.5 "
        "--lpips --features inception --reference ref.safetensors --device cpu --dtype bfloat16 --compile "
        "--no-memory --budget-minutes 9"
    )
    (settings,), _ = calls[0]
    wanted = {
        "steps": 3,
        "scheduler": "dpm++2m",
        "warmup": 2,
        "repeats": 4,
        "seed": 7,
        "guidance_scale": 2.5,
        "lpips": True,
        "features": "inception",
        "reference": "ref.safetensors",
        "device": "cpu",
        "dtype": "bfloat16",
        "compile": True,
        "memory": False,
        "budget_minutes": 9.0,
    }
    assert {name: getattr(settings, name) for name in wanted} == wanted


def test_bench_compiles_in_a_mode(monkeypatch):
    calls = stop_at(monkeypatch, "agentsd.bench.run_bench")
    run("bench emoji --compile-mode reduce-overhead")
    run("bench emoji")
    assert [settings.compile for (settings,), _ in calls] == ["reduce-overhead", False]


def test_bench_draws_in_one_run_and_times_in_another(monkeypatch):
    calls = stop_at(monkeypatch, "agentsd.bench.run_bench")
    run("bench emoji --suite quality --methods baseline,tomesd --repeats 0")
    run("bench emoji --suite quality --methods baseline,tomesd --images-of earlier")
    assert [(settings.repeats, settings.images_of) for (settings,), _ in calls] == [(0, None), (5, "earlier")]


def test_demo(monkeypatch):
    engines, launched = [], []
    monkeypatch.setattr("agentsd.demo.engine.Engine", lambda *_, **options: engines.append(options))
    monkeypatch.setattr("agentsd.demo.build_demo", lambda *_: None)
    monkeypatch.setattr("agentsd.demo.launch_demo", lambda page, **options: launched.append(options))
    run("demo --max-side 512 --max-steps 30 --max-waiting 2 --host 0.0.0.0 --share --dtype bfloat16")
    limits = engines[0]["limits"]
    assert (limits.side, limits.steps, limits.waiting, engines[0]["dtype"]) == (512, 30, 2, "bfloat16")
    assert launched == [{"host": "0.0.0.0", "port": None, "share": True}]


@pytest.mark.parametrize(("options", "device"), [("", None), ("--device cuda:1", "cuda:1")])
def test_report_is_about_the_device_that_would_draw(monkeypatch, options, device):
    """From how many tokens on a preset merges differs between a CPU and a GPU."""
    calls = stop_at(monkeypatch, "agentsd.cli.commands.load_model")
    run(f"report {options}")
    assert calls == [(("emoji", device, None, False), {})]


def test_the_model_is_loaded_in_the_precision_asked_for(model):
    assert load_model(model, "cpu", "bfloat16", False).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("command", ["compare a --out", "bench --out"])
def test_a_folder_that_cannot_be_written_to_is_found_out_first(tmp_path, monkeypatch, command):
    monkeypatch.setattr("os.access", lambda *_: False)
    result = run(command, tmp_path / "results")
    assert result.exit_code == 2
    assert "nothing can be written" in result.stderr
