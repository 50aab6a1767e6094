"""The wheel: built, installed elsewhere, and used there. An editable install would hide data missing from it."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from PIL import Image

import agentsd


ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "agentsd" / "assets" / "emoji"
SOURCES = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE")


def run(*command, cwd):
    # Nothing of the checkout may leak in through the environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source archive, which is built from a copy: so neither may lack a file."""
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    shutil.copytree(ROOT / "agentsd", sources / "agentsd", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", sources / "dist", sources, cwd=sources)
    (built,) = (sources / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel in it, that finds everything else where this one does."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.EnvBuilder(with_pip=False).create(folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # Folders named in a .pth file do not have their own .pth files read: an editable install there has no effect.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / "agentsd").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {path.relative_to(ROOT).as_posix() for path in files}
    assert "agentsd/py.typed" in names
    assert "agentsd/assets/emoji/model_index.json" in names


def test_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert metadata["Version"] == agentsd.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    core = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"typer", "rich", "torch>=2.6", "diffusers<1,>=0.40"} <= core
    assert {"bench", "demo", "quality", "timm", "train", "dev"} == set(metadata.get_all("Provides-Extra"))
    assert "agentsd = agentsd.cli:main" in entry_points


def test_every_text_file_has_an_encoding():
    """Without one it is that of the machine, which on Windows is not UTF-8."""
    lacking = []
    for file in (path for folder in ("agentsd", "apps") for path in (ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_text = isinstance(call, ast.Call) and _is_text(call)
            if is_text and "encoding" not in {each.arg for each in call.keywords}:
                lacking.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert lacking == []


def _is_text(call):
    """Whether a call reads or writes text: by its name or, of `open` and processes, by how they are called."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    if name == "open":
        given = [*call.args, *(each.value for each in call.keywords)]
        values = [each.value for each in given if isinstance(each, ast.Constant)]
        mode = next((value for value in values if isinstance(value, str) and set(value) <= set("rwaxbt+")), None)
        is_file = isinstance(call.func, ast.Name) or mode is not None  # rather than an image or an archive
        return is_file and "b" not in (mode or "")
    is_text_process = name in ("run", "Popen", "check_output") and any(each.arg == "text" for each in call.keywords)
    return name in ("read_text", "write_text") or is_text_process


def test_the_embedded_model_is_small():
    sizes = {path: path.stat().st_size for path in MODEL.rglob("*") if path.is_file()}
    assert MODEL / "model_index.json" in sizes, f"there is no model in {MODEL}"
    assert sum(sizes.values()) <= 40 * 2**20
    assert max(sizes.values()) <= 15 * 2**20


def test_the_installed_command_draws_with_the_embedded_model(installed):
    where = run(installed / "bin" / "python", "-c", "import agentsd; print(agentsd.__file__)", cwd=installed)
    assert Path(where.strip()).is_relative_to(installed)
    image = installed / "apple.png"
    run(installed / "bin" / "agentsd", "generate", "red apple", "--steps", 2, "--out", image, cwd=installed)
    with Image.open(image) as image:
        low, high = image.convert("L").getextrema()
        assert image.size == (512, 512)
    assert high - low > 20  # it drew something
