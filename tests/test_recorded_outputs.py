"""No change of the code around the mathematics changes what a patched model computes, not by a bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recorded_outputs import CASES
from safetensors import safe_open
from safetensors.torch import load_file


FOLDER = Path(__file__).parent
RECORDED = FOLDER / "data" / "recorded_outputs.safetensors"


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    with safe_open(RECORDED, framework="pt") as file:
        version = file.metadata()["torch"]
    if version != torch.__version__:
        pytest.skip(f"recorded with torch {version}: another one may round otherwise")
    file = tmp_path_factory.mktemp("outputs") / "now.safetensors"
    subprocess.run([sys.executable, FOLDER / "recorded_outputs.py", file], check=True, timeout=300)
    return load_file(file)


@pytest.mark.parametrize("name", CASES)
def test_the_output_is_the_recorded_one_bit_for_bit(computed, name):
    assert torch.equal(computed[name], load_file(RECORDED)[name])
