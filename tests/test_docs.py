"""What the documentation shows runs: every `>>>` example and every snippet and command of the README.

Benchmarks that take half an hour are among the slow tests. `agentsd demo`, which runs until it is interrupted, is run
in `test_demo.py`.
"""

import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import agentsd
import agentsd.bench
from agentsd.bench.tables import fill_tables
from agentsd.cli import app
from agentsd.compare import Comparison


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONG = re.compile("--suite (cpu|shapes|paper)|--prompts 64")
MODULES = [name for _, name, is_package in pkgutil.walk_packages(agentsd.__path__, "agentsd.") if not is_package]


class FencedParser(doctest.DocTestParser):
    """Reads examples in Markdown fences, whose closing line is no expected output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"(?m)^ *```.*$", "", string), name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(parser=FencedParser()).find(module, name):
        result = runner.run(test)
        assert result.failed == 0, f"{test.name}: {result.failed} of {result.attempted} examples failed"


def public_objects():
    """Functions and classes that users meet; errors need no example."""
    for module in (agentsd, agentsd.bench):
        for name in module.__all__:
            public = getattr(module, name)
            if callable(public) and not (inspect.isclass(public) and issubclass(public, Exception)):
                yield name, public
    yield "Comparison", Comparison


def test_public_names_are_documented_with_arguments_and_examples():
    for name, public in public_objects():
        text = inspect.getdoc(public)
        assert text, name
        assert ">>> " in text, f"{name} has no example"
        if inspect.isfunction(public):
            for parameter in inspect.signature(public).parameters:
                assert f"{parameter} (" in text or f"{parameter}:" in text, f"{name} does not document {parameter}"


def blocks(language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)


def test_python_snippets_of_the_readme_run(tmp_path):
    script = "\n".join(blocks("python"))
    assert "apply_patch" in script
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment(), timeout=300)
    assert (tmp_path / "image.png").is_file()


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


def marked(command: str) -> object:
    return pytest.param(command, marks=[pytest.mark.slow, pytest.mark.timeout(7200)] if LONG.search(command) else [])


@pytest.mark.parametrize(
    "command",
    [marked(line) for line in commands() if line.startswith("agentsd ") and not line.startswith("agentsd demo")],
)
def test_commands_of_the_readme_run(command, tmp_path):
    program = [sys.executable, "-c", "from agentsd.cli import main; main()"]
    arguments = shlex.split(command)[1:]
    subprocess.run([*program, *arguments], cwd=tmp_path, check=True, env=environment())


def test_other_commands_of_the_readme_are_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    others = [line for line in commands() if not line.startswith("agentsd ")]
    assert {"make quickstart", "make test"} <= set(others)
    for line in others:
        assert re.fullmatch(r"make \w+", line), line
        assert f"\n{line.split()[1]}:" in makefile, line


def test_tables_of_the_readme_are_the_recorded_ones():
    assert fill_tables(ROOT / "README.md") == README, "make tables"


@pytest.mark.parametrize("name", ["cpu", "shapes", "quality", "paper"])
def test_the_command_below_a_table_is_the_one_that_recorded_it(name, tmp_path, monkeypatch):
    """Nobody could reproduce the numbers otherwise."""
    folder = f"notebooks/results/{name}"
    below = README.split(f"<!-- results: {folder} ")[1]
    command = re.search(r"(?m)^agentsd (bench .*)$", below)[1]
    asked = []

    def run_bench(settings, **options):
        asked.append(settings)
        raise RuntimeError("not now")

    monkeypatch.setattr("agentsd.bench.run_bench", run_bench)
    *command, _ = shlex.split(command)
    CliRunner().invoke(app, [*command, str(tmp_path / "out")])
    assert asked[0].to_dict() == json.loads((ROOT / folder / "settings.json").read_text(encoding="utf-8"))


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
