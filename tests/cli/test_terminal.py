"""What the command prints, in whatever encoding its streams have, and the warnings that it passes on."""

import io
import json
import os
import subprocess
import sys
import warnings

import pytest
from models import tiny_sd
from other_pipelines import tiny_ldm3d
from typer.testing import CliRunner

from agentsd.cli import app, main
from agentsd.cli.terminal import allow_any_text


PROMPTS = ("a red apple", "ein Apfel, größer – “rot”", "红苹果 \N{RED APPLE}")
LONG = " ".join(["apple"] * 120)
COMMAND = [sys.executable, "-m", "agentsd"]


def run(*arguments, encoding="utf-8"):
    return CliRunner(charset=encoding).invoke(app, [str(argument) for argument in arguments])


def run_process(*arguments, encoding):
    """As in a shell with another encoding, and with the output redirected."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, env=environment, check=False)


@pytest.fixture
def run_main(monkeypatch):
    """The whole command as in such a shell, without a process, which would load torch anew."""

    def run_main(*arguments, encoding):
        name, _, errors = encoding.partition(":")
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=name, errors=errors or "strict") for _ in range(2)]
        for kind, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, kind, stream)
        monkeypatch.setattr(sys, "argv", ["agentsd", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        for stream in streams:
            stream.flush()
        return end.value.code, *(stream.buffer.getvalue().decode(name) for stream in streams)

    return run_main


@pytest.mark.parametrize("encoding", ["cp1251", "ascii", "cp437:strict", "utf-8"])
def test_a_finished_run_does_not_fail_for_its_output(model, tmp_path, run_main, encoding):
    out = tmp_path / "果.png"
    arguments = ["generate", PROMPTS[2], "--model", model, "--out", out, "--steps", 1]
    code, output, messages = run_main(*arguments, encoding=encoding)
    assert (code, messages) == (0, "")
    sign = "×" if encoding == "utf-8" else "x"
    assert f": 128{sign}128, 1 steps in " in output
    assert out.exists()


def test_a_finished_process_does_not_either(model, tmp_path):
    arguments = ["generate", PROMPTS[2], "--model", model, "--out", tmp_path / "果.png", "--steps", 1]
    process = run_process(*arguments, encoding="ascii")
    assert (process.returncode, process.stderr) == (0, b"")
    assert b": 128x128, 1 steps in " in process.stdout


@pytest.mark.parametrize("encoding", ["cp1251", "ascii", "cp437"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_comparison_shows_any_prompt(model, tmp_path, encoding, prompt):
    """Its table is drawn in ASCII where the encoding has no lines; the file is UTF-8 all the same."""
    arguments = ["compare", prompt, "--model", model, "--out", tmp_path, "--steps", 1, "--seconds", 0, "--ratio", 0.3]
    result = run(*arguments, encoding=encoding)
    assert result.exit_code == 0, result.output
    assert "128x128, 1 steps" in " ".join(result.stdout.split())
    assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["settings"]["prompt"] == prompt


@pytest.mark.parametrize("encoding", ["cp1251", "ascii"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "--model", "MODEL"],
        ["env"],
        ["--help"],
        ["compare", "--help"],
        ["bench", "MODEL", "--methods", "baseline,agentsd", "--steps", "1", "--repeats", "1", "--no-memory"],
    ],
)
def test_every_command_prints_in_any_encoding(model, encoding, arguments):
    result = run(*(model if argument == "MODEL" else argument for argument in arguments), encoding=encoding)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("encoding", ["cp1251", "ascii:strict"])
def test_errors_print_in_any_encoding(run_main, encoding):
    code, _, messages = run_main("generate", PROMPTS[2], "--model", "./苹果", encoding=encoding)
    assert code == 2
    assert "There is no model './\\u82f9\\u679c'" in messages
    assert "UnicodeEncodeError" not in messages


@pytest.mark.parametrize("encoding", ["cp1251", "ascii:strict"])
def test_tracebacks_print_in_any_encoding(encoding):
    """By the interpreter, which shows them once the command has ended."""
    process = run_process("generate", PROMPTS[2], "--model", "./苹果", "--debug", encoding=encoding)
    messages = process.stderr.decode(encoding.split(":")[0])
    assert process.returncode == 1
    assert "There is no model './\\u82f9\\u679c'" in messages
    assert "UnicodeEncodeError" not in messages


def test_signs_of_ones_own_look_alike_and_letters_are_numbered(monkeypatch):
    """Also what is no text in any encoding, as an argument in another one than the terminal's."""
    for encoding, expected in (("ascii", "128x128 1-2 \\u82f9 \\udcff\n"), ("utf-8", "128×128 1–2 苹 \\udcff\n")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", stream)
        allow_any_text()
        print("128×128 1–2 苹 \udcff", flush=True)
        assert stream.buffer.getvalue().decode(encoding) == expected


# --- warnings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "compare", "bench"])
def test_a_prompt_that_is_too_long_is_named_once(model, tmp_path, command):
    arguments = [command, LONG, "--model", model, "--out", tmp_path / "out.png", "--steps", 1]
    arguments += ["--seconds", 0, "--preset", "paper"] if command == "compare" else []
    if command == "bench":
        (tmp_path / "prompts.txt").write_text(LONG, encoding="utf-8")
        arguments = ["bench", model, "--suite", "quality", "--methods", "baseline,agentsd", "--steps", 1]
        arguments += ["--repeats", 1, "--no-memory", "--prompts", tmp_path / "prompts.txt"]
    process = run_process(*arguments, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    warned = [line for line in process.stderr.decode().splitlines() if line.startswith("Warning: ")]
    assert len(warned) == 1
    assert warned[0].startswith("Warning: The prompt is longer than the 77 tokens that the model reads.")
    assert "[diffusers]" not in process.stderr.decode() and "Token indices" not in process.stderr.decode()


def test_warnings_of_agentsd_are_one_line_and_those_of_others_are_not_shown(model, tmp_path):
    result = run("generate", "a", "-m", model, "-o", tmp_path / "a.png", "--steps", 3, "--reuse", 2)
    assert result.stderr == "Warning: Feature reuse is off in runs of fewer than 8 steps; this one has 3.\n"


def test_what_others_warn_of_is_not_shown(monkeypatch, model, tmp_path):
    def noisy(*_, **__):
        warnings.warn("an inside of torch", stacklevel=1)
        return tiny_sd()

    monkeypatch.setattr("agentsd.utils.loading.load_pipeline", noisy)
    result = run("generate", "a", "-m", model, "-o", tmp_path / "a.png", "--steps", 1)
    assert (result.exit_code, "torch" in result.stderr) == (0, False)


def test_a_scheduler_s_outdated_settings_are_named(tmp_path):
    """diffusers changes them by itself."""
    pipe = tiny_sd()
    pipe.scheduler.register_to_config(steps_offset=0)
    pipe.save_pretrained(tmp_path / "old")
    result = run("generate", "a", "-m", tmp_path / "old", "-o", tmp_path / "a.png", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert result.stderr == "Warning: The scheduler's configuration is outdated: `steps_offset` was set to 1.\n"


def test_an_image_with_depth_is_generated(tmp_path):
    tiny_ldm3d().save_pretrained(tmp_path / "ldm3d")
    result = run("generate", "a", "-m", tmp_path / "ldm3d", "-o", tmp_path / "a.png", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").exists()
