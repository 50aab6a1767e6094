"""The `agentsd` command: what it writes, how it ends, and one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch
from models import tiny_refiner, tiny_sd
from typer.testing import CliRunner

import agentsd
from agentsd.cli import app


PROMPT = "a red apple"
COMMAND = [sys.executable, "-c", "from agentsd.cli import main; main()"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments, command=COMMAND):
    """A process of its own, as in a shell."""
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def draw(pipe, steps=2, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return np.asarray(pipe(PROMPT, num_inference_steps=steps, generator=generator, **options).images[0])


# --- what the commands do ---------------------------------------------------------------------------------------


def test_generate_writes_the_patched_image(model, tmp_path):
    """The very image that the library gives, with every option passed on."""
    out = tmp_path / "new" / "apple.png"
    options = ["--ratio", 0.6, "--set", "agent_until=0.2", "--set", "use_rand=false", "--guidance", 3]
    size = ["--height", 96, "--width", 160, "--negative-prompt", "blue"]
    result = run("generate", PROMPT, "--model", model, "--out", out, "--steps", 2, "--seed", 3, *options, *size)
    assert result.exit_code == 0, result.output
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0.6, agent_until=0.2, use_rand=False)
    expected = draw(pipe, guidance_scale=3, height=96, width=160, negative_prompt="blue")
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(out)), expected)
    assert str(out) in result.stdout
    assert "with agentsd, ratio 0.6" in result.stdout


def test_generate_without_the_patch(model, tmp_path):
    """`--no-patch` gives the model's own image."""
    out = tmp_path / "apple.png"
    result = run("generate", PROMPT, "-m", model, "-o", out, "--steps", 2, "--seed", 3, "--no-patch")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(out)), draw(tiny_sd()))
    assert "without agentsd" in result.stdout


def test_generate_warns_of_a_black_image(tmp_path):
    """A black image comes with a reason, not with a cheerful line alone."""
    pipe = tiny_sd()
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    result = run("generate", PROMPT, "-m", tmp_path / "broken", "-o", tmp_path / "apple.png", "--steps", 1)
    assert result.exit_code == 0
    assert "Warning: The image with agentsd has values that are not finite" in result.stderr


def test_compare_writes_images_and_table(model, tmp_path):
    """Two images, one sheet with the difference, and the numbers."""
    out = tmp_path / "folder"
    options = ["--steps", 2, "--seed", 3, "--seconds", 0, "--ratio", 0.4]
    result = run("compare", PROMPT, "--model", model, "--out", out, *options)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(out / "baseline.png")), draw(tiny_sd()))
    patched = draw(agentsd.apply_patch(tiny_sd()))
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(out / "agentsd.png")), patched)
    assert json.loads((out / "comparison.json").read_text())["settings"]["seed"] == 3
    for word in ("speed-up", "per step", "timed once", "PSNR", "SSIM", "side_by_side.png"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("options", "presets"),
    [([], ["paper", "balanced", "fast"]), (["--preset", "fast", "--preset", "tome"], ["fast", "tome"])],
)
def test_compare_shows_presets(model, tmp_path, options, presets):
    """By itself those that a user would choose from; all in one table, one row of images and one file."""
    result = run("compare", PROMPT, "-m", model, "-o", tmp_path, "--steps", 8, "--seed", 3, "--seconds", 0, *options)
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in ("baseline", "speed-up per step", *presets))
    assert list(json.loads((tmp_path / "comparison.json").read_text())["variants"]) == presets
    images = {f"{name}.png" for name in ("baseline", "side_by_side", *presets)}
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.json", *images}
    assert "Feature reuse" not in result.stderr


def test_too_few_steps_for_feature_reuse_are_one_line(model, tmp_path):
    """A newcomer tries few steps first: without a word, nothing would be faster."""
    said = "Warning: Feature reuse is off in runs of fewer than 8 steps; this one has 2."
    generate, compare = (
        ["generate", "-o", tmp_path / "apple.png", "--preset", "fast"],
        ["compare", "-o", tmp_path, "--seconds", 0],
    )
    for arguments in (generate, compare):
        result = run(*arguments, PROMPT, "--model", model, "--steps", 2)
        assert result.exit_code == 0, result.output
        assert [line for line in result.stderr.splitlines() if "Feature reuse" in line] == [said]
    assert json.loads((tmp_path / "comparison.json").read_text())["warnings"] == [said.removeprefix("Warning: ")]


def test_generate_takes_a_preset_and_overrides(model, tmp_path):
    out, options = tmp_path / "apple.png", ["--preset", "fast", "--ratio", 0.2, "--reuse", 2, "--set", "min_tokens=0"]
    result = run("generate", PROMPT, "-m", model, "-o", out, "--steps", 8, "--seed", 3, *options)
    assert result.exit_code == 0, result.output
    assert "with agentsd, preset fast, ratio 0.2, reuse 2, seed 3" in result.stdout
    # Which is no share of the keys that `fast` merges.
    assert "Warning: `ratio=0.2` changes nothing here" in " ".join(result.stderr.split())
    pipe = agentsd.apply_patch(tiny_sd(), preset="fast", ratio=0.2, reuse=2, min_tokens=0)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(out)), draw(pipe, steps=8))


def test_bench_times_a_model(model, tmp_path):
    """The settings arrive, a row is shown for each case, and reports are saved."""
    pytest.importorskip("tomesd")
    arguments = ["--steps", 1, "--repeats", 1, "--ratio", 0.3, "--ratio", 0.5, "--batch", 2, "--set", "seed=3"]
    arguments += ["--height", 64, "--width", 64, "--height", 64, "--width", 96, "--device", "cpu", "--no-memory"]
    result = run("bench", model, *arguments, "--methods", "baseline, agentsd", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [(row["method"], row["ratio"], row["width"], row["batch"]) for row in rows] == [
        (method, ratio, width, 2) for width in (64, 96) for method, ratio in _BASELINE_AND_RATIOS
    ]
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert (saved["ratios"], saved["options"]) == ([0.3, 0.5], {"seed": 3})
    assert "speed-up" in result.stdout
    assert str(tmp_path / "report.html") in result.stdout.replace("\n", "")


_BASELINE_AND_RATIOS = [("baseline", None), ("agentsd", 0.3), ("agentsd", 0.5)]


def test_bench_reads_prompts(model, tmp_path):
    """As many images as the file has lines, or as a number says."""
    (tmp_path / "prompts.txt").write_text("red apple\nblue heart\n")
    arguments = ["bench", model, "--suite", "quality", "--methods", "baseline", "--steps", 1, "--repeats", 1]
    arguments += ["--height", 64, "--width", 64, "--device", "cpu", "--no-memory"]
    for given, count in ((tmp_path / "prompts.txt", 2), (3, 3)):
        out = tmp_path / str(count)
        result = run(*arguments, "--prompts", given, "--out", out)
        assert result.exit_code == 0, result.output
        assert len(list(out.glob("images/*/baseline/*.png"))) == count


def test_report_lists_the_layers(model):
    """One line a layer, at the model's own size or the one asked for."""
    result = run("report", "--model", model, "--set", "max_downsample=2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("128×128 pixels")
    assert result.stdout.count("attn1") == 6
    assert "160×96 pixels" in run("report", "--model", model, "--height", 96, "--width", 160).stdout


def test_report_tells_of_feature_reuse(model):
    result = run("report", "--model", model, "--preset", "balanced", "--reuse", 4)
    assert "1 step of 4 runs the whole UNet" in result.stdout.replace("\n", " ")
    assert "fewer than `min_tokens=2048`" in result.stdout
    assert "deep part" not in run("report", "--model", model, "--reuse", 1).stdout


def test_env_names_versions_and_device():
    """What a bug report needs."""
    result = run("env")
    assert result.exit_code == 0, result.output
    for word in (agentsd.__version__, torch.__version__, "diffusers", "device", "dtype", "threads"):
        assert word in result.stdout


def test_version():
    """The version alone, for scripts."""
    assert run("--version").stdout == f"agentsd {agentsd.__version__}\n"


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", PROMPT, "--ratio", "1.5"], "`ratio` must be in [0, 1), but got 1.5."),
        (["generate", PROMPT, "--set", "rato=0.5"], "Unknown option 'rato'"),
        (["generate", PROMPT, "--set", "agent_until"], "--set takes NAME=VALUE"),
        (["generate", PROMPT, "--set", "sx=wide"], "`sx` must be an integer, but got 'wide'."),
        (["generate", PROMPT, "--ratio", "0.5", "--set", "ratio=0.4"], "ratio is given twice."),
        (
            ["generate", PROMPT, "--preset", "slow"],
            "Choose one of paper, agent, tome, balanced, fast.",
        ),
        (["compare", PROMPT, "--preset", "fast", "--preset", "slow"], "There is no preset 'slow'."),
        (["report", "--preset", "slow"], "There is no preset 'slow'."),
        (["report", "--preset", ""], "There is no preset ''."),
        (["generate", PROMPT, "--reuse", "2", "--set", "reuse=3"], "reuse is given twice."),
        (["generate", PROMPT, "--preset", "fast", "--no-patch"], "--no-patch leaves nothing"),
        (["generate", PROMPT, "--ratio", "0.5", "--no-patch"], "--no-patch leaves nothing"),
        (["generate", PROMPT, "--out", "image.doc"], "does not end in the suffix of a colour image format"),
        (["generate", PROMPT, "--out", "image.xbm"], "does not end in the suffix of a colour image format"),
        (["generate", PROMPT, "--out", "file.txt/image.png"], "is a file: name a folder."),
        (["compare", PROMPT, "--out", "file.txt/below"], "is a file: name a folder."),
        (["generate", PROMPT, "--out", "image.psd"], "does not end in the suffix of a colour image format"),
        (["generate", PROMPT, "--out", "."], "is a folder: name a file"),
        (["generate", PROMPT, "--model", "./nothing"], "There is no model './nothing'"),
        (["generate", PROMPT, "--model", "nothing"], "There is no model 'nothing'"),
        (["generate", PROMPT, "--model", "model.ckpt"], "is a pickle checkpoint"),
        (["generate", PROMPT, "--model", "."], "has no model_index.json"),
        (["generate", PROMPT, "--model", "MODEL", "--device", "gpu"], "Cannot use device 'gpu'."),
        (["generate", PROMPT, "--model", "MODEL", "--dtype", "int4"], "but got 'int4'."),
        (["generate", PROMPT, "--width", "64"], "Give both --height and --width"),
        (["compare", PROMPT, "--height", "64"], "Give both --height and --width"),
        (["compare", PROMPT, "--out", "file.txt"], "is a file: name a folder."),
        (["report", "--model", "MODEL", "--height", "64"], "Give both --height and --width"),
        (["bench", "MODEL", "--ratio", "2"], "2"),
        (["bench", "--suite", "gpu"], "There is no suite 'gpu'"),
        (["bench", "MODEL", "--suite", "cpu"], "The suite 'cpu' is about models="),
        (["bench", "--suite", "cpu", "--height", "64"], "Give --height and --width the same number of times"),
        (["bench", "MODEL", "--resume"], "--resume needs the folder of the run: name it with --out."),
        (["bench", "MODEL", "--methods", "baseline,magic"], "There is no method 'magic'"),
        (["bench", "MODEL", "--methods", "baseline,agentsd:rato=1"], "'agentsd:rato=1' cannot be run: Unknown option"),
        (["bench", "MODEL", "--set", "speed=2"], "Unknown option 'speed'"),
        (["bench", "MODEL", "--prompts", "none.txt"], "Cannot read the prompts in none.txt"),
        (["bench", "MODEL", "--out", "file.txt"], "is a file: name a folder."),
        (["bench", "--suite", "shapes", "sd3"], "There is no shape 'sd3'"),
        (["bench", "./nothing"], "There is no model './nothing'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, model, tmp_path, monkeypatch):
    """Found before the model is loaded, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    result = run(*(model if argument == "MODEL" else argument for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["paint"],
        ["generate"],
        ["generate", PROMPT, "--steps", "0"],
        ["generate", PROMPT, "--seed", "-1"],
        ["generate", PROMPT, "--seed", 2**63],
        ["compare", PROMPT, "--reuse", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    """What the option parser refuses."""
    assert run(*arguments).exit_code == 2


def test_failure_is_one_line_and_exit_code_1(tmp_path):
    """What goes wrong while it runs: here a model without a UNet that can be patched."""
    unet = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3, "mid_block_type": None}
    tiny_sd(**unet).save_pretrained(tmp_path / "plain")
    result = run("generate", PROMPT, "--model", tmp_path / "plain", "--out", tmp_path / "apple.png")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "no self-attention that agentsd can patch" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "apple.png").exists()


@pytest.mark.parametrize("command", ["generate", "compare", "bench"])
def test_a_model_that_needs_a_image_is_named(command, tmp_path):
    """A command has only a prompt; the model's own error would ask for an `image` that no option gives."""
    tiny_refiner().save_pretrained(tmp_path / "refiner")
    model = [tmp_path / "refiner"] if command == "bench" else [PROMPT, "--model", tmp_path / "refiner"]
    result = run(command, *model, "--steps", 1)
    assert result.exit_code == 1
    *bar, message = result.stderr.splitlines()
    assert message.startswith("Error: StableDiffusionXLImg2ImgPipeline starts from an image")
    assert len(bar) == (command == "bench")


def test_debug_shows_the_traceback(model):
    """For those who want to know where."""
    result = run("generate", PROMPT, "--model", "./nothing", "--debug")
    assert isinstance(result.exception, FileNotFoundError)
    assert result.exit_code == 1


# --- as a process -----------------------------------------------------------------------------------------------


def test_help_does_not_wait_for_torch():
    """`--help` is the first thing that anybody types."""
    code = (
        "import sys; from typer.testing import CliRunner; from agentsd.cli import app; "
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0; "
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_process_keeps_results_and_messages_apart(model, tmp_path):
    """Standard output can be piped: no progress, no library's chatter in it, and none in a log either."""
    process = start("generate", PROMPT, "--model", model, "--out", tmp_path / "apple.png", "--steps", 2)
    output, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    assert output.startswith(f"{tmp_path / 'apple.png'}: 128×128, 2 steps in ")
    assert output.count("\n") == 1
    assert messages == ""


def test_bench_prints_nothing_but_its_progress():
    """Neither does the process that measures memory."""
    process = start("bench", "--methods", "baseline", "--steps", 1, "--repeats", 1, "--height", 64, "--width", 64)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    assert [line.split()[0] for line in messages.splitlines() if line] == ["done"]


def test_process_ends_with_the_exit_code():
    """Without a traceback."""
    process = start("generate", PROMPT, "--model", "./nothing")
    output, messages = process.communicate(timeout=300)
    assert (process.returncode, output) == (2, "")
    assert messages.startswith("Error: There is no model './nothing'")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupt_is_not_lost_while_an_object_is_deleted():
    code = """
import time
from agentsd.cli import commands

class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)

def work(**_):
    Slow()
    time.sleep(60)

commands.app = work
commands.main()
"""
    process = start(command=[sys.executable, "-c", code])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=50)
    assert (process.returncode, messages.strip()) == (130, "Interrupted.")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupt_ends_with_130(model, tmp_path):
    """Ctrl-C in the middle of a run: no traceback, and no half-made files."""
    code = "import torch, diffusers; from agentsd.cli import main; print('ready', flush=True); main()"
    arguments = ["compare", PROMPT, "--model", model, "--out", tmp_path / "folder", "--steps", 900]
    process = start(*arguments, command=[sys.executable, "-c", code])
    assert process.stdout.readline() == "ready\n"
    time.sleep(2)  # the model is being loaded, or images are being made: both must end the same way
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 130
    assert messages.rstrip().endswith("Interrupted.")
    assert "Traceback" not in messages
    assert not (tmp_path / "folder").exists()
